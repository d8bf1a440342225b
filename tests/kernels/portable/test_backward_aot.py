"""The backward's configurations compile for their GPUs, fit into their shared memory, and hardly spill in their loops.

Without a GPU, in another process (see ../test_aot.py). FLASHCORE_TEST_FULL=1 compiles every row of the table with the
features that it serves; otherwise it is the main rows for head_dim 128 on two architectures.
"""

import os

import pytest
import torch
from flashcore_kernels.portable.backward_table import TABLES, backward_config

from . import aot_backward

pytest.importorskip("triton.backends.nvidia")

FULL = os.environ.get("FLASHCORE_TEST_FULL") == "1"
ARCHS = (80, 89, 90, 100) if FULL else (80, 90)
HEAD_DIMS = ["40", "64", "96", "128", "192/128", "256"] if FULL else ["128"]
# Of rows that serve them, what takes most registers.
FEATURES = ["none", "range", "softcap", "rows", "bias", "bool-mask", "dropout", "all"] if FULL else ["none"]


@pytest.fixture
def compiled(compiling):
    """compiled(*command line of aot_backward.py) -> its reports."""
    return lambda *command: compiling(aot_backward.all_reports, list(command))


@pytest.mark.parametrize("kernel", ["dq", "dkdv"])
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")
def test_table(arch, kernel, compiled):
    reports = compiled(
        "--arch", str(arch), "--kernel", kernel, "--head-dim", *HEAD_DIMS, "--features", *FEATURES,
        "--dtype", *(["bf16", "fp32"] if FULL else ["bf16"]),
    )  # fmt: skip
    wrong = [f"{r['dtype']} {r['head_dim']} {r['features']} {r['tile']}: {r['problems']}" for r in reports]
    assert not any(report["problems"] for report in reports), "\n".join(wrong)


def test_the_small_kernels_compile(compiled):
    """What only additive masks need, for the oldest and the newest of the architectures."""
    for kernel in ("mask", "shift"):
        archs = ["80", "90"] if FULL else ["90"]
        reports = compiled("--arch", *archs, "--kernel", kernel, "--head-dim", "128", "--features", "all")
        assert not any(report["problems"] for report in reports), reports


def test_a_tile_too_large_would_show(compiled):
    """Negative control: more than registers and shared memory hold is reported."""
    (report,) = compiled(
        "--arch", "89", "--kernel", "dq", "--head-dim", "128", "--features", "none", "--tile", "64", "128", "4", "2"
    )  # fmt: skip
    assert len(report["problems"]) == 2, report
    assert "shared memory" in report["problems"][0] and "spill" in report["problems"][1]


class TestConfig:
    def problem(self, **changed):
        problem = aot_backward.problem_of(aot_backward.Variant("dq", 80, "bf16", 128, 128, "none"))
        return problem._replace(**changed)

    @pytest.mark.parametrize("arch", [0, 75, *TABLES, 86, 89, 103, 120])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_every_call_has_rows(self, dtype, arch):
        for size in (1, 33, 64, 65, 128, 129, 256):
            for features in ({}, {"softcap": 1.0}, {"mask_kind": "bool"}, {"range_layout": "rows"}):
                problem = self.problem(dtype=dtype, head_dim=size, value_dim=1, **features)
                config = backward_config(problem, arch)
                assert config.block_d >= size and (config.dq.kernel, config.dkdv.kernel) == ("dq", "dkdv")

    @pytest.mark.parametrize("arch", TABLES)
    def test_a_sequence_has_one_row_alone_batched_and_padded(self, arch):
        """Other tiles would be other bits."""
        for size in (64, 128, 256):
            alone = self.problem(head_dim=size, value_dim=size, batch_size=1)
            padded = alone._replace(batch_size=7, range_layout="sequence", left=-1, right=-1, num_keys=9000)
            assert backward_config(alone, arch) == backward_config(padded, arch)

    def test_features_that_take_registers_have_rows_of_their_own(self):
        plain = backward_config(self.problem(), 90)
        for features in ({"softcap": 1.0}, {"mask_kind": "bool"}, {"dropout": 0.1}):
            other = backward_config(self.problem(**features), 90)
            assert (plain.dq.serves, plain.dkdv.serves) == ("plain", "plain")
            assert "plain" not in (other.dq.serves, other.dkdv.serves)

    def test_no_row_fits(self):
        with pytest.raises(LookupError, match="head_dim 512"):
            backward_config(self.problem(head_dim=512), 90)
