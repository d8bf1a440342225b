"""The backward of attention alone on one GPU beside its peers, and the tiles it could have.

usage: python scripts/bench_backward.py [--fa3 FOLDER] [--peers fa3,cudnn,...] [--groups ...] [--json F]
       python scripts/bench_backward.py --tune [--groups ...] [--json F]
       python scripts/bench_backward.py --tiny [--tune]

Every contender gets the same random inputs and the answer of its own forward. Its gradients are held against float64 on
one KV head first, by the error rule of the tests with PyTorch's FlashAttention-2 for the yardstick; what fails it gets
no time. Rates count 2.5 times the forward's operations, as everybody does. Times are medians of rounds in which the
contenders take turns. `--tune` times each kernel of the portable backward with each of CANDIDATES, a table a head_dim.
`--tiny` runs small cases on the CPU through Triton's interpreter, to see that all of this works; such times mean
nothing.
`fa3` needs FlashAttention-3's binaries, see benchmarking.load_fa3.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import benchmarking
import torch
import torch.nn.functional as F
from bench_prefill import Case, Inputs, cases, padded_lengths
from torch.nn.attention import SDPBackend, sdpa_kernel

MAX_RATIO, RMS_RATIO = 3.0, 2.0
PEERS = ("fa3", "fa3_deterministic", "cudnn", "flash", "portable")
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
TINY = [
    Case("prefill", 1, 70, 70, 2, 1, 32, 32), Case("prefill", 1, 70, 70, 2, 1, 32, 16, causal=False),
    Case("padded", 2, 40, 40, 2, 1, 16, 16, lengths=(40, 27)), Case("prefill", 1, 40, 40, 1, 1, 16, 16, window=9),
]  # fmt: skip


class Step(NamedTuple):
    """The inputs of a forward as leaves, and the gradient of its output `[B, H, Q, Dv]`."""

    x: Inputs
    grad: torch.Tensor


def make(case: Case, dtype: torch.dtype, device: str) -> Step:
    def one(heads, length, dim):
        return torch.randn(case.batch, length, heads, dim, dtype=dtype, device=device).transpose(1, 2)

    x = Inputs(
        one(case.heads, case.queries, case.head_dim),
        one(case.kv_heads, case.keys, case.head_dim),
        one(case.kv_heads, case.keys, case.value_dim),
    )
    return Step(Inputs(*(t.requires_grad_() for t in x)), one(case.heads, case.queries, case.value_dim))


# Each contender: a function from a case and its step to a call that answers (dq, dk, dv), or None where it cannot.


def arguments_of(case: Case, step: Step) -> dict:
    """Keywords of our `attention` for a case."""
    from flashcore_kernels import make_key_range

    if not case.lengths:
        return {"is_causal": case.causal, "window": case.window}
    first = torch.tensor([case.keys - length for length in case.lengths], device=step.grad.device)
    return {"key_range": make_key_range(case.batch, case.keys, first=first, right=0)}


def flashcore(case: Case, step: Step) -> Callable:
    """Autograd through `attention`, as a model has it: whichever kernel is chosen."""
    from flashcore_kernels import attention, path_counts

    output = attention(*step.x, **arguments_of(case, step))

    def call():
        return torch.autograd.grad(output, step.x, step.grad, retain_graph=True)

    path_counts.clear()
    call()
    if path_counts["torch"]:
        raise RuntimeError("PyTorch served the backward")
    return call


def forward_of(case: Case, step: Step):
    """(problem, inputs, output, lse) of our own forward."""
    from flashcore_kernels import attention
    from flashcore_kernels.problem import check_problem, split_arguments

    x = Inputs(*(t.detach() for t in step.x))
    arguments = arguments_of(case, step)
    output, lse = attention(*x, **arguments, return_lse=True)
    inputs, options = split_arguments(*x, **arguments)
    return check_problem(inputs, **options), inputs, output, lse


def architecture() -> int:
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def portable(case: Case, step: Step, config=None) -> Callable:
    from flashcore_kernels.portable.backward import run_backward
    from flashcore_kernels.portable.backward_table import backward_config

    problem, inputs, output, lse = forward_of(case, step)
    config = config or backward_config(problem, architecture())
    return lambda: run_backward(problem, config, inputs, output, lse, step.grad)[:3]


def fa3(case: Case, step: Step, forward, deterministic: bool) -> Callable | None:
    if forward is None or case.lengths:
        return None
    query, key, value = (t.detach().transpose(1, 2) for t in step.x)
    arguments = {"softmax_scale": case.head_dim**-0.5, "is_causal": case.causal}
    if case.window:
        arguments |= {"window_size_left": case.window - 1, "window_size_right": 0}
    output, lse, *_ = forward(query, key, value, num_splits=1, **arguments)
    grad = step.grad.transpose(1, 2)

    def call():
        grads = torch.ops.flash_attn_3.bwd(
            grad, query, key, value, output, lse, deterministic=deterministic, **arguments
        )
        return [t.transpose(1, 2) for t in grads[:3]]

    return call


def fused(case: Case, step: Step, backend: SDPBackend) -> Callable | None:
    """Autograd through PyTorch's SDPA with one of its fused kernels; its forward has run."""
    if case.window or case.lengths or (case.causal and case.queries != case.keys):
        return None
    with sdpa_kernel(backend):
        output = F.scaled_dot_product_attention(*step.x, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads)
    return lambda: torch.autograd.grad(output, step.x, step.grad, retain_graph=True)


def contender(name: str, case: Case, step: Step, forward) -> Callable | None:
    if name in ("flashcore", "portable"):
        return {"flashcore": flashcore, "portable": portable}[name](case, step)
    if name in ("fa3", "fa3_deterministic"):
        return fa3(case, step, forward, name == "fa3_deterministic")
    return fused(case, step, {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[name])


def reference(case: Case, step: Step, b: int, kv: int) -> tuple[torch.Tensor, ...]:
    """float64 (dq `[G, Q, D]`, dk `[K, D]`, dv `[K, Dv]`) of one KV head, some rows at a time."""
    group, scale = case.heads // case.kv_heads, case.head_dim**-0.5
    key, value = (t.detach()[b, kv].double() for t in step.x[1:])
    dk, dv, dq = torch.zeros_like(key), torch.zeros_like(value), []
    for h, begin in itertools.product(range(kv * group, (kv + 1) * group), range(0, case.queries, 2048)):
        rows = torch.arange(begin, min(begin + 2048, case.queries), device=key.device)
        query, grad = step.x.query.detach()[b, h, rows].double(), step.grad[b, h, rows].double()
        # A softmax over nothing is NaN.
        p = (query @ key.T * scale).masked_fill(~case.visible(b, rows), -torch.inf).softmax(-1).nan_to_num(0.0)
        dp = grad @ value.T
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        dq.append(ds @ key)
        dk += ds.T @ query
        dv += p.T @ grad
    return torch.cat(dq).unflatten(0, (group, case.queries)), dk, dv


def is_right(case: Case, grads, peers, want, b: int, kv: int) -> bool:
    """The tests' error rule on the gradients of one KV head."""
    group = case.heads // case.kv_heads
    heads = slice(kv * group, (kv + 1) * group)
    for i, reference in enumerate(want):
        got, peer = (g[i][b, heads if i == 0 else kv] for g in (grads, peers))
        floor = torch.finfo(got.dtype).eps
        (largest, rms), (peer_largest, peer_rms) = (benchmarking.errors(t, reference) for t in (got, peer))
        # Not `>`: NaN is wrong.
        if not largest <= MAX_RATIO * peer_largest + floor * reference.abs().max().item():
            return False
        if not rms <= RMS_RATIO * peer_rms + floor * reference.square().mean().sqrt().item():
            return False
    return True


def yardstick(case: Case, step: Step):
    """Gradients by PyTorch's FlashAttention-2, or where it lacks the feature by SDPA with a mask."""
    call = None
    if case.head_dim == case.value_dim:
        call = fused(case, step, SDPBackend.FLASH_ATTENTION)
    if call is not None:
        return call()
    rows = torch.arange(case.queries, device=step.grad.device)
    mask = torch.stack([case.visible(b, rows) for b in range(case.batch)])[:, None]
    # A row that sees nothing would be NaN.
    mask = mask | ~mask.any(-1, keepdim=True)
    group = case.heads // case.kv_heads
    key, value = (t.repeat_interleave(group, 1) for t in step.x[1:])
    output = F.scaled_dot_product_attention(step.x.query, key, value, attn_mask=mask)
    return torch.autograd.grad(output, step.x, step.grad)


def times_of(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    if torch.cuda.is_available():
        return benchmarking.eager_times(calls, rounds=rounds, seconds=0.004)
    times = {}
    for name, call in calls.items():
        began = time.perf_counter()
        call()
        times[name] = (time.perf_counter() - began) * 1e6
    return times


def rotated(case: Case, dtype: torch.dtype, device: str) -> list[Step]:
    if device == "cpu":
        return [make(case, dtype, device)]
    elements = case.batch * (2 * case.heads * case.queries + 2 * case.kv_heads * case.keys) * case.head_dim
    return [make(case, dtype, device) for _ in range(benchmarking.rotations(elements * dtype.itemsize, most=4))]


def measure(case: Case, names: list[str], forward, dtype: torch.dtype, device: str, rounds: int) -> dict:
    """One row: what every contender reaches, None where it cannot do the case or gave a wrong answer."""
    steps = rotated(case, dtype, device)
    place = case.batch - 1, case.kv_heads - 1
    want, peers = reference(case, steps[0], *place), yardstick(case, steps[0])
    calls, failed = {}, {}
    for name in names:
        try:
            each = [contender(name, case, step, forward) for step in steps]
            if each[0] is None:
                continue
            if is_right(case, each[0](), peers, want, *place):
                turns = itertools.cycle(each)
                calls[name] = lambda turns=turns: next(turns)()
            else:
                failed[name] = "wrong answer"
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    times = times_of(calls, rounds)
    row = {"case": str(case).replace("prefill", "backward"), "unit": "TFLOP/s"}
    row |= {name: rate(case, times[name]) if name in times else None for name in names}
    return row | ({"failed": failed} if failed else {})


def rate(case: Case, microseconds: float) -> float:
    return round(2.5 * case.operations() / microseconds / 1e6, 1)


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


def compile_row(case: Case, dtype: torch.dtype, row) -> None:
    """Fill Triton's cache on disk with the kernel of one row, in a process of its own."""
    try:
        step = make(case._replace(batch=1, queries=256, keys=256), dtype, "cuda")
        kernel_call(case._replace(batch=1, queries=256, keys=256), step, row)()
    except Exception:  # the caller sees it again, and says so
        pass


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
    if device == "cuda" and kind not in _compiled:
        _compiled.add(kind)
        with ProcessPoolExecutor(12, multiprocessing.get_context("spawn")) as pool:
            for done in [pool.submit(compile_row, case, dtype, row) for row in rows]:
                done.result()
    step = make(case, dtype, device)
    problem = forward_of(case, step)[0]
    shipped = backward_config(problem, architecture())
    place = case.batch - 1, case.kv_heads - 1
    want, peers = reference(case, step, *place), yardstick(case, step)
    calls, report = {}, {}
    for row in rows:
        name = f"{row.kernel} {row.block_m}x{row.block_n} {row.num_warps}w {row.num_stages}s"
        name += "" if row.branch else " no branch"
        report[name] = {"case": str(case).replace("prefill", "backward"), "kernel": name, "unit": "us", "time": None}
        try:
            grads = portable(case, step, shipped._replace(**{row.kernel: row}))()
            if is_right(case, grads, peers, want, *place):
                calls[name] = kernel_call(case, step, row)
            else:
                report[name]["failed"] = "wrong answer"
        except Exception as error:
            report[name]["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    for name, microseconds in times_of(calls, rounds).items():
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


def chosen_cases(groups: list[str]) -> list[Case]:
    """Those of bench_prefill, and a window and left padding, which PyTorch's flash does not serve."""
    out = cases([group for group in groups if group != "more"])
    if "more" in groups:
        lengths = padded_lengths(8, 1024, 2048)
        out += [
            Case("prefill", 1, 16384, 16384, 32, 8, 128, 128, window=1024),
            Case("padded", 8, 2048, 2048, 32, 8, 128, 128, lengths=lengths),
        ]
    return out


def tuned_cases(groups: list[str]) -> list[Case]:
    """Causal and full at 4096 keys, of each head_dim."""
    every = chosen_cases(groups)
    wanted = [case for case in every if case.keys == 4096] + [case for case in every if case.keys == 8192]
    first = {}
    for case in wanted:
        first.setdefault((case.head_dim, case.value_dim, case.causal), case)
    return list(first.values()) + [case for case in every if case.lengths]


def peer_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(PEERS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fa3", type=Path, help="folder with FlashAttention-3's binaries")
    parser.add_argument("--peers", type=peer_names, default=list(PEERS), help=f"of {','.join(PEERS)}, with commas")
    parser.add_argument("--groups", nargs="+", default=["d128", "d64", "d256", "mla", "d96", "more"],
                        choices=["d128", "d64", "d256", "d96", "mla", "more"])  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tune", action="store_true", help="time each kernel with each candidate")
    parser.add_argument("--tiny", action="store_true", help="small cases on the CPU, through the interpreter")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not (arguments.tiny or torch.cuda.is_available()):
        print("bench_backward needs a GPU; its cases:", *map(str, chosen_cases(arguments.groups)), sep="\n  ")
        return 1
    # Triton's interpreter multiplies no bfloat16.
    dtype = torch.float16 if arguments.tiny else getattr(torch, arguments.dtype)
    device = "cpu" if arguments.tiny else "cuda"
    forward = None
    if not arguments.tiny and {"fa3", "fa3_deterministic"} & set(arguments.peers):
        forward = benchmarking.load_fa3(arguments.fa3)
    peers = ["flash"] if arguments.tiny else arguments.peers
    chosen = TINY if arguments.tiny else (tuned_cases if arguments.tune else chosen_cases)(arguments.groups)
    rows = []
    for case in chosen:
        if arguments.tune:
            rows += tune(case, dtype, device, arguments.rounds, arguments.tiny)
        else:
            rows.append(measure(case, ["flashcore", *peers], forward, dtype, device, arguments.rounds))
            print(rows[-1], flush=True)
        if arguments.json:
            benchmarking.write(arguments.json, rows)
    wrong = [row["case"] for row in rows if "wrong answer" in str(row.get("failed", ""))]
    if wrong:
        print("wrong answers:", *wrong, sep="\n  ")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
