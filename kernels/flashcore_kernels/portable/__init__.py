"""The kernels of every GPU that Triton compiles for."""
