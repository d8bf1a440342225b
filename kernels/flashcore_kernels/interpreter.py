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
    launch has done so; and asking after each sum of ints whether it overflowed. These are Triton's internals: a version
    that lacks one of them is left as it is. Not for several threads.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        run, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
        builder = interpreter.interpreter_builder
        options = builder.options
        unchecked = dataclasses.replace(options, sanitize_overflow=False)
    except (ImportError, AttributeError, TypeError):
        yield
        return
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
        # Globals hold triton.language or, in Triton's own library, triton.language.core.
        return frozenset(name for name, value in function.__globals__.items() if value is tl or value is tl.core)

    def patch_once(function):
        if modules(function) in patched:
            return None
        patched.add(modules(function))
        return patch(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = quickly, patch_once
    builder.options = unchecked
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__, interpreter._patch_lang = run, patch
        builder.options = options
