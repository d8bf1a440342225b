"""The kernels for compute capability 9.0 (H100, H200), in Gluon; a folder a family."""
