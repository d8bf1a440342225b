"""Which kernel serves a call: a pure function of the problem and the device, one test a rule."""

import itertools

import pytest
import torch
from flashcore_kernels import explain
from flashcore_kernels.choose import (
    MAX_HEAD_DIM,
    backward_fallback_reason,
    choose,
    choose_backward,
    fallback_reason,
)
from flashcore_kernels.device import Device
from flashcore_kernels.hopper.backward.choose import choose_hopper_backward
from flashcore_kernels.hopper.prefill.table import ROWS as HOPPER_ROWS
from flashcore_kernels.plan import MAX_DECODE_QUERIES
from flashcore_kernels.problem import Inputs, check_problem, with_alignment

H200 = Device("cuda", 90)
NEW = Device("cuda", 90, triton=(3, 5))  # which has the Gluon kernels
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def problem(num_queries=64, num_keys=64, *, heads=(4, 2), head_dim=64, value_dim=None, dtype=torch.float16, **changed):
    """A Problem of these shapes, without the tensors' memory."""
    sizes = (
        (heads[0], num_queries, head_dim),
        (heads[1], num_keys, head_dim),
        (heads[1], num_keys, value_dim or head_dim),
    )
    tensors = (torch.empty(2, *size, dtype=dtype, device="meta") for size in sizes)
    return check_problem(Inputs(*tensors))._replace(**changed)


def chosen_for(num_queries: int, device: Device, **changed):
    """The plan for aligned tensors; `changed` are sizes and dtype, and fields of the Problem."""
    changed = {"aligned": True, **changed}
    shape = {name: changed.pop(name) for name in ("head_dim", "value_dim", "dtype", "heads") if name in changed}
    return choose(problem(num_queries, **shape)._replace(**changed), device)


class TestWhichKernel:
    @pytest.mark.parametrize("num_queries", [1, 2, MAX_DECODE_QUERIES])
    def test_few_queries_decode(self, num_queries):
        assert choose(problem(num_queries), H200).kernel == "flashcore_decode"

    @pytest.mark.parametrize("num_queries", [MAX_DECODE_QUERIES + 1, 4096])
    def test_more_queries_prefill(self, num_queries):
        assert choose(problem(num_queries), H200).kernel == "flashcore_forward"

    def test_a_range_for_each_query_prefills(self):
        assert choose(problem(1, range_layout="rows"), H200).kernel == "flashcore_forward"
        assert choose(problem(1, range_layout="sequence"), H200).kernel == "flashcore_decode"

    def test_the_reason_says_the_rule(self):
        assert "1 query tokens, at most 16" in choose(problem(1), H200).reason
        assert "64 query tokens, more than 16" in choose(problem(64), H200).reason


class TestAlignment:
    """16 bytes is what the copy engine counts in."""

    def aligned(self, *tensors):
        """Of query, key and value, or of each of them alone beside two that are."""
        if len(tensors) == 3:
            return with_alignment(problem(), Inputs(*tensors)).aligned
        good = torch.empty(1, 1, 1, 16, dtype=torch.float16)
        places = [[good] * place + [*tensors] + [good] * (2 - place) for place in range(3)]
        (answer,) = {with_alignment(problem(), Inputs(*place)).aligned for place in places}
        return answer

    def test_contiguous(self):
        tensor = torch.empty(2, 3, 5, 40, dtype=torch.float16)
        assert self.aligned(tensor, tensor.transpose(1, 2), tensor)

    def test_a_row_of_20_values(self):
        assert not self.aligned(torch.empty(2, 3, 5, 20, dtype=torch.float16))
        assert self.aligned(torch.empty(2, 1, 1, 40, dtype=torch.float16)[:, :, :, :20])

    def test_an_odd_address(self):
        assert not self.aligned(torch.empty(64, dtype=torch.float16)[4:].view(1, 1, 1, 60))

    def test_strides_that_are_never_used(self):
        tensor = torch.empty(2, 16, dtype=torch.float16).as_strided((2, 1, 1, 16), (16, 3, 7, 1))
        assert self.aligned(tensor)


class TestBackward:
    def test_hopper(self):
        assert choose_backward(problem(), NEW).kernel == "flashcore_hopper_backward"
        assert choose_backward(problem(), Device("cuda", 80)).kernel == "flashcore_backward"

    @pytest.mark.parametrize("changed", [{"range_layout": "rows"}, {"head_dim": 256}, {"dropout": 0.1}], ids=str)
    def test_what_hopper_takes(self, changed):
        assert choose_backward(problem(**changed), NEW).kernel == "flashcore_hopper_backward"

    @pytest.mark.parametrize("changed", [{"mask_kind": "float"}, {"head_dim": 68}], ids=str)
    def test_what_hopper_leaves_to_the_portable_one_with_its_reason(self, changed):
        plan = choose_backward(problem(**changed), NEW)
        assert plan.kernel == "flashcore_backward" and "not the Hopper kernel, because" in plan.reason

    @pytest.mark.parametrize("sizes", [(264, 64), (64, 264)], ids=str)
    def test_head_dim_above_256_is_for_neither(self, sizes):
        wide = problem(head_dim=sizes[0], value_dim=sizes[1])
        assert choose_backward(wide, NEW).kernel == "torch"
        assert choose_hopper_backward(wide, NEW) == "no configuration has head_dim {} with {}".format(*sizes)

    @pytest.mark.parametrize("num_queries", [1, 64])
    def test_weights_are_dropped_by_the_portable_forward(self, num_queries):
        """And by no decode kernel, on any GPU; on Hopper see hopper/prefill/test_choose.py."""
        for device in (Device("cuda", 80), Device("interpreter"), *([NEW] if num_queries == 1 else [])):
            assert chosen_for(num_queries, device, dropout=0.1).kernel == "flashcore_forward"
        assert chosen_for(num_queries, NEW).kernel != "flashcore_forward"


class TestFallback:
    def test_gradients(self):
        fp8 = problem(fp8=True)
        assert fallback_reason(fp8, H200) is None and "gradients" in backward_fallback_reason(fp8, H200)

    def test_no_device(self):
        chosen = choose(problem(), Device("torch", reason="no Triton here"))
        assert chosen.kernel == "torch" and chosen.reason == "no Triton here"

    @pytest.mark.parametrize("dtype", [torch.float64])
    def test_dtype(self, dtype):
        assert "not torch.float64" in fallback_reason(problem(dtype=dtype), H200)

    @pytest.mark.parametrize("sizes", [(513, 64), (64, 513), (576, 512)], ids=str)
    def test_head_dim(self, sizes):
        assert f"up to {MAX_HEAD_DIM}" in fallback_reason(problem(head_dim=sizes[0], value_dim=sizes[1]), H200)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", [1, 16, 40, 256, 257, 512])
    def test_not_otherwise(self, head_dim, dtype):
        assert fallback_reason(problem(head_dim=head_dim, dtype=dtype), H200) is None

    def test_the_backward_and_fp8_have_a_limit_of_their_own(self):
        for size in (256, 257):
            sizes = {"head_dim": size, "value_dim": size}
            backward = backward_fallback_reason(problem(**sizes), H200)
            fp8 = fallback_reason(problem(**sizes, fp8=True), H200)
            assert (backward is None, fp8 is None) == (size == 256, size == 256)
        assert "kernels make those up to head_dim 256, not 257" in backward
        assert "up to 256, not 257" in fp8
        assert "float64" in backward_fallback_reason(problem(dtype=torch.float64), H200)


class TestSameForEveryBatch:
    """A sequence is computed the same way alone and in a batch: the plan knows neither of batch nor of length."""

    @pytest.mark.parametrize("num_queries", [1, 64])
    def test_batch_and_length(self, num_queries):
        plans = {
            choose(problem(num_queries, num_keys)._replace(batch_size=batch), H200)
            for batch, num_keys in itertools.product((1, 2, 64), (1, 100, 10**6))
        }
        assert len(plans) == 1

    def test_no_state(self):
        assert choose(problem(), H200) == choose(problem(), H200)


class TestExplain:
    def test_kernel(self):
        query, key = torch.zeros(1, 4, 1, 64, dtype=torch.float16), torch.zeros(1, 2, 9, 64, dtype=torch.float16)
        assert explain(query, key, key, device=H200).startswith("flashcore_decode (16x")

    def test_hopper(self):
        query = torch.zeros(1, 4, 64, 96, dtype=torch.float16)
        new, old = (Device("cuda", 90, triton=version) for version in ((3, 9), (3, 4)))
        row = next(row for row in HOPPER_ROWS if sum(row.head_dim) >= 96)
        tile = f"flashcore_hopper ({64 * row.consumers}x{row.block_n}"
        assert explain(query, query, query, device=new).startswith(tile)
        assert "not the Hopper kernel, because that needs Triton 3.5" in explain(query, query, query, device=old)
        off = torch.zeros(1, 4, 64, 68, dtype=torch.float16)[..., 4:]
        assert "no multiple of 16 bytes" in explain(off, off, off, device=new)

    def test_fallback(self):
        query = torch.zeros(1, 4, 1, 600)
        assert explain(query, query, query, device=H200).startswith("torch: the kernels take head_dim up to 512")
