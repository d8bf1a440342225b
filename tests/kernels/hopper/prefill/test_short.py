"""Which calls the kernel for short sequences takes, what its launch gets, and that it compiles without spills.

No GPU is needed. tests/gpu/test_hopper_short.py sees what it computes.
"""

import os

import pytest
import torch
from flashcore_kernels import make_key_range
from flashcore_kernels.choose import choose
from flashcore_kernels.dispatch import empty_outputs, serve
from flashcore_kernels.dropout import drop_threshold
from flashcore_kernels.hopper.prefill.table import MOST_SHORT_KEYS, ROWS, SHORT_HEAD_DIM, SHORT_ROWS
from flashcore_kernels.problem import Inputs, check_problem, with_alignment
from flashcore_kernels.runtime import launch

from ...runtime.test_prepared import H200  # which skips where there is no Triton
from ...test_choose import NEW, chosen_for
from . import aot_short

pytest.importorskip("flashcore_kernels.hopper.prefill.short_launch")

FULL = os.environ.get("FLASHCORE_TEST_FULL") == "1"


def kernel_of(num_queries=100, num_keys=100, **changed):
    return chosen_for(num_queries, NEW, **{"num_keys": num_keys, **changed}).kernel


class TestChoice:
    @pytest.mark.parametrize("num_keys", [1, 64, 65, MOST_SHORT_KEYS, MOST_SHORT_KEYS + 1])
    @pytest.mark.parametrize("head_dim", [16, 40, 64, 72])
    def test_few_keys_and_small_heads(self, num_keys, head_dim):
        short = num_keys <= MOST_SHORT_KEYS and head_dim <= SHORT_HEAD_DIM
        want = "flashcore_hopper_short" if short else "flashcore_hopper"
        for changed in (
            {}, {"num_queries": 4096}, {"num_queries": num_keys, "range_layout": "sequence"}, {"dropout": 0.1},
        ):  # fmt: skip
            if changed.get("num_queries", 100) > 16:
                sizes = {"num_queries": 100, "num_keys": num_keys, "head_dim": head_dim, "value_dim": head_dim}
                assert kernel_of(**{**sizes, **changed}) == want

    @pytest.mark.parametrize(
        "changed", [{"softcap": 5.0}, {"has_sinks": True}, {"left": 7}, {"right": 0}, {"range_layout": "rows"},
                    {"mask_kind": "bool", "mask_bits": 8, "mask_rows": True}, {"value_dim": 128},
                    {"num_keys": 101, "range_layout": "sequence"}], ids=str
    )  # fmt: skip
    def test_what_it_lacks_is_left_to_the_other(self, changed):
        assert kernel_of() == kernel_of(range_layout="sequence") == "flashcore_hopper_short"
        assert kernel_of(**changed) == "flashcore_hopper"

    def test_what_neither_takes(self):
        assert kernel_of(aligned=False) == kernel_of(dtype=torch.float32) == "flashcore_forward"

    def test_same_bits_as_the_other(self):
        """Blocks as its, or all keys in one: test_same_bits shows on a GPU that the bits are."""
        blocks = {row.block_n for row in ROWS if sum(row.head_dim) <= SHORT_HEAD_DIM}
        assert [row.most_keys for row in SHORT_ROWS] == sorted(row.most_keys for row in SHORT_ROWS)
        for row in SHORT_ROWS:
            assert {row.block_n} == blocks or row.most_keys <= row.block_n, row


class TestLaunch:
    @pytest.fixture
    def launched(self, monkeypatch):
        caught = []
        monkeypatch.setattr(launch, "launch", lambda *args, **options: caught.append((*args, options)))

        def launch_of(query, key, value, key_range=None, lse=None, dropout=0.0):
            inputs = Inputs(query, key, value, key_range, philox=torch.tensor([1, 2]) if dropout else None)
            problem = check_problem(inputs, dropout=dropout)
            chosen = choose(with_alignment(problem, inputs), H200)
            assert chosen.kernel == "flashcore_hopper_short", chosen
            output = empty_outputs(query, value, False)[0]
            serve(chosen, problem, inputs, output, lse)
            ((kernel, grid, arguments, scalars, constants, options),) = caught
            named = dict(zip(kernel.arg_names, (*arguments, *scalars, *constants), strict=True))
            caught.clear()
            return named, grid, options, output

        return launch_of

    @pytest.mark.parametrize("with_range", [False, True])
    @pytest.mark.parametrize("with_lse", [False, True])
    def test_arguments(self, launched, with_range, with_lse):
        """Of [B, S, H, D] views, with grouped heads and values narrower than keys."""
        sizes = ((6, 48), (2, 48), (2, 40))
        query, key, value = (torch.randn(3, 197, *size, dtype=torch.bfloat16).transpose(1, 2) for size in sizes)
        key_range = make_key_range(3, 197, end=torch.tensor([197, 5, 100])) if with_range else None
        lse = torch.empty(3, 6, 197) if with_lse else None
        named, grid, options, output = launched(query, key, value, key_range, lse)
        constants = named["C"]
        for name, tensor, rows in (("q", query, 64), ("k", key, constants.block_n), ("v", value, constants.block_n)):
            desc = named[f"{name}_desc"]
            assert desc.base is tensor and list(desc.shape) == list(tensor.shape)
            assert list(desc.strides) == list(tensor.stride()) and list(desc.block_shape) == [1, 1, rows, 64]
        assert grid == (3 * 6 * 4, 1) and named["tiles_per_head"] == 4
        assert named["Out"] is output and named["Lse"] is lse and named["Range"] is key_range
        assert (named["num_heads"], named["group"], named["num_queries"], named["num_keys"]) == (6, 3, 197, 197)
        strides = [named[f"stride_{name}"] * 8 for name in ("ob", "oh", "os")]
        assert strides == list(output.stride()[:3]) and named["value_eights"] == 5
        assert named["stride_rb"] == (key_range.stride(0) if with_range else 0)
        assert (constants.lse, constants.range_layout) == (with_lse, int(with_range))
        assert (constants.rows, constants.warps) == (64, 4) and options["num_warps"] == 4
        assert options["maxnreg"] == constants.consumer_registers

    @pytest.mark.parametrize("dropout", [0.0, 0.25])
    def test_dropout(self, dropout, launched):
        query = torch.randn(2, 4, 100, 64, dtype=torch.float16)
        named, *_ = launched(query, query, query, dropout=dropout)
        assert named["C"].dropout == bool(dropout) and (named["Philox"] is None) == (not dropout)
        assert named["drop_below"] == drop_threshold(dropout) and named["keep_scale"] == 1 / (1 - dropout)

    def test_rows_differ_in_what_is_compiled(self, launched):
        tensors = [torch.randn(1, 4, size, 64, dtype=torch.float16) for size in (64, 65, MOST_SHORT_KEYS)]
        constants = [launched(each, each, each)[0]["C"] for each in tensors]
        assert constants[0].block_n == 64 and constants[0] != constants[1]
        assert constants[1] == constants[2], "and not in the number of keys"


@pytest.fixture
def compiled(compiling):
    """compiled(*command line of aot_short.py) -> its reports."""
    return lambda *command: compiling(aot_short.all_reports, list(command))


class TestCompiled:
    def test_no_spills_in_the_loop_and_as_many_programs_as_registers_say(self, compiled):
        reports = compiled(*(() if FULL else ("--features", "none", "range-lse", "range-lse-dropout")))
        assert len(reports) >= 4
        assert not any(report["problems"] for report in reports), reports

    def test_too_few_registers_show(self, compiled):
        """The control."""
        (report,) = compiled("--keys", "128", "--features", "none", "--row", "registers=96")
        assert any("registers spill" in problem for problem in report["problems"])
