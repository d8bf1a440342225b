"""The operator as torch sees it: opcheck, fakes, torch.compile, fallbacks and their warnings, gradients, counters."""

import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from flashcore_kernels import FlashcoreFallbackWarning, attention, make_key_range, naive_attention, path_counts, run
from flashcore_kernels.device import Device
from flashcore_kernels.fallback import forget_warnings, torch_attention
from flashcore_kernels.problem import check_problem, split_arguments
from flashcore_kernels.runtime import launch, workspace
from flashcore_kernels.runtime.workspace import Words
from torch._dynamo.testing import CompileCounter

from .reference import build, check

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def operator_arguments(call):
    a = call.arguments
    causal, window = a.get("is_causal", False), a.get("window")
    return (
        call.query, call.key, call.value, a.get("key_range"), a.get("mask"), a.get("sinks"),
        -1 if window is None else window - 1, 0 if causal else -1, 0.2, a.get("softcap", 0.0),
        a.get("return_lse", False),
    )  # fmt: skip


CALLS = [
    ("causal",),
    ("causal", "lse"),
    ("value-dim", "lse"),
    ("left-padding", "sinks", "softcap"),
    ("rows",),
    ("float-mask",),
    ("bool-mask", "strides"),
]


@pytest.mark.parametrize("features", CALLS, ids="+".join)
@pytest.mark.parametrize("num_queries", [1, 33])
class TestOperator:
    def test_opcheck(self, num_queries, features, device):
        call = build(features, num_queries, 33, device=device)
        torch.library.opcheck(torch.ops.flashcore.attention, operator_arguments(call))

    @pytest.mark.filterwarnings("ignore::flashcore_kernels.FlashcoreFallbackWarning")
    def test_opcheck_with_gradients(self, num_queries, features, device):
        call = build(features, num_queries, 33, device=device)
        leaves = (tensor.detach().requires_grad_() for tensor in call[:3])
        torch.library.opcheck(torch.ops.flashcore.attention, (*leaves, *operator_arguments(call)[3:]))

    def test_fake_has_the_real_ones_shape_strides_and_dtype(self, num_queries, features, device):
        from torch._subclasses.fake_tensor import FakeTensorMode

        call = build(features, num_queries, 33, device=device)
        real = torch.ops.flashcore.attention(*operator_arguments(call))
        with FakeTensorMode() as mode:
            arguments = (mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in operator_arguments(call))
            faked = torch.ops.flashcore.attention(*arguments)
        for one, other in zip(real, faked):
            assert one.shape == other.shape and one.stride() == other.stride()
            assert one.dtype == other.dtype and one.device == other.device


def test_output_lies_as_the_next_projection_wants_it(device):
    call = build({"causal"}, 17, 17, device=device)
    assert call.run().transpose(1, 2).is_contiguous()


def test_inner_stride_other_than_one_is_copied(device):
    call = build({"causal"}, 17, 17, device=device)
    turned = call._replace(**{n: getattr(call, n).mT.contiguous().mT for n in ("query", "key", "value")})
    assert turned.query.stride(3) != 1
    assert torch.equal(turned.run(), call.run())


BACKENDS = ("CPU", "CUDA", "MPS", "XPU", "HPU", "XLA", "IPU", "PrivateUse1", "Meta")


class TestDevices:
    """Where no kernel of ours runs, PyTorch computes the same: on every device that it has."""

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_every_backend_has_a_kernel(self, backend):
        has = torch._C._dispatch_has_computed_kernel_for_dispatch_key
        assert has("flashcore::attention", backend)
        assert has("flashcore::attention", f"Autograd{backend}")
        assert not has("flashcore::write_kv", "MPS"), "negative control: an operator of which CPU and CUDA have kernels"

    @pytest.mark.parametrize("return_lse", [False, True])
    @pytest.mark.parametrize("with_range", [False, True])
    def test_shapes_alone(self, with_range, return_lse):
        query, key, value = (
            torch.empty(size, dtype=torch.bfloat16, device="meta")
            for size in ((2, 4, 5, 64), (2, 2, 9, 64), (2, 2, 9, 32))
        )
        key_range = make_key_range(2, 9, right=0, device="meta") if with_range else None
        answer = attention(query, key, value, key_range=key_range, return_lse=return_lse)
        output = answer[0] if return_lse else answer
        assert (output.shape, output.dtype, output.is_meta) == ((2, 4, 5, 32), torch.bfloat16, True)
        assert not return_lse or (answer[1].shape, answer[1].dtype) == ((2, 4, 5), torch.float32)

    @pytest.mark.filterwarnings("ignore::flashcore_kernels.FlashcoreFallbackWarning")
    def test_the_answer_of_a_device_without_kernels(self, device, monkeypatch):
        call = build({"causal", "sinks"}, 5, 9, dtype=torch.float32, device=device)
        want = call.run()
        monkeypatch.setattr(run, "device_of", lambda device: Device("torch", reason="it is another"))
        path_counts.clear()
        torch.testing.assert_close(call.run(), want)
        assert dict(path_counts) == {"torch": 1}


class TestCompile:
    @pytest.mark.filterwarnings("ignore::flashcore_kernels.FlashcoreFallbackWarning")
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_training_compiles_once(self, backend, device):
        """Counting a call that was traced made a new graph for each one, and the ninth failed."""
        call = build({"causal"}, 17, 17, dtype=torch.float32, device=device)
        leaf = call.query.clone().requires_grad_()
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        step = torch.compile(
            lambda q: attention(q * 1.0, *call[1:3], is_causal=True) * 2.0, fullgraph=True, backend=backend
        )
        path_counts.clear()
        for _ in range(10):
            leaf.grad = None
            step(leaf).sum().backward()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert path_counts == {"flashcore_forward": 10, "flashcore_backward": 10}
        want = call.query.clone().requires_grad_()
        (attention(want * 1.0, *call[1:3], is_causal=True) * 2.0).sum().backward()
        torch.testing.assert_close(leaf.grad, want.grad)

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_fullgraph(self, backend, device):
        call = build({"causal", "sinks"}, 17, 33, device=device)
        sinks = call.arguments["sinks"]

        def layer(query, key, value):
            return attention(query * 1.0, key, value, is_causal=True, sinks=sinks) * 2.0

        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        assert torch.equal(compiled(*call[:3]), layer(*call[:3]))

    def test_growing_keys_compile_at_most_twice(self, device):
        """The first length is taken for a constant, the second makes it a symbol, and that serves all others."""
        torch._dynamo.reset()
        counter = CompileCounter()

        @torch.compile(fullgraph=True, backend=counter)
        def step(query, key, value):
            return attention(query, key, value, is_causal=True)

        query, key = torch.randn(1, 4, 1, 16, device=device), torch.randn(1, 2, 64, 16, device=device)
        for length in range(20, 52):
            step(query, key[:, :, :length].clone(), key[:, :, :length].clone())
        assert counter.frame_count <= 2

    def test_static_cache_never_compiles_again(self, device):
        """The lengths stand in the KeyRange, on the device: 64 steps, one graph."""
        torch._dynamo.reset()
        counter = CompileCounter()

        @torch.compile(fullgraph=True, backend=counter)
        def step(query, key, value, position):
            return attention(
                query, key, value, key_range=make_key_range(1, 80, end=position + 1, query_start=position, right=0)
            )

        query, key = torch.randn(1, 4, 1, 16, device=device), torch.randn(1, 2, 80, 16, device=device)
        for position in range(64):
            at = torch.tensor([position], device=device)
            output = step(query, key, key, at)
            want = attention(query, key[:, :, : position + 1], key[:, :, : position + 1])
            assert torch.equal(output, want)
        assert counter.frame_count == 1


class TestFallback:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch):
        forget_warnings()
        monkeypatch.delenv("FLASHCORE_STRICT", raising=False)
        path_counts.clear()

    def test_warns_once_for_each_reason(self, device):
        double = build({"causal"}, 5, 9, dtype=torch.float64, device=device)
        wide = build({"causal"}, 5, 9, head_dim=600, device=device)
        with pytest.warns(FlashcoreFallbackWarning, match="not torch.float64"):
            double.run()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            double.run()
        with pytest.warns(FlashcoreFallbackWarning, match="head_dim up to 512, not 600"):
            wide.run()
        assert dict(path_counts) == {"torch": 3}

    @pytest.mark.parametrize("strict", ["1", "yes"])
    def test_strict_makes_it_an_error(self, strict, device, monkeypatch):
        monkeypatch.setenv("FLASHCORE_STRICT", strict)
        with pytest.raises(NotImplementedError, match="not torch.float64.*FLASHCORE_STRICT"):
            build({"causal"}, 5, 9, dtype=torch.float64, device=device).run()

    @pytest.mark.parametrize("strict", ["0", ""])
    def test_strict_off(self, strict, device, monkeypatch):
        monkeypatch.setenv("FLASHCORE_STRICT", strict)
        with pytest.warns(FlashcoreFallbackWarning):
            build({"causal"}, 5, 9, dtype=torch.float64, device=device).run()

    def test_strict_does_not_touch_what_the_kernels_serve(self, device, monkeypatch):
        monkeypatch.setenv("FLASHCORE_STRICT", "1")
        check(build({"causal"}, 5, 9, device=device))

    @pytest.mark.filterwarnings("ignore::flashcore_kernels.FlashcoreFallbackWarning")
    @pytest.mark.parametrize("features", [*CALLS, ("holes",), ("float-mask", "left-padding", "causal")], ids="+".join)
    def test_answers_are_the_same(self, features, device):
        """Through SDPA or naive, with NaN wherever nobody looks."""
        call = build(features, 5, 33, dtype=torch.float64, device=device)
        answer = call.run()
        want = naive_attention(*call[:3], **{n: a for n, a in call.arguments.items() if n != "return_lse"})
        if not call.arguments.get("return_lse"):
            answer, want = (answer,), want[:1]
        torch.testing.assert_close(answer, want, atol=1e-10, rtol=1e-10)
        assert path_counts["torch"] == 1


class TestDropout:
    """The fallback's, whatever the call has besides; tests/hf/test_dropout.py looks at what it drops."""

    @pytest.mark.parametrize("feature", [None, "softcap", "sinks", "value-dim", "lse"])
    def test_drops(self, feature, device):
        call = build({feature} - {None}, 33, 33, device=device)
        arguments = {name: argument for name, argument in call.arguments.items() if name != "return_lse"}
        inputs, options = split_arguments(*call[:3], **arguments)
        problem = check_problem(inputs, **options)
        whole, lse = torch_attention(problem, inputs, feature == "lse")
        dropped, other_lse = torch_attention(problem._replace(dropout=0.5), inputs, feature == "lse")
        assert not torch.equal(dropped, whole)
        assert feature != "lse" or torch.equal(lse, other_lse)


@pytest.mark.filterwarnings("ignore::flashcore_kernels.FlashcoreFallbackWarning")
class TestGradients:
    @pytest.mark.parametrize("features", [*CALLS, ("holes",), ("window", "causal"), ("gqa-7to1",)], ids="+".join)
    def test_equal_those_of_naive(self, features, device):
        call = build(features, 5, 17, dtype=torch.float64, device=device)
        arguments = {n: a for n, a in call.arguments.items() if n != "return_lse"}
        gradients = []
        for function in (lambda *t, **a: attention(*t, **a), lambda *t, **a: naive_attention(*t, **a)[0]):
            leaves = [t.detach().clone().requires_grad_() for t in call[:3]]
            extra = dict(arguments)
            if "sinks" in extra:
                extra["sinks"] = arguments["sinks"].double().detach().clone().requires_grad_()
                leaves.append(extra["sinks"])
            weight = torch.randn(2, 4 if "gqa-7to1" not in features else 7, 5, call.value.shape[3], dtype=torch.float64,
                                 generator=torch.Generator().manual_seed(1)).to(device)  # fmt: skip
            (function(*leaves[:3], **extra) * weight).sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
        for mine, naive in zip(*gradients):
            assert torch.isfinite(mine).all()
            torch.testing.assert_close(mine, naive, atol=1e-9, rtol=1e-9)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_asked_for_in_any_dtype(self, dtype, device):
        call = build({"causal"}, 5, 9, dtype=DTYPES[dtype], device=device)
        path_counts.clear()
        call.query.requires_grad_()
        call.run().sum().backward()
        assert torch.isfinite(call.query.grad).all()
        assert dict(path_counts) == {"flashcore_decode": 1, "flashcore_backward": 1}

    def test_not_under_no_grad(self, device):
        call = build({"causal"}, 5, 9, device=device)
        call.query.requires_grad_()
        path_counts.clear()
        with torch.no_grad():
            call.run()
        assert path_counts["torch"] == 0

    def test_of_a_learned_mask(self, device):
        call = build({"float-mask"}, 5, 9, dtype=torch.float64, device=device)
        mask = call.arguments["mask"].clone().requires_grad_()
        call.run(mask=mask).sum().backward()
        assert torch.isfinite(mask.grad).all()

    def test_rows_without_a_key_have_none(self, device):
        call = build((), 5, 9, dtype=torch.float64, device=device)
        call.query.requires_grad_()
        call.run(key_range=make_key_range(2, 9, end=0).to(device)).sum().backward()
        assert not call.query.grad.any()


class TestCounters:
    """The merge's counters are zero between launches, and one that fails takes its own with it."""

    def split_call(self, device):
        return build({"causal"}, 1, 1000, device=device)

    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch):
        monkeypatch.setattr(workspace, "_counters", Words(0, pool=1 << 20, least=1 << 12, most=1 << 31))

    def test_left_at_zero(self, device):
        check(self.split_call(device))
        (buffer,) = workspace._counters._buffers.values()
        assert not buffer.any()

    def test_one_buffer_serves_all_launches(self, device):
        check(self.split_call(device))
        (before,) = workspace._counters._buffers.values()
        check(self.split_call(device))
        (after,) = workspace._counters._buffers.values()
        assert before is after

    def test_a_larger_launch_has_a_larger_buffer(self, device):
        small = workspace._counters.get(1, device)
        large = workspace._counters.get(small.numel() + 1, device)
        assert large.numel() > small.numel() and not large.any()

    def test_an_aborted_launch_poisons_nothing(self, device, monkeypatch):
        def abort(*_, **__):
            (buffer,) = workspace._counters._buffers.values()
            buffer.fill_(3)  # as programs that were cut off would leave it
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(launch, "launch", abort)
            with pytest.raises(KeyboardInterrupt):
                self.split_call(device).run()
        check(self.split_call(device))

    def test_poisoned_counters_would_show(self, device, poisoned_empty):
        """Negative control: with counts left behind the merge happens too early, or never.

        Poisoned, for in the first run's memory a merge that comes too early would find that run's numbers.
        """
        call = self.split_call(device)
        right = call.run()
        (buffer,) = workspace._counters._buffers.values()
        buffer.fill_(1)
        assert not torch.equal(call.run(), right)

    def test_no_two_buffers_overlap(self):
        own, cpu = Words(0, pool=1 << 20, least=16, most=1 << 31), torch.device("cpu")
        taken = [own._take(n, cpu, (None, n, 0)) for n in (10, 4096, 1)]
        for number, buffer in enumerate(taken, 1):
            buffer.fill_(number)
        assert [buffer.unique().tolist() for buffer in taken] == [[1], [2], [3]]

    def test_threads_do_not_share(self, device):
        import threading

        mine, theirs = workspace._counters.get(1, torch.device("cpu")), []
        thread = threading.Thread(target=lambda: theirs.append(workspace._counters.get(1, torch.device("cpu"))))
        thread.start()
        thread.join()
        assert theirs[0] is not mine


def python(code: str, **environment) -> subprocess.CompletedProcess:
    environment = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **environment}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment, timeout=300
    )


WITHOUT_TRITON = """
    import sys
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name == "triton" or name.startswith("triton."):
                raise ImportError("triton is blocked")
    sys.meta_path.insert(0, Refuse())
    import torch, warnings
    import flashcore_kernels as fk
    query, key = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 9, 16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = fk.attention(query, key, key, is_causal=True)
        fk.attention_with_kv_cache(query, key[:, :, :5], key[:, :, :5])
    assert len(caught) == 1 and "Triton cannot be imported (triton is blocked)" in str(caught[0].message), caught
    torch.testing.assert_close(output, fk.naive_attention(query, key, key, is_causal=True)[0])
    assert fk.path_counts == {"torch": 2}, fk.path_counts
    print("fine")
"""


def test_cpu_tensors_without_triton_work():
    result = python(WITHOUT_TRITON)
    assert result.stdout == "fine\n", result.stderr


def test_cpu_tensors_without_the_interpreter_work():
    """Triton is there, but compiles: nothing of it runs on the CPU. Nor does anything of Transformers."""
    result = python("""
        import sys, torch, warnings
        import flashcore_kernels as fk
        import flashcore_kernels.portable.decode, flashcore_kernels.portable.forward
        assert "transformers" not in sys.modules
        query = torch.randn(1, 4, 5, 16)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output = fk.attention(query, query, query)
        assert "the tensors are on 'cpu'" in str(caught[0].message), caught
        torch.testing.assert_close(output, fk.naive_attention(query, query, query)[0])
        print("fine")
    """)
    assert result.stdout == "fine\n", result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
@pytest.mark.parametrize(
    "triton_version, numpy_version, kind",
    [("3.6.0", "2.4.6", "torch"), ("3.6.0", "2.3.5", "interpreter"), ("3.7.1", "2.4.6", "interpreter")],
)
def test_an_interpreter_that_this_numpy_breaks_is_not_used(triton_version, numpy_version, kind, monkeypatch):
    monkeypatch.setattr("triton.__version__", triton_version)
    monkeypatch.setattr("numpy.__version__", numpy_version)
    found = run.device_of.__wrapped__(torch.device("cpu"))
    assert found.kind == kind
    assert ("needs NumPy before 2.4; here are Triton 3.6.0 and NumPy 2.4.6" in found.reason) is (kind == "torch")
