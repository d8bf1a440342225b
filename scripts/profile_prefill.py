"""What bounds the prefill kernels: Nsight Compute's counters of flashcore and FlashAttention-3 on published cases.

usage: python scripts/profile_prefill.py [--fa3 FOLDER] [--cases 0 1 ...] [--json F]

Needs `ncu` and the right to read the hardware's counters; the clocks are left as they are. Each kernel runs some ten
times in a row, with other counters each time, so that its time here is not its time in a benchmark. Percentages are of
what the unit can do in the cycles in which a multiprocessor had work; stalls are how many warps of a scheduler waited
for that reason, for each instruction issued.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import benchmarking
import torch
from bench_prefill import is_right
from prefill_cases import Case, make
from prefill_contenders import contender

CASES = (
    Case("prefill", 2, 8192, 8192, 32, 8, 128, 128, causal=False),
    Case("prefill", 8, 2048, 2048, 32, 8, 128, 128),
    Case("prefill", 32, 512, 512, 32, 8, 128, 128),
    Case("prefill", 2, 8192, 8192, 32, 32, 64, 64, causal=False),
    Case("prefill", 32, 512, 512, 32, 32, 64, 64),
    Case("prefill", 2, 8192, 8192, 8, 8, 256, 256, causal=False),
    Case("prefill", 2, 8192, 8192, 32, 8, 128, 128),
    Case("prefill", 2, 8192, 8192, 32, 32, 64, 64),
    Case("prefill", 32, 512, 512, 8, 8, 256, 256),
    Case("prefill", 2, 8192, 8192, 32, 32, 96, 96, causal=False),
    Case("prefill", 2, 8192, 8192, 16, 16, 192, 128),
    Case("window", 1, 16384, 16384, 32, 8, 128, 128, window=4096),
    Case("chunked", 1, 512, 8192, 32, 8, 128, 128),
)
KERNELS = "regex:flashcore|device_kernel"  # FlashAttention-3's are CUTLASS device kernels
PIPE = "sm__pipe_{}_cycles_active.avg.pct_of_peak_sustained_active"
STALLS = {
    "barrier": "barriers",
    "wait": "the latency of the instruction before",
    "short_scoreboard": "exponentials and exchanges",
    "long_scoreboard": "keys and values",
    "no_instruction": "instructions to be fetched",
    "gmma": "products",
    "not_selected": "other warps",
}
METRICS = {
    "ms": "gpu__time_duration.sum",
    "ghz": "gpc__cycles_elapsed.avg.per_second",
    "registers": "launch__registers_per_thread",
    "instructions": "smsp__inst_executed.sum",
    "working": "sm__cycles_active.avg",
    "elapsed": "sm__cycles_elapsed.max",
    "tensor": PIPE.format("tensor"),
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "alu": PIPE.format("alu"),
    "fma": PIPE.format("fma"),
    "exp": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    **{f"stall_{name}": f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio" for name in STALLS},
}


def bound(row: dict) -> str:
    """What bounds a kernel: the first unit that is nearly busy, or what its warps wait for most."""
    for unit, limit, name in (
        ("tensor", 85, "tensor cores"),
        ("exp", 60, "exponentials"),
        ("issue", 60, "issue slots"),
    ):
        if row[unit] >= limit:
            return name
    # Warps without any work stand at a barrier.
    stall = max(STALLS.keys() - {"barrier"}, key=lambda name: row[f"stall_{name}"])
    tail = f", and a tail of {100 - row['working']:.0f} %" if row["working"] < 90 else ""
    return f"latency: warps wait for {STALLS[stall]}{tail}"


def run_case(case: Case, names: list[str], forward) -> None:
    """A case by each contender, once within a range that ncu looks at."""
    for name in names:
        x = make(case, torch.bfloat16)
        call = contender(name, case, x, forward)
        assert is_right(case, x, call()), (case, name)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def rows_of(report: str, case: Case, names: list[str]) -> list[dict]:
    """One row a kernel, from `ncu --page raw --csv`: a line of names, one of units, and one a kernel."""
    lines = [line for line in report.splitlines() if line.startswith('"')]
    head, _, *kernels = csv.reader(lines)
    assert len(kernels) == len(names), f"{len(kernels)} kernels were profiled, not {len(names)}:\n{report[-2000:]}"
    rows = []
    for name, kernel in zip(names, kernels):
        found = {short: float(kernel[head.index(long)].replace(",", "")) for short, long in METRICS.items()}
        found["working"] = 100 * found["working"] / found.pop("elapsed")
        found["ms"], found["ghz"] = found["ms"] / 1e6, found["ghz"] / 1e9
        row = {"case": str(case), "kernel": name} | {short: round(value, 3) for short, value in found.items()}
        rows.append(row | {"bound": bound(row)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fa3", type=Path, help="folder with FlashAttention-3's binaries")
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))), help="numbers, from 0")
    parser.add_argument("--minutes", type=float, help="begin no case after that")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = ["flashcore", "fa3"] if arguments.fa3 else ["flashcore"]
    if arguments.child is not None:
        run_case(CASES[arguments.child], names, benchmarking.load_fa3(arguments.fa3))
        return 0
    record = benchmarking.Record(arguments.json, minutes=arguments.minutes)
    for index in record.each(arguments.cases, lambda index: str(CASES[index])):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.csv"
            command = [
                "ncu", "--profile-from-start", "off", "--clock-control", "none", "--kernel-name", KERNELS,
                "--metrics", ",".join(METRICS.values()), "--csv", "--page", "raw", "--print-units", "base",
                "--log-file", str(report), sys.executable, *sys.argv, "--child", str(index),
            ]  # fmt: skip
            subprocess.run(command, check=True)
            rows = rows_of(report.read_text(), CASES[index], names)
        for row in rows:
            print(row, flush=True)
            record.add(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
