"""The kernel for pages compiles for its GPUs, fits into their shared memory, and does not spill in its loops.

Without a GPU, in another process (see ../test_aot.py). FLASHCORE_TEST_FULL=1 compiles all kinds of calls; otherwise it
is what a server runs most on two architectures.
"""

import os

import pytest

from . import aot_paged

pytest.importorskip("triton.backends.nvidia")

FULL = os.environ.get("FLASHCORE_TEST_FULL") == "1"
ARCHS = (80, 89, 90, 100) if FULL else (80, 90)
# What Triton 3.9 makes of new keys beside the pool spills on some; 3.6 and 3.9 agree about the others.
CALLS = ["single", "mixed", "small-pages", "ring-single", "fp8"] if FULL else ["mixed"]


@pytest.fixture
def compiled(compiling):
    """compiled(*command line of aot_paged.py) -> its reports."""
    return lambda *command: compiling(aot_paged.all_reports, list(command))


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")
def test_compiles(arch, compiled):
    reports = compiled(
        "--arch", str(arch), "--head-dim", *(["64", "128", "256"] if FULL else ["128"]), "--calls", *CALLS,
        "--dtype", *(["bf16", "fp32"] if FULL else ["bf16"]),
    )  # fmt: skip
    wrong = [f"{r['dtype']} {r['head_dim']} {r['call']} {r['tile']}: {r['problems']}" for r in reports if r["problems"]]
    assert reports and not wrong, "\n".join(wrong)


def test_a_tile_that_is_too_large_shows(compiled):
    """The control."""
    (report,) = compiled("--arch", "80", "--calls", "mixed", "--config", "block_m=128", "block_n=128", "num_stages=5")
    assert report["problems"]
