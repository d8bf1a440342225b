"""Triton's interpreter at several times its speed, for the machines without a GPU: what it computes stays the same."""

import dataclasses
import functools
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def _with_a_large_stack():
    """call(f) -> f(), for an f whose inner loops call a lot.

    CPython keeps frames in chunks of 16 KiB, and maps and unmaps a chunk each time that calls cross its end: tens of
    thousands of times a second where a loop happens to lie there. A function with very many local variables gets a
    chunk that is large enough for all that it calls.
    """
    variables = "".join(f"        v{i} = 0\n" for i in range(20_000))
    namespace = {}
    exec(f"def call(f):\n    if f is None:\n{variables}    return f()", namespace)
    return namespace["call"]


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """While this holds, Triton's interpreter runs without what takes most of its time.

    That is: tracing kernel bodies for coverage; looking for garbage in all of the process; replacing all of
    triton.language by the interpreter's own functions again at each call of one jitted function by another, where the
    launch has done so; asking after each sum of ints whether it overflowed; and finding out for each tile anew what its
    type is called, there and in NumPy, what its shape is, and whether it has that of the tile beside it. These are
    Triton's internals: a version that lacks one of them is left as it is, and so is a process whose kernels are
    compiled, as the compiler uses some of the same. Not for several threads.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        from ..device import interprets

        if not interprets():
            yield
            return
        run, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
        np_dtype, make_tile_type = interpreter._get_np_dtype, tl.block_type.__init__
        make_tensor = tl.tensor.__init__
        builder = interpreter.interpreter_builder
        unchecked = dataclasses.replace(builder.options, sanitize_overflow=False)
    except (ImportError, AttributeError, TypeError):
        yield
        return
    # From Triton 3.5 on; the rest does without.
    semantic = type(getattr(interpreter, "interpreter_semantic", None))
    broadcast = getattr(semantic, "broadcast_impl_value", None)
    patched, call = set(), _with_a_large_stack()

    def quickly(*args, **kwargs):
        tracer, collecting = sys.gettrace(), gc.isenabled()
        sys.settrace(None)
        gc.disable()
        patched.clear()
        try:
            return call(lambda: run(*args, **kwargs))
        finally:
            if collecting:
                gc.enable()
            sys.settrace(tracer)

    @functools.cache
    def modules(function) -> frozenset:
        # Globals hold triton.language or, in Triton's own library and there too as `tl`, triton.language.core.
        return frozenset(value for value in function.__globals__.values() if value is tl or value is tl.core)

    def patch_once(function):
        if modules(function) in patched:
            return None
        patched.add(modules(function))
        return patch(function)

    np_dtypes = {}

    def np_dtype_once(kind):
        scalar = kind.element_ty if kind.is_block() else kind
        if scalar.name not in np_dtypes:
            np_dtypes[scalar.name] = np_dtype(scalar)
        return np_dtypes[scalar.name]

    tile_types = {}

    def make_tile_type_once(self, element_ty, shape):
        key = (element_ty.name, *[getattr(size, "value", size) for size in shape])
        if key not in tile_types:
            make_tile_type(self, element_ty, shape)
            tile_types[key] = self.__dict__
        # The same for all of a kind, so that their shapes are one object.
        self.__dict__ = tile_types[key]

    shapes = {}

    def make_tensor_once(self, handle, kind):
        key = kind.name if kind.is_block() else None
        if key not in shapes:
            make_tensor(self, handle, kind)
            its_own = ("handle", "type", "dtype")
            shapes[key] = {name: part for name, part in self.__dict__.items() if name not in its_own}
        self.__dict__ = {**shapes[key], "handle": handle, "type": kind, "dtype": kind.scalar}

    def stretched(semantic, tensor, kind):
        if kind is None:
            return tensor
        if tensor.type.is_block():
            handle = semantic.builder.create_broadcast(tensor.handle, kind.shape.values)
        else:
            handle = semantic.builder.create_splat(kind, tensor.handle)
        return semantic.tensor(handle, kind)

    stretched_kinds = {}

    def broadcast_once(self, left, right):
        if left.shape is right.shape:
            return left, right
        key = left.type.name, right.type.name
        if key in stretched_kinds:
            left_kind, right_kind = stretched_kinds[key]
            return stretched(self, left, left_kind), stretched(self, right, right_kind)
        wide = broadcast(self, left, right)
        ranks = len(left.shape), len(right.shape)
        # A scalar becomes a tile, or axes of one element get longer; new axes are left to the original.
        if 0 in ranks or ranks[0] == ranks[1]:
            stretched_kinds[key] = [None if new is old else new.type for new, old in zip(wide, (left, right))]
        return wide

    replacements = [
        (interpreter.GridExecutor, "__call__", quickly),
        (interpreter, "_patch_lang", patch_once),
        (interpreter, "_get_np_dtype", np_dtype_once),
        (tl.block_type, "__init__", make_tile_type_once),
        (tl.tensor, "__init__", make_tensor_once),
        (builder, "options", unchecked),
    ]
    if broadcast is not None:
        replacements.append((semantic, "broadcast_impl_value", broadcast_once))
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    for owner, name, replacement in replacements:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
