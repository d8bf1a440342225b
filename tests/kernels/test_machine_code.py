"""What machine_code.py finds in SASS, and what it calls a fault. Nothing is compiled here."""

from .machine_code import loop_barriers, loop_spills, problems, wgmma_loops


def test_a_spill_in_a_main_loop_would_show():
    healthy = {
        "kernel": "flashcore_hopper", "triton": "3.6.0", "tile": [128, 128, 4, 2], "shared": 0, "shared_limit": 1,
        "wgmma": 64, "wgmma_arrive": 8, "wgmma_loops": [(400, 0, 2), (400, 10, 0), (700, 20, 9)],
    }  # fmt: skip
    assert problems(healthy) == []
    assert "main loops" in problems({**healthy, "wgmma_loops": [(400, 0, 0), (401, 11, 0)]})[0]
    assert "waits" in problems({**healthy, "wgmma_loops": [(400, 0, 0), (401, 0, 3)]})[0]
    assert "waits" in problems({**healthy, "wgmma_loops": [(400, 0, 0), (401, 0, 66)]})[0]
    assert "main loops" in problems({**healthy, "wgmma_loops": []})[0]
    assert "serialised" in problems({**healthy, "wgmma_arrive": 64})[0]
    one_copy = {**healthy, "one_copy": True, "wgmma_loops": [(420, 0, 2), (700, 20, 9)], "loop_barriers": 0}
    assert problems(one_copy) == []
    assert "wait for each other" in problems({**one_copy, "loop_barriers": 1})[0]


def test_serialised_wgmma_would_show():
    healthy = {"triton": "3.9.0", "shared": 0, "shared_limit": 1, "stack": 0, "loop_spills": 0, "registers": 200}
    healthy["wgmma"] = 32
    assert problems({**healthy, "wgmma_arrive": 8}) == []
    assert "serialised" in problems({**healthy, "wgmma_arrive": 32})[0]


def test_only_measured_spills_pass():
    spilling = {
        "triton": "3.6.0", "kernel": "flashcore_forward", "dtype": "bf16", "features": "fp8", "head_dim": 256,
        "shared": 0, "shared_limit": 1, "stack": 176, "loop_spills": 10, "registers": 255,
    }  # fmt: skip
    assert problems(spilling) == []
    for other in ({"stack": 177}, {"head_dim": 128}, {"features": "range"}, {"kernel": "flashcore_decode"}):
        assert "spill" in problems(spilling | other)[0], other


def test_programs_that_do_not_fit_would_show():
    """The story: with a key range head_dim 64 took 148 registers, and three programs ran where four were sent."""
    four = {"triton": "3.9.0", "shared": 35968, "shared_limit": 232448, "stack": 0, "loop_spills": 0, "resident": 4}
    assert problems({**four, "registers": 128}) == []
    assert problems({**four, "registers": 129}) == ["3 programs fit on an SM, and the launch counts on 4"]
    assert "3 programs" in problems({**four, "registers": 100, "shared": 60000})[0]


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
    assert wgmma_loops(WGMMA.format(spill="/*0120*/ LDL R9, [R1+0x4] ;")) == [(3, 1, 0)]
    late = "/*0114*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ; /*0118*/ MUFU.EX2 R1, R2 ;"
    early = "/*0114*/ MUFU.EX2 R1, R2 ; /*0118*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
    assert wgmma_loops(WGMMA.format(spill=late)) == [(4, 0, 1)]
    assert wgmma_loops(WGMMA.format(spill=early)) == [(4, 0, 0)]
    assert wgmma_loops(SASS.format(spill="/*0120*/ LDL R9, [R1+0x4] ;")) == []
    # The way back from a barrier's second try has no predicate, and is no loop.
    way_back = WGMMA.replace("@P0 BRA 0x110", "BRA 0x110")
    assert wgmma_loops(way_back.format(spill="/*0120*/ LDL R9, [R1+0x4] ;")) == []


def test_barriers_in_loops_are_found():
    """Triton's, which name their number; not those by which consumers take turns, nor what stands outside of a loop."""
    barrier = "/*0114*/ BAR.SYNC.DEFER_BLOCKING {}, 0x100 ;"
    assert loop_barriers(WGMMA.format(spill=barrier.format("0x0"))) == 1
    assert loop_barriers(WGMMA.format(spill=barrier.format("R9"))) == 0
    assert loop_barriers(WGMMA.format(spill="/*0148*/ BAR.SYNC.DEFER_BLOCKING 0x0, 0x100 ;")) == 0


def test_edges_do_not_count():
    """What a branch within a main loop skips is left out, and nothing else is."""
    edge = (
        "/*0112*/ @P1 BRA 0x11c ; /*0114*/ LDL R9, [R1+0x4] ; /*0118*/ FSEL R1, R2, R3, P0 ; /*011c*/ FADD R1, R2, R3 ;"
    )
    assert wgmma_loops(WGMMA.format(spill=edge)) == [(4, 0, 0)]
    elsewhere = edge.replace("@P1 BRA 0x11c", "@P1 BRA 0x150")
    assert wgmma_loops(WGMMA.format(spill=elsewhere)) == [(6, 1, 0)]


def test_spills_in_a_loop_would_show():
    """A value parked across the loops costs nothing; one that is fetched in each round does."""
    assert loop_spills(SASS.format(spill="/*0120*/ IADD3 R1, R1, 0x1, RZ ;")) == 0
    assert loop_spills(SASS.format(spill="/*0120*/ LDL R9, [R1+0x4] ;")) == 1
    healthy = {"triton": "3.9.0", "shared": 0, "shared_limit": 1, "stack": 8, "registers": 255}
    assert problems({**healthy, "loop_spills": 0}) == []
    assert problems({**healthy, "loop_spills": 4}) == [], "a few parked values"
    assert "5 in loops" in problems({**healthy, "loop_spills": 5})[0]
    assert problems({**healthy, "loop_spills": 5, "registers": 168}) == [], "traded for another block on an SM"
    assert "spill" in problems({**healthy, "loop_spills": 0, "stack": 256})[0]
