"""The kernels for compute capability 9.0 (H100, H200), in Gluon: a folder a family, and what they share beside it."""

# The first Triton whose Gluon has wgmma.
FIRST_TRITON = (3, 5)
