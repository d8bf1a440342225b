"""How the copy engine finds a tensor's tiles, and how they lie in shared memory."""

import functools

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}


@functools.cache
def tile_layout(rows: int, columns: int, dtype: torch.dtype):
    """How a [rows, columns] tile lies in shared memory: swizzled as the copy engine and wgmma agree on."""
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], _DTYPES[dtype])


def descriptor(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """How the copy engine fetches tiles `[1, 1, rows, columns]` of a `[B, H, S, D]` tensor."""
    # Where there is but one index its stride is never used and may be anything; the engine wants multiples of 16 bytes.
    strides = [stride if size > 1 else 8 for size, stride in zip(tensor.shape[:3], tensor.stride()[:3])]
    layout = tile_layout(rows, columns, tensor.dtype)
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, columns], layout)
