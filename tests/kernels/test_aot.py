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
from flashcore_kernels.plan import HOPPER_TRITON
from flashcore_kernels.tables import configuration

from . import aot

pytest.importorskip("triton.backends.nvidia")

FULL = os.environ.get("FLASHCORE_TEST_FULL") == "1"
HEAD_DIMS = ["16", "40", "64", "80", "96", "128", "192", "256", "192/128"] if FULL else ["128"]
FEATURES = ["none", "range-all", "fp8", "rows-all", "bool-mask", "mask-all"] if FULL else ["range-all", "mask-all"]
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
        reports += compiled(  # in pieces
            "--arch", str(arch), "--kernel", kernel, "--dtype", dtype, "--head-dim", "96", "--features", "none"
        )
    wrong = [f"{report['head_dim']} {report['features']}: {report['problems']}" for report in reports]
    assert not any(report["problems"] for report in reports), "\n".join(wrong)
    used = {tuple(report["tile"]) for report in reports}
    for gaps in (False, True):
        row = configuration(kernel, arch, torch.float32 if dtype == "fp32" else torch.float16, 128, gaps, whole=True)
        assert (row.block_m, row.block_n, row.num_warps, row.num_stages) in used


def gluon() -> bool:
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= HOPPER_TRITON


@pytest.mark.skipif(not gluon(), reason="the Gluon kernel needs Triton 3.5 or newer")
@pytest.mark.parametrize("head_dim", ["64", "96", "128", "192/128", "256"])
def test_hopper(head_dim, compiled):
    """The Gluon kernel's main loops hardly spill and are not serialised, without features and with all of them."""
    features = ["none", "range", "sinks", "range-all", "rows-all"] if FULL else ["none", "range"]
    if head_dim == "64":
        features.append("few-queries")
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


def test_a_spill_in_a_main_loop_would_show():
    healthy = {
        "kernel": "flashcore_hopper", "triton": "3.6.0", "tile": [128, 128, 4, 2], "shared": 0, "shared_limit": 1,
        "wgmma": 64, "wgmma_arrive": 8, "wgmma_loops": [(400, 0, 2), (400, 10, 0), (700, 20, 9)],
    }  # fmt: skip
    assert aot.problems(healthy) == []
    assert "main loops" in aot.problems({**healthy, "wgmma_loops": [(400, 0, 0), (401, 11, 0)]})[0]
    assert "waits" in aot.problems({**healthy, "wgmma_loops": [(400, 0, 0), (401, 0, 3)]})[0]
    assert "waits" in aot.problems({**healthy, "wgmma_loops": [(400, 0, 0), (401, 0, 66)]})[0]
    assert "main loops" in aot.problems({**healthy, "wgmma_loops": []})[0]
    assert "serialised" in aot.problems({**healthy, "wgmma_arrive": 64})[0]
    one_copy = {**healthy, "one_copy": True, "wgmma_loops": [(420, 0, 2), (700, 20, 9)], "loop_barriers": 0}
    assert aot.problems(one_copy) == []
    assert "wait for each other" in aot.problems({**one_copy, "loop_barriers": 1})[0]


def test_a_tile_too_large_would_show(compiled):
    """Negative control: more keys than registers or shared memory hold are reported."""
    (report,) = compiled(
        "--arch", "89", "--kernel", "flashcore_decode", "--dtype", "bf16", "--head-dim", "128", "--features", "none",
        "--rows", "16", "--tile", "16", "128", "1", "3",
    )  # fmt: skip
    assert len(report["problems"]) == 2, report
    assert "shared memory" in report["problems"][0] and "spill" in report["problems"][1]


def test_serialised_wgmma_would_show():
    healthy = {"triton": "3.9.0", "shared": 0, "shared_limit": 1, "stack": 0, "loop_spills": 0, "registers": 200}
    healthy["wgmma"] = 32
    assert aot.problems({**healthy, "wgmma_arrive": 8}) == []
    assert "serialised" in aot.problems({**healthy, "wgmma_arrive": 32})[0]


def test_only_measured_spills_pass():
    spilling = {
        "triton": "3.6.0", "kernel": "flashcore_forward", "dtype": "bf16", "features": "fp8", "head_dim": 256,
        "shared": 0, "shared_limit": 1, "stack": 176, "loop_spills": 10, "registers": 255,
    }  # fmt: skip
    assert aot.problems(spilling) == []
    for other in ({"stack": 177}, {"head_dim": 128}, {"features": "range"}, {"kernel": "flashcore_decode"}):
        assert "spill" in aot.problems(spilling | other)[0], other


def test_programs_that_do_not_fit_would_show():
    """The story: with a key range head_dim 64 took 148 registers, and three programs ran where four were sent."""
    four = {"triton": "3.9.0", "shared": 35968, "shared_limit": 232448, "stack": 0, "loop_spills": 0, "resident": 4}
    assert aot.problems({**four, "registers": 128}) == []
    assert aot.problems({**four, "registers": 129}) == ["3 programs fit on an SM, and the launch counts on 4"]
    assert "3 programs" in aot.problems({**four, "registers": 100, "shared": 60000})[0]


SASS = """
        /*0100*/                   STL [R1], R8 ;
        /*0110*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        {spill}
        /*0130*/               @P0 BRA 0x110 ;
        /*0140*/                   LDL.LU R3, [R1] ;
        /*0150*/                   BRA 0x150 ;
"""


WGMMA = SASS.replace("HMMA.16816.F32 R4, R8, R2, R4", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR36], RZ")


def test_wgmma_loops_are_found():
    assert aot.wgmma_loops(WGMMA.format(spill="/*0120*/ LDL R9, [R1+0x4] ;")) == [(3, 1, 0)]
    late = "/*0114*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ; /*0118*/ MUFU.EX2 R1, R2 ;"
    early = "/*0114*/ MUFU.EX2 R1, R2 ; /*0118*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
    assert aot.wgmma_loops(WGMMA.format(spill=late)) == [(4, 0, 1)]
    assert aot.wgmma_loops(WGMMA.format(spill=early)) == [(4, 0, 0)]
    assert aot.wgmma_loops(SASS.format(spill="/*0120*/ LDL R9, [R1+0x4] ;")) == []
    # The way back from a barrier's second try has no predicate, and is no loop.
    way_back = WGMMA.replace("@P0 BRA 0x110", "BRA 0x110")
    assert aot.wgmma_loops(way_back.format(spill="/*0120*/ LDL R9, [R1+0x4] ;")) == []


def test_barriers_in_loops_are_found():
    """Triton's, which name their number; not those by which consumers take turns, nor what stands outside of a loop."""
    barrier = "/*0114*/ BAR.SYNC.DEFER_BLOCKING {}, 0x100 ;"
    assert aot.loop_barriers(WGMMA.format(spill=barrier.format("0x0"))) == 1
    assert aot.loop_barriers(WGMMA.format(spill=barrier.format("R9"))) == 0
    assert aot.loop_barriers(WGMMA.format(spill="/*0148*/ BAR.SYNC.DEFER_BLOCKING 0x0, 0x100 ;")) == 0


def test_edges_do_not_count():
    """What a branch within a main loop skips is left out, and nothing else is."""
    edge = (
        "/*0112*/ @P1 BRA 0x11c ; /*0114*/ LDL R9, [R1+0x4] ; /*0118*/ FSEL R1, R2, R3, P0 ; /*011c*/ FADD R1, R2, R3 ;"
    )
    assert aot.wgmma_loops(WGMMA.format(spill=edge)) == [(4, 0, 0)]
    elsewhere = edge.replace("@P1 BRA 0x11c", "@P1 BRA 0x150")
    assert aot.wgmma_loops(WGMMA.format(spill=elsewhere)) == [(6, 1, 0)]


def test_spills_in_a_loop_would_show():
    """A value parked across the loops costs nothing; one that is fetched in each round does."""
    assert aot.loop_spills(SASS.format(spill="/*0120*/ IADD3 R1, R1, 0x1, RZ ;")) == 0
    assert aot.loop_spills(SASS.format(spill="/*0120*/ LDL R9, [R1+0x4] ;")) == 1
    healthy = {"triton": "3.9.0", "shared": 0, "shared_limit": 1, "stack": 8, "registers": 255}
    assert aot.problems({**healthy, "loop_spills": 0}) == []
    assert aot.problems({**healthy, "loop_spills": 4}) == [], "a few parked values"
    assert "5 in loops" in aot.problems({**healthy, "loop_spills": 5})[0]
    assert aot.problems({**healthy, "loop_spills": 5, "registers": 168}) == [], "traded for another block on an SM"
    assert "spill" in aot.problems({**healthy, "loop_spills": 0, "stack": 256})[0]
