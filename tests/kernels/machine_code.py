"""What ptxas made of a kernel: its registers, spills and main loops, found in SASS, and what is wrong with them."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

# Bytes of stack a thread. Spills that stay outside of the loops park values, and cost next to nothing, and so do a few
# reloads of parked values in loops of several hundred instructions (on an H200 with four, head_dim 256 with a key range
# is 20 % faster than in tiles that need none). Within loops ptxas may trade a few more for one more block on an SM: it
# stops at 80 or 128 registers. At 255 it had no choice.
PARKED_STACK = 128
PARKED_RELOADS = 4
OCCUPANCY_STACK = 24
# Beside keys in fp8 tiles that spill are faster than those that do not, on an H200 with Triton 3.6, head_dim 256: in
# 16 bits 701 us (B2, 512 queries on 8192 keys) where 64x64 with 8 warps, which spills nothing, takes 842; in fp32 3677
# (512 on 2048) where 16x16 takes 5937. (kernel, dtype) -> (head dimensions above, bytes).
MEASURED_STACK = {("flashcore_forward", "bf16"): (128, 176), ("flashcore_forward", "fp32"): (0, 112)}
# Above head_dim 256 prompts in 16 bits have a tile that spills and whose wgmma are serialised. On an H200 with Triton
# 3.6 it takes two thirds of the time of the largest that does neither, see the table. (kernel, tile) -> bytes.
MEASURED_TILES = {("flashcore_forward", (64, 32, 8, 2)): 272}
# Of the Gluon kernel: loads of parked values in a main loop of some 450 instructions. head_dim 192/128 with a key range
# has most, ten: descriptors of its two pieces of Q, and sums.
MAIN_LOOP_SPILLS = 10
# A thread has two rows: what their older sums shrink by may be computed at any time.
LATE_EXPONENTIALS = 2
# The tables are chosen for this Triton and newer. With older ones they must compile, fit, and spill little.
TUNED_SINCE = (3, 6)
OLD_STACK = 256


def resources(cubin: bytes, wgmma: bool) -> dict:
    """Registers and stack bytes a thread, spills within loops, and with `wgmma` how often its instructions occur."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage))
        report = {"registers": int(found["REG"]), "stack": int(found["STACK"]) + int(found["LOCAL"]), "loop_spills": 0}
        sass = _cuobjdump("-sass", file.name) if report["stack"] or wgmma else ""
    if report["stack"]:
        report["loop_spills"] = loop_spills(sass)
    if wgmma:
        report["wgmma_loops"] = wgmma_loops(sass)
        report["loop_barriers"] = loop_barriers(sass)
        report["wgmma"] = len(re.findall(r"\bHGMMA\b", sass))
        report["wgmma_arrive"] = len(re.findall(r"\bWARPGROUP\.ARRIVE\b", sass))
    return report


def _instructions(sass: str) -> list[tuple[int, str]]:
    """(address, text) of each."""
    return [(int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);", sass)]


def _branches(code: list[tuple[int, str]], predicated: bool) -> list[tuple[int, int]]:
    """(address, target) of each branch, or of those alone that have a predicate."""
    pattern = re.compile((r"^@.*" if predicated else "") + r"\bBRA\b.*?\b0x([0-9a-f]+)")
    found = [(at, pattern.search(what)) for at, what in code]
    return [(at, int(target[1], 16)) for at, target in found if target]


def _inner_wgmma_loops(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """(first, last address) of each innermost loop that multiplies by wgmma."""
    # A branch without a predicate comes back from a barrier's second try, which ptxas sets behind everything else: from
    # there to its target is no loop.
    loops = [(target, at) for at, target in _branches(code, predicated=True) if target < at]
    loops = [loop for loop in loops if any("HGMMA" in what for at, what in code if loop[0] <= at <= loop[1])]
    return [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]


def loop_spills(sass: str) -> int:
    """How many loads and stores of spilled registers stand within a loop: between a branch back and its target."""
    code = _instructions(sass)
    loops = [(target, at) for at, target in _branches(code, predicated=False) if target < at]
    spills = [at for at, what in code if re.search(r"\b(STL|LDL)\b", what)]
    return sum(any(begin <= at <= end for begin, end in loops) for at in spills)


def wgmma_loops(sass: str) -> list[tuple[int, int, int]]:
    """Each innermost loop that multiplies by wgmma, the shortest first.

    Returns:
        (instructions; loads and stores of spilled registers; exponentials behind the wait for all products, which do
        not overlap with any of them).
    """
    code = _instructions(sass)
    branches = _branches(code, predicated=True)
    found = []
    for begin, end in _inner_wgmma_loops(code):
        # What a branch within the loop skips is for the blocks at the edges, and to rescale, which hardly a block does.
        skips = [(at, target) for at, target in branches if begin <= at < target <= end]
        body = [what for at, what in code if begin <= at <= end and not any(start < at < stop for start, stop in skips)]
        spills = sum(bool(re.search(r"\b(STL|LDL)\b", what)) for what in body)
        waits = [at for at, what in enumerate(body) if re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0", what)]
        exponentials = sum("MUFU.EX2" in what for what in body[waits[-1] :]) if waits else 0
        found.append((len(body), spills, exponentials))
    return sorted(found)


def loop_barriers(sass: str) -> int:
    """How many of Triton's barriers stand in innermost loops that multiply by wgmma."""
    code = _instructions(sass)
    triton_barrier = re.compile(r"BAR\.SYNC\S* 0x")  # the kernel's own have their numbers in registers
    loops = _inner_wgmma_loops(code)
    return sum(bool(triton_barrier.search(what)) for begin, end in loops for at, what in code if begin <= at <= end)


def _cuobjdump(option: str, path: str) -> str:
    import triton

    shipped = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = str(shipped) if shipped.exists() else shutil.which("cuobjdump")
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def is_old(report: dict) -> bool:
    """Whether the tables were chosen for a newer Triton than this report's."""
    return tuple(map(int, report["triton"].split(".")[:2])) < TUNED_SINCE


def problems(report: dict) -> list[str]:
    """What is wrong with a compiled variant: an empty list is what tests want to see."""
    wrong = []
    if report.get("kernel") == "flashcore_hopper":
        return hopper_problems(report)
    old = is_old(report)
    if old:
        allowed = OLD_STACK
    elif report["loop_spills"] <= PARKED_RELOADS:
        allowed = PARKED_STACK
    else:
        allowed = 0 if report["registers"] == 255 else OCCUPANCY_STACK
    if report.get("features") == "fp8":
        above, measured = MEASURED_STACK.get((report["kernel"], report["dtype"]), (0, 0))
        allowed += measured if report["head_dim"] > above else 0
    wide = 0
    if report.get("head_dim", 0) > 256:
        wide = MEASURED_TILES.get((report["kernel"], tuple(report["tile"])), 0)
    allowed = max(allowed, wide)
    if report["shared"] > report["shared_limit"]:
        wrong.append(f"{report['shared']} bytes of shared memory, {report['shared_limit']} exist")
    if report["stack"] > allowed:
        wrong.append(f"{report['stack']} bytes of stack a thread: registers spill, {report['loop_spills']} in loops")
    if report.get("resident"):
        # Of an SM of compute capability 9.0; registers go out by eights, and each program has a KiB for the system.
        registers = -(-report["registers"] // 8) * 8 * 128
        fit = min(65536 // registers, 233472 // (report["shared"] + 1024))
        if fit < report["resident"]:
            wrong.append(f"{fit} programs fit on an SM, and the launch counts on {report['resident']}")
    # A ptxas that gives up on overlap waits for each wgmma by itself. Triton 3.3 does so without a spill.
    if not old and not wide and report.get("wgmma") and report["wgmma_arrive"] > report["wgmma"] / 2:
        wrong.append(f"{report['wgmma_arrive']} warpgroup.arrive for {report['wgmma']} wgmma: they are serialised")
    return wrong


def hopper_problems(report: dict) -> list[str]:
    """What is wrong with a compiled variant of the Gluon kernel.

    Each consumer has one loop over the blocks; there all the time goes. Hardly a register may spill in it, and the
    softmax must run while the product with V does: ptxas likes to move it behind the wait for that product. What only
    blocks at the edges do is left out, and what is parked between tiles costs next to nothing.
    """
    wrong = []
    if report["shared"] > report["shared_limit"]:
        wrong.append(f"{report['shared']} bytes of shared memory, {report['shared_limit']} exist")
    main_loops = report["wgmma_loops"][: 1 if report.get("one_copy") else report["tile"][0] // 64]
    if report.get("one_copy") and report["loop_barriers"]:
        wrong.append(f"{report['loop_barriers']} barriers in the main loop: consumers wait for each other")
    if not main_loops or any(spills > MAIN_LOOP_SPILLS for _, spills, _ in main_loops):
        wrong.append(f"registers spill in the main loops: {main_loops}")
    if any(exponentials > LATE_EXPONENTIALS for _, _, exponentials in main_loops):
        wrong.append(f"the softmax of the main loops waits for the products: {main_loops}")
    if report["wgmma_arrive"] > report["wgmma"] / 2:
        wrong.append(f"{report['wgmma_arrive']} warpgroup.arrive for {report['wgmma']} wgmma: they are serialised")
    return wrong
