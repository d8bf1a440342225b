"""The kernels for every GPU that Triton compiles for, in plain Triton."""
