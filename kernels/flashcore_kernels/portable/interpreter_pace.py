"""Larger tiles for whole models in Triton's interpreter, where a block costs the same time whatever its size."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..runtime.interpreter import quick_interpreter
from .tables import LEAST_TILE


@contextmanager
def interpreter_pace(keys: int = 256, queries: int = 64) -> Iterator[None]:
    """While this holds, the interpreter is quicker, and kernels take at least so many keys a block and chunk.

    For the interpreter alone: a GPU's blocks of 32 keys would make whole models last several times as long, and so
    would its tiles of 32 queries. What the kernels compute stays the same.
    """
    token = LEAST_TILE.set((queries, keys))
    try:
        with quick_interpreter():
            yield
    finally:
        LEAST_TILE.reset(token)
