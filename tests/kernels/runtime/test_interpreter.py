"""The quicker interpreter: the same answers, and nothing of it left behind."""

import gc
import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from flashcore_kernels.runtime.interpreter import quick_interpreter  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU the interpreter runs the kernels")


@triton.jit
def _twice(x):
    return x + x + tl.zeros_like(x)


@triton.jit
def _kernel(X, Out, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(X + offs)
    for _ in range(3):
        x = _twice(x)
    tl.store(Out + offs, x)


def parts() -> tuple:
    return (
        interpreter.GridExecutor.__call__, interpreter._patch_lang, interpreter._get_np_dtype,
        tl.block_type.__init__, tl.tensor.__init__, interpreter.interpreter_builder.options,
        getattr(type(getattr(interpreter, "interpreter_semantic", None)), "broadcast_impl_value", None),
    )  # fmt: skip


def test_same_answer_with_one_patch_a_launch(monkeypatch):
    patched = []
    original = interpreter._patch_lang
    monkeypatch.setattr(interpreter, "_patch_lang", lambda function: patched.append(function) or original(function))
    x, out = torch.randn(16), torch.empty(16)
    with quick_interpreter():
        _kernel[(2,)](x, out, 16)
    assert torch.equal(out, 8 * x)
    # The launch patched what `_twice` needs as well; without this, each of 6 calls would do it again.
    names = [function.__name__ for function in patched]
    assert names.count("_kernel") == 1 and "_twice" not in names


def test_all_is_as_before_also_after_an_error():
    before, tracer, collecting = parts(), sys.gettrace(), gc.isenabled()
    with pytest.raises(ZeroDivisionError), quick_interpreter():
        assert parts() != before
        _kernel[(1,)](torch.ones(4), torch.empty(4), 4)
        raise ZeroDivisionError
    assert parts() == before and sys.gettrace() is tracer and gc.isenabled() == collecting


KINDS = tl.int1, tl.float32, tl.bfloat16, tl.float8e4nv, tl.pointer_type(tl.float16)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_numpy_calls_each_type_what_it_did(kind):
    kinds = kind, tl.block_type(kind, [4, 8])
    before = [interpreter._get_np_dtype(each) for each in kinds]
    with quick_interpreter():
        for _ in range(2):
            assert [interpreter._get_np_dtype(each) for each in kinds] == before


def described(tensor) -> tuple:
    """All that a kernel may ask a tensor for, but its data."""
    sizes = [size.value for size in tensor.shape]
    return sizes, tensor.numel.value, tensor.type, tensor.dtype, str(tensor.type), sorted(tensor.__dict__)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_tensors_are_what_they_were(kind):
    """Also where others of the same shape or type were made before."""
    shapes = [], [4], [8], [4, 8], [8, 4], [4, 8]

    def made() -> list:
        return [described(tl.tensor(None, tl.block_type(kind, shape) if shape else kind)) for shape in shapes]

    before = made()
    with quick_interpreter():
        for _ in range(2):
            assert made() == before


@triton.jit
def _broadcasts(X, Out, N: tl.constexpr, M: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(X + offs)
    square = x[:, None] * x[None, :] + x[None, :] + 1
    tl.store(Out + offs[:, None] * N + offs[None, :], tl.where(square > 0, square, x[:, None]))
    if M:
        tl.store(Out + offs, x + tl.zeros([M], tl.float32))


def test_broadcasting_is_as_it_was():
    x, out = torch.randn(8), torch.empty(8, 8)
    expected = x[:, None] * x + x + 1
    with quick_interpreter():
        _broadcasts[(1,)](x, out, 8, 0)
        assert torch.equal(out, torch.where(expected > 0, expected, x[:, None].expand(8, 8)))
        _broadcasts[(1,)](x, out, 8, 8)
        assert torch.equal(out[0], x)
        # Shapes that do not go together are refused as before, also once each is known.
        with pytest.raises(Exception, match="incompatible dimensions"):
            _broadcasts[(1,)](x, out, 8, 4)


def test_a_triton_without_these_parts_is_left_alone(monkeypatch):
    monkeypatch.delattr(interpreter, "_patch_lang")
    call = interpreter.GridExecutor.__call__
    with quick_interpreter():
        assert interpreter.GridExecutor.__call__ is call


@pytest.mark.parametrize("interpreted", [True, False])
def test_a_process_that_compiles_is_left_as_it_is(interpreted):
    """With real builders the shared parts of triton.language fail where the interpreter's stand in for them."""
    code = """
import triton.language as tl
from flashcore_kernels.runtime.interpreter import quick_interpreter
before = tl.tensor.__init__
with quick_interpreter():
    print(tl.tensor.__init__ is not before)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.split()[-1] == str(interpreted)
