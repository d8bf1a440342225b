"""Calls like one before, which skip checks and choice: what the host then hands to a GPU, caught before the launch.

No GPU is needed. tests/gpu/test_prepared.py sees what such launches compute.
"""

import gc
import weakref

import pytest
import torch
from flashcore_kernels import make_key_range, op, run
from flashcore_kernels.choose import choose
from flashcore_kernels.device import Device
from flashcore_kernels.dispatch import empty_outputs, make_launch, serve
from flashcore_kernels.hopper.prefill import choose as prefill_choose
from flashcore_kernels.problem import Inputs, check_problem, with_alignment
from flashcore_kernels.runtime import launch, prepared, workspace
from flashcore_kernels.runtime.workspace import Words

pytest.importorskip("triton")

from flashcore_kernels.portable.decode import flashcore_decode  # noqa: E402
from flashcore_kernels.portable.forward import flashcore_forward  # noqa: E402

H200 = Device("cuda", 90, triton=(3, 9))
A100 = Device("cuda", 80, triton=(3, 9))


def tensors_of(num_queries=1, num_keys=500, dtype=torch.bfloat16, batch_size=2):
    """query, key, value; key and value are views of larger buffers, as a cache's are."""
    query = torch.randn(batch_size, num_queries, 8, 64, dtype=dtype).transpose(1, 2)
    key, value = torch.randn(2, batch_size, 2, 640, 64, dtype=dtype)[:, :, :, :num_keys]
    return query, key, value


class FakeCompiled:
    """A compiled kernel that keeps what it was launched with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launches = []

    def run(self, *arguments):
        self.launches.append(arguments)


@pytest.fixture
def compiled(monkeypatch):
    fake = FakeCompiled()
    monkeypatch.setattr(prepared, "compiled_kernel", lambda *args: fake)
    monkeypatch.setattr(prepared, "_calls", {})
    monkeypatch.setattr(workspace, "_counters", Words(0, pool=1 << 20, least=1 << 12, most=1 << 31))
    monkeypatch.setattr(workspace, "_mailboxes", Words(-1, pool=1 << 20, least=1 << 12, most=1 << 31))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    return fake


def prepare(inputs, return_lse=False, device=A100):
    """What is asked, the Plan, and the function for calls like this one."""
    problem = with_alignment(check_problem(inputs), inputs)
    chosen = choose(problem, device)
    setup = make_launch(chosen, problem, inputs, empty_outputs(inputs.query, inputs.value, False)[0], return_lse)
    return problem, chosen, prepared.make_call(setup, problem, inputs, return_lse)


def full_launch(monkeypatch, problem, chosen, inputs, output, lse=None):
    """(kernel, grid, arguments, scalars, constants) of the long way, which are caught."""
    caught = []
    monkeypatch.setattr(launch, "launch", lambda *args, **options: caught.append(args))
    serve(chosen, problem, inputs, output.transpose(1, 2), lse)
    return caught.pop()


class TestPrepared:
    @pytest.mark.parametrize("return_lse", [False, True])
    def test_arguments_are_those_of_a_full_launch(self, compiled, monkeypatch, return_lse):
        sinks = torch.zeros(8)
        first, second = (Inputs(*tensors_of(), sinks=sinks) for _ in "ab")
        problem, chosen, call = prepare(first, return_lse)
        output, lse = call(second)
        assert output.shape == (2, 1, 8, 64) and output.is_contiguous()
        assert lse is None or lse.shape == (2, 8, 1) and lse.dtype == torch.float32
        (arguments,) = compiled.launches
        *programs, one, stream, function, metadata = arguments[:6]
        assert (one, stream, function, metadata) == (1, 77, "function", "metadata")
        assert arguments[6:9] == (None, None, None)
        pointers, rest = arguments[9:19], arguments[19:]
        addresses = [t.data_ptr() for t in (*second[:3], output)]
        assert list(pointers[:4]) == addresses and pointers[7] == sinks.data_ptr()
        assert pointers[4] == (lse.data_ptr() if return_lse else None) and pointers[5] is pointers[6] is None
        assert pointers[8] and pointers[9], "500 keys are several chunks: a workspace and counters"

        kernel, full_programs, full, scalars, constants = full_launch(monkeypatch, problem, chosen, second, output, lse)
        assert kernel is flashcore_decode and tuple(programs) == full_programs
        assert rest == (*full[10:], *scalars, *constants)

    @pytest.mark.parametrize("fp8", [False, True])
    def test_arguments_of_the_hopper_kernel(self, compiled, monkeypatch, fp8):
        pytest.importorskip("flashcore_kernels.hopper.decode.launch")
        first, second = (Inputs(*tensors_of()) for _ in "ab")
        scales = (None, None)
        if fp8:
            scales = (torch.ones(2, 2), torch.ones(2, 2))
            first, second = (
                Inputs(
                    query, key.to(torch.float8_e4m3fn), value.to(torch.float8_e4m3fn), key_scale=scales[0],
                    value_scale=scales[1],
                )
                for query, key, value, *_ in (first, second)
            )  # fmt: skip
        problem, chosen, call = prepare(first, device=H200)
        assert chosen.kernel == "flashcore_hopper_decode"
        output, _ = call(second)
        (arguments,) = compiled.launches
        programs, pointers, rest = arguments[:2], arguments[9:19], arguments[19:]
        assert pointers[:4] == tuple(t.data_ptr() for t in (*second[:3], output))
        assert pointers[4:9] == (None, None, None, *(None if t is None else t.data_ptr() for t in scales))
        assert pointers[9] == workspace._mailboxes.get(1, torch.device("cpu")).data_ptr(), (
            "partial sums have a place each"
        )

        kernel, full_programs, full, scalars, constants = full_launch(monkeypatch, problem, chosen, second, output)
        assert programs == full_programs and rest == (*full[10:], *scalars, *constants)
        assert len(full) + len(scalars) + len(constants) == len(kernel.arg_names)

    def test_a_call_in_one_chunk_has_no_workspace(self, compiled):
        inputs = Inputs(*tensors_of(num_keys=64))
        *_, call = prepare(inputs)
        call(inputs)
        assert compiled.launches[0][17:19] == (None, None)

    def test_a_launch_that_fails_takes_its_counters_with_it(self, compiled, monkeypatch):
        inputs = Inputs(*tensors_of())
        *_, call = prepare(inputs)
        call(inputs)
        (before,) = workspace._counters._buffers.values()
        monkeypatch.setattr(compiled, "launches", None)
        with pytest.raises(AttributeError):
            call(inputs)
        assert not workspace._counters._buffers
        monkeypatch.setattr(compiled, "launches", [])
        call(inputs)
        (after,) = workspace._counters._buffers.values()
        assert before.data_ptr() != after.data_ptr()

    def test_nothing_is_prepared_where_no_launch_was_made(self):
        assert prepare(Inputs(*tensors_of()))[2] is None

    def test_the_oldest_are_forgotten(self, monkeypatch):
        monkeypatch.setattr(prepared, "_calls", {"another": print})
        monkeypatch.setattr(prepared, "MOST", 1)
        prepared.remember("a call", "its kernel", min)
        assert prepared._calls == {"a call": ("its kernel", min)}


class OnAGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


class TestSignature:
    @pytest.fixture(autouse=True)
    def on_a_gpu(self, monkeypatch):
        """Tensors that say they are on the current GPU, and are plain all the same."""
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)

    def signature(self, *tensors, options=(), **more):
        return prepared.find(Inputs(*tensors, **more), options)[0]

    def test_equal_calls_have_equal_signatures(self):
        assert self.signature(*tensors_of()) == self.signature(*tensors_of()) is not None

    def test_whatever_decides_is_in_it(self):
        query, key, value = tensors_of()
        off = torch.empty(key.numel() + 1, dtype=key.dtype)[1:].view(key.shape)
        others = [
            tensors_of(num_keys=499), tensors_of(num_queries=2), tensors_of(dtype=torch.float16),
            tensors_of(batch_size=3), (query, key.contiguous(), value), (query, off, value),
        ]  # fmt: skip
        all_of_them = [self.signature(*tensors) for tensors in [(query, key, value), *others]]
        all_of_them.append(self.signature(query, key, value, sinks=torch.zeros(8)))
        all_of_them.append(self.signature(query, key, value, key_range=torch.zeros(2, 6, dtype=torch.int32)))
        all_of_them.append(self.signature(query, key, value, key_scale=torch.ones(2, 2)))
        all_of_them.append(self.signature(query, key, value, value_scale=torch.ones(2, 2)))
        all_of_them.append(self.signature(query, key, value, options=(True, None)))
        assert None not in all_of_them and len(set(all_of_them)) == len(all_of_them)

    def test_what_decides_of_a_mask_is_in_it(self):
        """Its storage too: behind a row's last key a kernel reads on, where there is memory."""
        tensors = tensors_of(num_queries=100)
        roomy = torch.zeros(2, 1, 101, 512, dtype=torch.bool)
        masks = [
            None, roomy[:, :, :100, :500], roomy[:1, :, :100, :500], roomy[:, :, :100, :500].float(),
            roomy[:, :, 1:, :500], roomy[:, :, :1, :500].expand(2, 1, 100, 500), roomy[:, :, :1, :500],
            torch.zeros(2 * 101 * 512 - 12, dtype=torch.bool).as_strided((2, 1, 100, 500), (101 * 512, 1, 512, 1)),
            torch.zeros(2 * 101 * 512 + 1, dtype=torch.bool)[1:].view(2, 1, 101, 512)[:, :, :100, :500],
        ]  # fmt: skip
        signatures = [self.signature(*tensors, mask=mask) for mask in masks]
        assert None not in signatures and len(set(signatures)) == len(masks)
        assert self.signature(*tensors, mask=roomy.clone()[:, :, :100, :500]) == signatures[1]

    def test_what_must_not_be_taken_for_another(self):
        query, key, value = tensors_of()
        assert self.signature(query.as_subclass(OnAGpu), key, value) is None, "a subclass may want the dispatcher"
        assert self.signature(query.float().requires_grad_(), key, value) is None
        assert self.signature(query, key, value, mask=torch.ones(500).as_subclass(OnAGpu)) is None
        for name in ("sinks", "key_scale", "value_scale", "mask"):
            learned = torch.ones(8, requires_grad=True)
            assert self.signature(query, key, value, **{name: learned}) is None, "its gradient would be lost"
        assert self.signature(query, "no tensor", value) is None
        assert self.signature(query, key, value, options=([1, 2],)) is None, "not hashable; the checks name it"
        with torch.no_grad():
            assert self.signature(query.float().requires_grad_(), key, value) is not None


class TestServedAgain:
    """Prefill calls like one before."""

    @pytest.fixture
    def launches(self, compiled, monkeypatch):
        """What would be launched the long way, on tensors that say they are on a Hopper GPU; it compiles the kernel."""
        pytest.importorskip("flashcore_kernels.hopper.prefill.launch")
        monkeypatch.setattr(prefill_choose, "short_row_for", lambda *sizes, **features: None)  # which takes no counter
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU's device
        for module in (op, run):
            monkeypatch.setattr(module, "device_of", lambda device: H200)
        monkeypatch.setattr(prepared, "compiled_kernel", launch.compiled_kernel)
        monkeypatch.setattr(launch, "_compiled", {})
        caught = []

        def long_launch(kernel, programs, arguments, scalars, constants, *, num_warps, num_stages, **options):
            caught.append((kernel, programs, arguments, scalars, constants))
            launch._compiled[launch._key(kernel, arguments, constants, num_warps, num_stages)] = compiled

        monkeypatch.setattr(launch, "launch", long_launch)
        return caught

    @pytest.mark.parametrize("return_lse", [False, True])
    @pytest.mark.parametrize("with_range", [False, True])
    @pytest.mark.parametrize("triton", [(3, 6), (3, 9)])
    def test_without_checks_and_with_the_same_launch(
        self, launches, compiled, monkeypatch, triton, return_lse, with_range
    ):
        for module in (op, run):
            monkeypatch.setattr(module, "device_of", lambda device: H200._replace(triton=triton))
        first, second = tensors_of(num_queries=100), tensors_of(num_queries=100)
        options = {"sinks": torch.zeros(8), "return_lse": return_lse, "is_causal": True, "window": 70}
        if with_range:
            options |= {"is_causal": False, "window": None, "key_range": make_key_range(2, 500, right=0)}
        op.attention(*first, **options)
        monkeypatch.setattr(op, "check_problem", None)
        monkeypatch.setattr(op, "choose", None)
        op.path_counts.clear()
        answer = op.attention(*second, **options)
        output, lse = answer if return_lse else (answer, None)
        assert dict(op.path_counts) == {"flashcore_hopper": 1}
        assert output.shape == (2, 8, 100, 64) and output.transpose(1, 2).is_contiguous()
        assert lse is None or (lse.shape, lse.dtype) == ((2, 8, 100), torch.float32)
        ((kernel, long_programs, long, scalars, constants),) = launches
        (arguments,) = compiled.launches
        *programs, one, stream, function, metadata = arguments[:6]
        assert (one, stream, function, metadata) == (1, 77, "function", "metadata")
        assert tuple(programs) == long_programs and programs[1] == 1
        assert arguments[6:9] == (None, None, None)
        operands, rest = arguments[9 : 9 + len(long)], arguments[9 + len(long) :]
        descriptors, pointers = operands[:8], operands[8:13]
        assert set(operands[13:]) == {None}, "those of a dense mask"
        assert rest == (*scalars, *constants)
        assert len(arguments) - 9 == len(kernel.arg_names)
        one_copy = triton == (3, 6) and not with_range
        assert (descriptors[6] is None) == one_copy
        described = second if one_copy else (*second, output)
        for descriptor, before, tensor in zip(descriptors[::2], long[::2], described):
            assert type(descriptor) is type(before) and descriptor.base.data_ptr() == tensor.data_ptr()
            assert {**vars(descriptor), "base": None} == {**vars(before), "base": None}
            assert descriptor.strides == list(tensor.stride())
        assert descriptors[1::2] == (None,) * 4
        given = (lse, options.get("key_range"), options["sinks"], output if one_copy else None, long[12])
        assert pointers == tuple(None if t is None else t.data_ptr() for t in given)

    @pytest.mark.parametrize("kind", ["bool", "bias", "bias of a row", "float64", "rows that must be copied"])
    @pytest.mark.parametrize("arch", [90, 80])
    def test_a_dense_mask(self, launches, compiled, monkeypatch, kind, arch):
        """Both launches of it are made again, on another call's mask, whose copy is made where one is needed."""
        for module in (op, run):
            monkeypatch.setattr(module, "device_of", lambda device: H200._replace(arch=arch))
        shape = {"bias of a row": (2, 8, 1, 512), "rows that must be copied": (2, 1, 100, 503)}.get(
            kind, (2, 8, 100, 512)
        )
        dtype = {"bool": torch.bool, "float64": torch.float64}.get(kind, torch.bfloat16)
        num_keys = shape[3]
        calls = [(tensors_of(num_queries=100, num_keys=num_keys), torch.zeros(shape).to(dtype)) for _ in "ab"]
        (first, first_mask), (second, second_mask) = calls
        op.attention(*first, mask=first_mask)
        monkeypatch.setattr(op, "check_problem", None)
        op.attention(*second, mask=second_mask)
        number = 2 if arch == 90 else 1  # its map is made before
        assert len(launches) == len(compiled.launches) == number
        for (kernel, programs, long, scalars, constants), arguments in zip(launches, compiled.launches, strict=True):
            assert arguments[:2] == ((*programs, 1)[:2] if isinstance(programs, tuple) else (programs, 1))
            operands, rest = arguments[9 : 9 + len(long)], arguments[9 + len(long) :]
            assert rest == (*scalars, *constants) and len(arguments) - 9 == len(kernel.arg_names)
            for before, now in zip(long, operands):
                tensor = getattr(before, "base", before)
                if not isinstance(tensor, torch.Tensor):
                    assert now == before, "a number, or nothing"
                elif tensor is not before:
                    assert {**vars(before), "base": None} == {**vars(now), "base": None}
            addresses = [now.base.data_ptr() if hasattr(now, "base") else now for now in operands]
            befores = [getattr(before, "base", before) for before in long]
            copied = arch == 90 and kind in ("float64", "rows that must be copied")
            for before, address in zip(befores, addresses):
                if isinstance(before, torch.Tensor) and before.data_ptr() == first_mask.data_ptr():
                    assert not copied and address == second_mask.data_ptr()
                if isinstance(before, torch.Tensor) and before.data_ptr() == first[0].data_ptr():
                    assert address == second[0].data_ptr()
            assert copied or second_mask.data_ptr() in addresses or kernel is not launches[0][0]
            assert first_mask.data_ptr() not in addresses
        if arch == 90:
            lines, bits = compiled.launches[0][10:12]
            assert compiled.launches[1][9 + 15 : 9 + 17] == (lines, bits), (
                "the map that was made is the one that is read"
            )

    def test_a_launch_that_fails_takes_its_counter_with_it(self, launches, compiled, monkeypatch):
        call = tensors_of(num_queries=100)
        op.attention(*call)
        (before,) = workspace._counters._buffers.values()
        monkeypatch.setattr(compiled, "launches", None)
        with pytest.raises(AttributeError):
            op.attention(*call)
        assert not workspace._counters._buffers
        monkeypatch.setattr(compiled, "launches", [])
        op.attention(*call)
        (after,) = workspace._counters._buffers.values()
        assert before.data_ptr() != after.data_ptr() == compiled.launches[0][21]

        def fail(*args, **options):
            raise RuntimeError("no such launch")

        monkeypatch.setattr(launch, "launch", fail)
        with pytest.raises(RuntimeError, match="no such launch"):
            op.attention(*tensors_of(num_queries=100, dtype=torch.float16))
        assert not workspace._counters._buffers, "the long way"

    def test_rows_in_two_pieces(self, launches, compiled):
        """Each piece of a head_dim that is no power of two has its own tiles."""
        first, second = ([torch.randn(1, 4, 100, size, dtype=torch.float16) for size in (192, 192, 128)] for _ in "ab")
        op.attention(*first)
        op.attention(*second)
        descriptors = compiled.launches[0][9:17]
        assert [d and d.block_shape for d in descriptors] == [d and d.block_shape for d in launches[0][2][:8]]
        assert descriptors[1].base is second[0] and descriptors[3].base is second[1]

    def test_threads_do_not_share_descriptors(self, launches, compiled):
        calls = [tensors_of(num_queries=100) for _ in range(3)]
        for call in calls:
            op.attention(*call)
        _, second, third = (launches[0][2], *(each[9:17] for each in compiled.launches))
        assert second[0] is not third[0] and second[0].base is calls[1][0] and third[0].base is calls[2][0]

    def test_no_tensor_is_kept(self, launches, compiled):
        first = tensors_of(num_queries=100)
        kept = [weakref.ref(tensor) for tensor in first]
        op.attention(*first)
        launches.clear()
        assert len(prepared._calls) == 1
        del first
        gc.collect()
        assert [ref() for ref in kept] == [None] * 3

    @pytest.mark.parametrize("num_queries", [1, 100])
    def test_a_first_call_is_checked_and_chosen_for_once(self, launches, compiled, monkeypatch, num_queries):
        """And one like it not at all. It was twice: before the operator, and within."""
        asked = []

        def counted(name):
            function = getattr(op, name)
            monkeypatch.setattr(op, name, lambda *args, **options: asked.append(name) or function(*args, **options))

        counted("check_problem"), counted("choose")
        op.attention(*tensors_of(num_queries), is_causal=True)
        assert asked == ["check_problem", "choose"] and len(launches) == 1
        op.attention(*tensors_of(num_queries), is_causal=True)
        assert asked == ["check_problem", "choose"] and len(compiled.launches) == 1
        op.attention(*tensors_of(num_queries, num_keys=499), is_causal=True)
        assert asked == ["check_problem", "choose"] * 2, "negative control: another kind of call is counted"
        assert len(launches) == 1 and len(compiled.launches) == 2, "though its kernel is there"

    def test_what_differs_is_checked_and_planned_anew(self, launches, compiled, monkeypatch):
        """Never a launch with the descriptors of another shape, stride, dtype, alignment or option."""
        query, key, value = tensors_of(num_queries=100)
        op.attention(query, key, value, is_causal=True)
        with pytest.raises(ValueError, match="window"):
            op.attention(query, key, value, is_causal=True, window=0)
        different = [
            tensors_of(num_queries=101), tensors_of(num_queries=100, num_keys=499),
            tensors_of(num_queries=100, batch_size=3), tensors_of(num_queries=100, dtype=torch.float16),
            (query.contiguous(), key, value), (query, key.contiguous(), value), (query, key, value.contiguous()),
        ]  # fmt: skip
        for each in different:
            op.attention(*each, is_causal=True)
        op.attention(query, key, value)
        assert len(launches) == 2, "float16 is another kernel; the others are launched the short way at once"
        assert len(launches) + len(compiled.launches) == len(different) + 2 == len(prepared._calls)
        others = [each for each in (*different, (query, key, value)) if each[0].dtype == torch.bfloat16]
        for tensors, arguments in zip(others, compiled.launches, strict=True):
            for tensor, descriptor in zip(tensors, arguments[9:15:2]):
                assert (descriptor.shape, descriptor.strides) == (list(tensor.shape), list(tensor.stride()))
                assert descriptor.base is tensor
        # `right`, the seventh number behind the operands.
        place = 9 + len(launches[0][2]) + 6
        rights = [arguments[place] for arguments in compiled.launches]
        assert rights == [0] * (len(others) - 1) + [-1], "causal and not"
        compiled.launches.clear()

        launches.clear()
        buffer = torch.empty(2, 2, 640 * 64 + 8, dtype=key.dtype).flatten()
        off = buffer[1 : 1 + 2 * 2 * 640 * 64].view(2, 2, 640, 64)[:, :, :500]
        assert off.stride() == key.stride() and off.data_ptr() % 16
        op.attention(query, off, value, is_causal=True)
        ((kernel, *_),) = launches
        assert kernel is flashcore_forward and not compiled.launches, "the copy engine needs multiples of 16 bytes"
        op.attention(query, key, value, is_causal=True)
        assert len(compiled.launches) == 1
