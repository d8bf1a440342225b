"""The version of both packages: the build, the adapter and the kernels read it here."""

__version__ = "0.1.0"
