"""The Gluon names that Triton 3.5 to 3.9 spell differently, under one name each."""

import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])

# 3.8 renamed the copies, 3.9 took the old names away.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
# 3.7 renamed it.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
# 3.5 takes the first partition's function and arguments apart from the others', which all share one argument tuple.
SHARED_WORKER_ARGUMENTS = gl.constexpr(VERSION < (3, 6))
# P may be rounded to 16 bits where its product with V is issued, beside the scores: on an H200 with 3.6 that is 3 to
# 8 % faster than with the softmax. The ptxas of 3.8 and 3.9 has no registers for it and spills in the main loop.
ROUND_LATE = gl.constexpr(VERSION < (3, 8))
# 3.9 renamed it.
copy_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
# 3.9 took its underscore away.
PUBLIC_REINTERPRET = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
