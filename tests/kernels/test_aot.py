"""Every shipped configuration compiles for its GPUs, fits into their shared memory, and spills no registers.

Without a GPU, in another process (see aot.py). FLASHCORE_TEST_FULL=1 compiles every row of the tables in every form of
its loops, at every head dimension. Otherwise it is the rows for head_dim 128, with the features that need the most
registers, and the Gluon kernels at each of theirs.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from flashcore_kernels.hopper import FIRST_TRITON
from flashcore_kernels.portable.tables import row_for

from . import aot

pytest.importorskip("triton.backends.nvidia")

FULL = os.environ.get("FLASHCORE_TEST_FULL") == "1"
HEAD_DIMS = ["16", "40", "64", "80", "96", "128", "192", "256", "192/128", "320", "512"] if FULL else ["128"]
FEATURES = ["range-all", "mask-all"]
if FULL:
    FEATURES += ["none", "fp8", "rows-all", "bool-mask", "padding-all"]
ROWS = ["16", "64"] if FULL else ["64"]


@pytest.fixture(scope="session")
def compiled():
    """compiled(*command line of aot.py) -> its reports.

    From one process of its own for all tests, whatever a worker steals between them: importing PyTorch and Triton costs
    as much as compiling a small kernel, and this process interprets.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as environment:
            environment.delenv("TRITON_INTERPRET", raising=False)
            pool.submit(os.getpid).result()  # the process begins here

        def compiled(*command: str) -> list[dict]:
            reports = pool.submit(aot.all_reports, list(command)).result()
            assert reports, command
            return reports

        yield compiled


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["flashcore_forward", "flashcore_decode"])
@pytest.mark.parametrize("arch", [80, 89, 90, 100], ids=lambda arch: f"sm_{arch}")
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
    used = {tuple(report["tile"]) for report in reports}
    for gaps in (False, True):
        row = row_for(
            kernel, arch, torch.float32 if dtype == "fp32" else torch.float16, 128, gaps=gaps, full_columns=True
        )
        assert (row.block_m, row.block_n, row.num_warps, row.num_stages) in used


def gluon() -> bool:
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= FIRST_TRITON


@pytest.mark.skipif(not gluon(), reason="the Gluon kernel needs Triton 3.5 or newer")
@pytest.mark.parametrize("head_dim", ["64", "96", "128", "192/128", "256"])
def test_hopper(head_dim, compiled):
    """The Gluon kernel's main loops hardly spill and are not serialised, without features and with all of them."""
    features = ["none", "range", "sinks", "range-all", "rows-all"] if FULL else ["none", "range"]
    if head_dim == "64":
        features.append("few-queries")
    if FULL or head_dim == "64":
        features.append("dropout")
    if FULL:
        features += ["bool-mask", "bool-mask-all", "bool-mask-rows"]
        features += ["float-mask", "mask-all", "bias-fp32"] if head_dim in ("64", "96", "128") else []
    elif head_dim in ("64", "128"):
        features.append("float-mask" if head_dim == "128" else "bool-mask")
    reports = compiled(
        "--arch", "90", "--kernel", "flashcore_hopper", "--dtype", "bf16", "--head-dim", head_dim, "--features",
        *features,
    )  # fmt: skip
    wrong = [f"{report['features']}: {report['problems']}" for report in reports]
    assert not any(report["problems"] for report in reports), "\n".join(wrong)


@pytest.mark.skipif(not gluon(), reason="the Gluon kernel needs Triton 3.5 or newer")
@pytest.mark.parametrize("head_dim", ["16", "64", "96", "128", "192/128", "256"])
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
        "--arch", "89", "--kernel", "flashcore_decode", "--dtype", "bf16", "--head-dim", "128", "--features", "none",
        "--rows", "16", "--tile", "16", "128", "1", "3",
    )  # fmt: skip
    assert len(report["problems"]) == 2, report
    assert "shared memory" in report["problems"][0] and "spill" in report["problems"][1]
