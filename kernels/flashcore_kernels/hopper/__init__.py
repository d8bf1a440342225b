"""The forward and the decode for compute capability 9.0 (H100, H200) in Gluon, Triton 3.5 and newer."""
