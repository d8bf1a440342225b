"""Every shipped configuration compiles for its GPUs, fits into their shared memory, and spills no registers.

Without a GPU, in another process (see aot.py). FLASHCORE_TEST_FULL=1 compiles every row of the tables in every form of
its loops, at every head dimension, and so does `nox -s full`, with every Triton. Otherwise it is rows for head_dim 128,
with the features that need the most registers, and of the Gluon kernels what differs most.
"""

import itertools
import os

import pytest
import torch
from flashcore_kernels.hopper import FIRST_TRITON
from flashcore_kernels.portable.tables import TABLES, row_for

from . import aot

pytest.importorskip("triton.backends.nvidia")

FULL = os.environ.get("FLASHCORE_TEST_FULL") == "1"
HEAD_DIMS = ["16", "40", "64", "80", "96", "128", "192", "256", "192/128", "320", "512"] if FULL else ["128"]
FEATURES = ["range-all", "mask-all"]
if FULL:
    FEATURES += ["none", "fp8", "rows-all", "bool-mask", "padding-all"]
ROWS = ["16", "64"] if FULL else ["64"]
ARCHS, KERNELS, DTYPES = (80, 89, 90, 100), ("flashcore_forward", "flashcore_decode"), ("bf16", "fp32")
# 8.9 has the rows of 8.0, and 10.0 those of 9.0 but for prompts in 16 bits. A decode in fp32 takes longest.
SELECTED = [
    (80, "flashcore_forward", "bf16"), (80, "flashcore_decode", "fp32"), (90, "flashcore_forward", "bf16"),
    (90, "flashcore_forward", "fp32"), (90, "flashcore_decode", "bf16"), (100, "flashcore_forward", "bf16"),
]  # fmt: skip


def version() -> tuple[int, int]:
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


# head_dim -> features. The Triton that PyTorch 2.10 and 2.11 bring is the one that most will have, and the one that the
# tables were measured with; .ci/run has this file run by it, too.
MEASURED_TRITON = (3, 6)
if FULL:
    HOPPER = dict.fromkeys(
        ["64", "96", "128", "192/128", "256"],
        ["none", "range", "dropout", "sinks", "range-all", "rows-all", "bool-mask", "bool-mask-all", "bool-mask-rows"],
    )
    for head_dim in ("64", "96", "128"):
        HOPPER[head_dim] = HOPPER[head_dim] + ["float-mask", "mask-all", "bias-fp32"]
    HOPPER["64"].append("few-queries")
elif version() == MEASURED_TRITON:
    HOPPER = dict.fromkeys(["96", "192/128", "256"], ["range"])
    HOPPER |= {"64": ["range", "dropout", "few-queries", "bool-mask"], "128": ["none", "range", "float-mask"]}
else:
    HOPPER = {"64": ["dropout"], "128": ["float-mask"]}
HOPPER_DECODE = ["16", "64", "96", "128", "192/128", "256"] if FULL or version() == MEASURED_TRITON else ["64", "256"]


@pytest.fixture
def compiled(compiling):
    """compiled(*command line of aot.py) -> its reports."""
    return lambda *command: compiling(aot.all_reports, list(command))


@pytest.mark.parametrize(
    "arch, kernel, dtype",
    list(itertools.product(ARCHS, KERNELS, DTYPES)) if FULL else SELECTED,
    ids=lambda value: f"sm_{value}" if value in ARCHS else value,
)
def test_tables(arch, kernel, dtype, compiled):
    reports = compiled(
        "--arch", str(arch), "--kernel", kernel, "--dtype", dtype, "--head-dim", *HEAD_DIMS, "--features", *FEATURES,
        "--rows", *ROWS,
    )  # fmt: skip
    if kernel == "flashcore_forward" and dtype == "bf16":
        reports += compiled(  # rows of two tiles
            "--arch", str(arch), "--kernel", kernel, "--dtype", dtype, "--head-dim", "96", "--features", "none"
        )
    wrong = [f"{report['head_dim']} {report['features']}: {report['problems']}" for report in reports]
    assert not any(report["problems"] for report in reports), "\n".join(wrong)
    limit = min(aot.SHARED_LIMIT[other] for other in TABLES if TABLES[other] is TABLES[arch])
    assert all(report["shared"] <= limit for report in reports), "the rows are those of a GPU with less, too"
    used = {tuple(report["tile"]) for report in reports}
    for gaps in (False, True):
        row = row_for(
            kernel, arch, torch.float32 if dtype == "fp32" else torch.float16, 128, gaps=gaps, full_columns=True
        )
        assert (row.block_m, row.block_n, row.num_warps, row.num_stages) in used


@pytest.mark.skipif(version() < FIRST_TRITON, reason="the Gluon kernel needs Triton 3.5 or newer")
@pytest.mark.parametrize("head_dim", HOPPER)
def test_hopper(head_dim, compiled):
    """The Gluon kernel's main loops hardly spill and are not serialised, without features and with all of them."""
    reports = compiled(
        "--arch", "90", "--kernel", "flashcore_hopper", "--dtype", "bf16", "--head-dim", head_dim, "--features",
        *HOPPER[head_dim],
    )  # fmt: skip
    wrong = [f"{report['features']}: {report['problems']}" for report in reports]
    assert not any(report["problems"] for report in reports), "\n".join(wrong)


@pytest.mark.skipif(version() < FIRST_TRITON, reason="the Gluon kernel needs Triton 3.5 or newer")
@pytest.mark.parametrize("head_dim", HOPPER_DECODE)
def test_hopper_decode(head_dim, compiled):
    """The Gluon decode kernel hardly spills, is not serialised, and fits on an SM as often as its launch counts on."""
    features = ["none", "range", "fp8", "range-all"] if FULL else ["fp8", "range-all"]
    if FULL or head_dim in ("64", "128", "256"):
        features.append("sinks")  # without a range: of whole sequences, where the batch is 64
    rows = ["1", "4", "16", "32", "64"] if FULL else ["16" if head_dim in ("96", "192/128") else "4"]
    batch = ["2", "16", "64"] if FULL else ["64"]
    reports = compiled(
        "--arch", "90", "--kernel", "flashcore_hopper_decode", "--dtype", "bf16", "--head-dim", head_dim, "--features",
        *features, "--rows", *rows, "--batch", *batch,
    )  # fmt: skip
    wrong = [f"{report['features']} {report['rows']}: {report['problems']}" for report in reports]
    assert not any(report["problems"] for report in reports), "\n".join(wrong)


def test_a_tile_too_large_would_show(compiled):
    """Negative control: more keys than registers or shared memory hold are reported."""
    (report,) = compiled(
        "--arch", "89", "--kernel", "flashcore_forward", "--dtype", "bf16", "--head-dim", "128", "--features", "none",
        "--tile", "64", "64", "2", "4",
    )  # fmt: skip
    assert len(report["problems"]) == 2, report
    assert "shared memory" in report["problems"][0] and "spill" in report["problems"][1]
