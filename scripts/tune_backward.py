"""The tiles that the portable backward could have: microseconds of each kernel with each of CANDIDATES.

usage: python scripts/tune_backward.py [--groups ...] [--minutes N] [--json FILE]
       python scripts/tune_backward.py --tiny

CANDIDATES has a table a head_dim. Gradients are held to float64 first, as in bench_backward.py; what is wrong gets no
time. `--tiny` runs small cases on the CPU through Triton's interpreter, to see that all of this works.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import benchmarking
import torch
from bench_backward import (
    GROUPS,
    TINY,
    Case,
    Step,
    architecture,
    case_name,
    chosen_cases,
    forward_of,
    is_right,
    make_step,
    portable,
    rate,
    reference,
    yardstick,
)  # fmt: skip

# (block_m, block_n, num_warps, num_stages) by kernel and the largest head_dim they are tried for.
CANDIDATES = {
    ("dq", 64): [
        (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2),
        (64, 128, 4, 2),
    ],
    ("dkdv", 64): [
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 4, 2), (32, 128, 4, 3),
        (128, 64, 4, 2), (128, 128, 8, 2), (64, 128, 4, 2),
    ],
    ("dq", 128): [
        (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3), (128, 128, 8, 2),
        (64, 32, 4, 3), (64, 128, 4, 2), (64, 128, 8, 2),
    ],
    ("dkdv", 128): [
        (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (32, 64, 4, 2),
        (32, 64, 4, 3), (64, 64, 8, 2), (128, 64, 8, 2), (32, 128, 4, 2),
    ],
    ("dq", 256): [
        (128, 64, 8, 1), (128, 32, 8, 2), (64, 64, 8, 1), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2),
        (128, 32, 8, 1), (64, 64, 4, 1),
    ],
    ("dkdv", 256): [
        (64, 64, 8, 1), (32, 64, 8, 1), (32, 64, 8, 2), (64, 64, 8, 2), (32, 64, 4, 1), (32, 128, 8, 1),
        (16, 128, 8, 2), (64, 32, 8, 1), (16, 64, 4, 2), (32, 128, 16, 2), (64, 128, 16, 1),
    ],
}  # fmt: skip


def candidates(case: Case, tiny: bool) -> list:
    """Rows of the table to try: each tile with a jump over the checks and without."""
    from flashcore_kernels.portable.backward_table import BackwardRow

    if tiny:
        return [BackwardRow(kernel, 16, 256, (32, 16, 4, 1), "", branch=kernel == "dq") for kernel in ("dq", "dkdv")]
    head = max(case.head_dim, case.value_dim)
    rows = []
    for (kernel, most), tiles in CANDIDATES.items():
        if most == next(size for size in (64, 128, 256) if head <= size):
            rows += [
                BackwardRow(kernel, 16, most, tile, "", branch=branch) for tile in tiles for branch in (True, False)
            ]
    return rows


def compile_row(row, case: Case, dtype: torch.dtype) -> None:
    """The kernel of one row, once."""
    lengths = (256,) if case.lengths else ()
    case = case._replace(batch=1, queries=256, keys=256, lengths=lengths)
    kernel_call(case, make_step(case, dtype, "cuda"), row)()


_compiled: set[tuple] = set()


def kernel_call(case: Case, step: Step, row) -> Callable:
    """A call of the one kernel that `row` configures."""
    from flashcore_kernels.portable.backward import BackwardCall, empty_like_heads
    from flashcore_kernels.portable.backward_table import backward_config

    problem, inputs, output, lse = forward_of(case, step)
    config = backward_config(problem, architecture())._replace(**{row.kernel: row})
    call = BackwardCall(problem, config, inputs.key_range, None, None, 0, 1.0)
    delta, x = torch.empty_like(lse), inputs[:3]
    grads = [empty_like_heads(t) for t in x]
    if row.kernel == "dq":
        return lambda: call.launch_dq(*x, output, step.grad, None, lse, None, delta, grads[0], problem.scale)
    call.launch_dq(*x, output, step.grad, None, lse, None, delta, grads[0], problem.scale)
    return lambda: call.launch_dkdv(*x, step.grad, lse, None, delta, *grads[1:], problem.scale)


def tune(case: Case, dtype: torch.dtype, device: str, rounds: int, tiny: bool) -> list[dict]:
    """A row a candidate: microseconds of its kernel, None with the reason where it is wrong or does not run."""
    from flashcore_kernels.portable.backward_table import backward_config

    rows = candidates(case, tiny)
    kind = case.head_dim, case.value_dim, bool(case.lengths)
    if kind not in _compiled:
        _compiled.add(kind)
        benchmarking.compile_ahead(functools.partial(compile_row, case=case, dtype=dtype), rows)
    step = make_step(case, dtype, device)
    problem = forward_of(case, step)[0]
    shipped = backward_config(problem, architecture())
    place = case.batch - 1, case.kv_heads - 1
    want, peers = reference(case, step, *place), yardstick(case, step)
    calls, report = {}, {}
    for row in rows:
        name = f"{row.kernel} {row.block_m}x{row.block_n} {row.num_warps}w {row.num_stages}s"
        name += "" if row.branch else " no branch"
        report[name] = {"case": case_name(case), "kernel": name, "unit": "us", "time": None}
        try:
            grads = portable(case, step, shipped._replace(**{row.kernel: row}))()
            if is_right(case, grads, peers, want, *place):
                calls[name] = kernel_call(case, step, row)
            else:
                report[name]["failed"] = "wrong answer"
        except Exception as error:
            report[name]["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    for name, microseconds in benchmarking.eager_times(calls, rounds=rounds, seconds=0.004).items():
        report[name]["time"] = round(microseconds, 1)
    best = {}
    for row in report.values():
        if row["time"]:
            kernel = row["kernel"].split()[0]
            best[kernel] = min(best.get(kernel, row["time"]), row["time"])
    together = f": {rate(case, sum(best.values()))} TFLOP/s with the best of each" if len(best) == 2 else ""
    print(f"{case}{together}")
    order = sorted(report.values(), key=lambda r: (r["kernel"].split()[0], r["time"] or float("inf")))
    for row in order:
        print(f"  {row['kernel']:28s} {row['time'] or row['failed']}", flush=True)
    return order


def tuned_cases(groups: list[str]) -> list[Case]:
    """Causal and full at 4096 keys, of each head_dim."""
    every = chosen_cases(groups)
    wanted = [case for case in every if case.keys == 4096] + [case for case in every if case.keys == 8192]
    first = {}
    for case in wanted:
        first.setdefault((case.head_dim, case.value_dim, case.causal), case)
    return list(first.values()) + [case for case in every if case.lengths]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, help="begin no case after that")
    parser.add_argument("--tiny", action="store_true", help="small cases on the CPU, through the interpreter")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = TINY if arguments.tiny else tuned_cases(arguments.groups)
    if not (arguments.tiny or torch.cuda.is_available()):
        print("tune_backward needs a GPU; its cases:", *map(str, chosen), sep="\n  ")
        return 1
    # Triton's interpreter multiplies no bfloat16.
    dtype = torch.float16 if arguments.tiny else getattr(torch, arguments.dtype)
    record, wrong = benchmarking.Record(arguments.json, minutes=arguments.minutes), []
    for case in record.each(chosen):
        for row in tune(case, dtype, "cpu" if arguments.tiny else "cuda", arguments.rounds, arguments.tiny):
            record.add(row)
            if row.get("failed") == "wrong answer":
                wrong.append(f"{row['case']}: {row['kernel']}")
    if wrong:
        print("wrong answers:", *wrong, sep="\n  ")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
