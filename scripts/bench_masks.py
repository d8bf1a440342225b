"""Attention in full and under dense masks and biases on one GPU, beside PyTorch's SDPA: microseconds of a call.

usage: python scripts/bench_masks.py [--groups short full long bias blocks wide] [--only TEXT ...] [--contenders ...]
                                     [--minutes N] [--json FILE]
       python scripts/bench_masks.py --tiny

Of each case there are these contenders, where they can do it; they take turns, and times are medians of CUDA graphs'
replays:
- `flashcore`: with the mask; of "full" cases with nothing, or with a KeyRange where they are padded, as a model has it;
- `range`: with a KeyRange that hides the same, and the bias where there is one;
- `plain`: without any mask;
- `portable`: with the mask by this library's Triton forward, the kernel of every other GPU;
- `flash`, `efficient`, `cudnn`, `math`: SDPA's backends with the mask. `sdpa` is the best of them, `best` which one it
  is, and `ratio` its time over flashcore's.
`eager` has the same for calls from Python, back to back: the GPU's time or the host's, whichever is longer. `ratios`
has those that are asked for, and what is asked; `visible blocks` the part of the blocks of 128x128 that a mask shows.

Queries, keys and values rotate so that none lies in the L2 from the call before; masks stay, as they do from layer to
layer. Each answer is held against float64 on a sample of rows first, by the error rule of the tests; what fails it gets
no time. `--tiny` runs small cases on the CPU through Triton's interpreter, to see that all of this works; such times
mean nothing.
"""

import argparse
import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

if "--tiny" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))

import benchmarking
import torch
import torch.nn.functional as F
from mask_cases import GROUPS, Case, cases, inputs_of, lengths_of, make, visible_blocks
from torch.nn.attention import SDPBackend, sdpa_kernel

MAX_RATIO, RMS_RATIO = 2.0, 1.5
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
OURS = ("flashcore", "range", "plain", "portable")
CONTENDERS = (*OURS, *BACKENDS)
# Calls from Python between two changes of SDPA's backend, which take longer than a short call; in all so long.
EAGER_CALLS, EAGER_MICROSECONDS = 25, 4000
# SDPA's math keeps all scores: of larger calls it is neither fast nor does it fit.
MATH_SCORES = 1 << 29


def options_of(name: str, case: Case, mask: torch.Tensor | None) -> dict | None:
    """What flashcore is asked under this name; None where there is no such call."""
    from flashcore_kernels import make_key_range

    causal, full = case.mask == "causal bool", case.mask == "full"
    biased = case.mask.startswith("bias")
    if name == "plain":
        if full:
            return None
        return {"is_causal": causal} if case.mask not in ("tree", "documents") else {}
    ranged = {}
    if case.padded and (biased or full or name == "range"):
        device = "cpu" if mask is None else mask.device
        end = lengths_of(case, device)
        ranged = {"key_range": make_key_range(case.batch, case.length, end=end, right=0 if causal else -1)}
    if full:
        return ranged if name != "range" else None
    if biased:
        return {"mask": mask, **ranged} if name != "range" else None
    if name == "range":
        return ranged if ranged and case.mask in ("bool", "row", "causal bool") else None
    return {"mask": mask}


def flashcore(options: dict, x: tuple, portable: bool) -> Callable:
    from flashcore_kernels import attention
    from flashcore_kernels.choose import choose
    from flashcore_kernels.device import device_of
    from flashcore_kernels.dispatch import empty_outputs, serve
    from flashcore_kernels.problem import check_problem, split_arguments, with_alignment

    if not portable:
        return lambda: attention(*x, **options)
    inputs, asked = split_arguments(*x, **options)
    problem = with_alignment(check_problem(inputs, **asked), inputs)
    # With a Triton that is too old for the Hopper kernel.
    plan = choose(problem, device_of(x[0].device)._replace(triton=(0, 0)))
    if plan.kernel != "flashcore_forward":
        raise RuntimeError(f"the portable kernel was to be timed, and {plan} serves the call")
    if problem.mask_kind == "bool":
        inputs = inputs._replace(mask=inputs.mask.view(torch.uint8))

    def call():
        output, _ = empty_outputs(inputs.query, inputs.value, False)
        serve(plan, problem, inputs, output, None)
        return output

    return call


def sdpa(case: Case, x: tuple, mask: torch.Tensor | None, backend: SDPBackend) -> Callable | None:
    if backend is SDPBackend.MATH and case.batch * case.heads * case.length**2 > MATH_SCORES:
        return None
    if backend is SDPBackend.FLASH_ATTENTION and mask is not None:
        return None
    if mask is not None and mask.dtype.is_floating_point:
        mask = mask.to(x[0].dtype)  # SDPA takes no other

    return lambda: F.scaled_dot_product_attention(*x, attn_mask=mask, enable_gqa=case.kv_heads is not None)


def within(name: str):
    """What a contender's calls are made in."""
    return sdpa_kernel(BACKENDS[name]) if name in BACKENDS else contextlib.nullcontext()


def one_call(name: str, call: Callable) -> Callable:
    def made():
        with within(name):
            return call()

    return made


def eager_calls(name: str, calls: list[Callable], count: int) -> Callable:
    """So many of them, in turn."""
    turns = itertools.cycle(calls)

    def made():
        with within(name):
            for _ in range(count):
                next(turns)()

    return made


def is_right(case: Case, x: tuple, mask: torch.Tensor | None, output: torch.Tensor) -> bool:
    """The tests' error rule on a sample: three heads, 64 rows."""
    generator = torch.Generator().manual_seed(0)
    wants, peers, gots = [], [], []
    for i in range(3):
        b, h = (case.batch - 1) * i // 2, (case.heads - 1) * i // 2
        rows = torch.randint(case.length, (64,), generator=generator).to(x[0].device)
        kv = h * (case.kv_heads or case.heads) // case.heads
        query, key, value = x[0][b, h, rows], x[1][b, kv], x[2][b, kv]
        bias = torch.zeros(len(rows), case.length, dtype=torch.float64, device=x[0].device)
        if mask is not None:
            part = mask.expand(case.batch, case.heads, case.length, case.length)[b, h, rows]
            bias = bias.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else part.double()
        seen = (bias > -torch.inf).any(1)
        query, bias, got = query[seen], bias[seen], output[b, h, rows][seen]
        scores = query.double() @ key.double().T * case.head_dim**-0.5 + bias
        wants.append(scores.softmax(-1) @ value.double())
        rounded = bias.to(query.dtype)
        peers.append(F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=rounded[None])[0])
        gots.append(got)
    want, peer, got = map(torch.cat, (wants, peers, gots))
    floor = torch.finfo(output.dtype).eps
    largest, rms = benchmarking.errors(got, want)
    peer_largest, peer_rms = benchmarking.errors(peer, want)
    return (
        largest <= MAX_RATIO * peer_largest + floor * want.abs().max().item()
        and rms <= RMS_RATIO * peer_rms + floor * want.square().mean().sqrt().item()
    )


@torch.no_grad()
def compile_case(case: Case, names: list[str], dtype: torch.dtype) -> None:
    """Each of our kernels once."""
    given, x = inputs_of(case, dtype, "cuda")[0], make(case, dtype, "cuda")
    for name in set(names) & set(OURS):
        options = options_of(name, case, given)
        if options is not None:
            flashcore(options, x, name == "portable")()


def measure(case: Case, names: list[str], dtype: torch.dtype, device: str, rounds: int) -> dict:
    """One row: microseconds of each contender, None where it cannot do the case or gave a wrong answer."""
    given, mask = inputs_of(case, dtype, device)
    size = 4 * case.batch * case.length * case.heads * case.head_dim * dtype.itemsize
    sets = [make(case, dtype, device) for _ in range(benchmarking.rotations(size, most=6))]
    calls: dict[str, list[Callable]] = {}
    row: dict = {"case": str(case), "unit": "us", **dict.fromkeys(names)}
    failed, options = {}, {}
    for name in names:
        options[name] = None if name in BACKENDS else options_of(name, case, given)
        if name not in BACKENDS and options[name] is None:
            continue
        try:
            if name in BACKENDS:
                each = [sdpa(case, x, mask, BACKENDS[name]) for x in sets]
            else:
                each = [flashcore(options[name], x, name == "portable") for x in sets]
            if each[0] is None:
                continue
            if name == "plain" or is_right(case, sets[0], mask, one_call(name, each[0])()):
                calls[name] = each
            else:
                failed[name] = "wrong answer"
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    replayed = {name: [one_call(name, call) for call in each] for name, each in calls.items()}
    times = benchmarking.graph_times(replayed, calls=12, rounds=rounds)
    counts = {name: min(max(int(EAGER_MICROSECONDS / times[name]), 1), EAGER_CALLS) for name in calls}
    loops = {name: eager_calls(name, each, counts[name]) for name, each in calls.items()}
    eager = benchmarking.eager_times(loops, rounds=5, seconds=0.004)
    row |= {name: round(each, 1) for name, each in times.items()}
    row["eager"] = {name: round(each / counts[name], 1) for name, each in eager.items()}
    for times in (row, row["eager"]):
        peers = {name: times[name] for name in BACKENDS if times.get(name)}
        if peers and times.get("flashcore"):
            best = min(peers, key=peers.get)
            times |= {"sdpa": peers[best], "best": best, "ratio": round(peers[best] / times["flashcore"], 2)}
    row["ratios"] = ratios(case, row)
    if case.mask in ("tree", "documents"):
        row["visible blocks"] = visible_blocks(mask)
    row["paths"] = path_of(calls, options)
    return row | ({"failed": failed} if failed else {})


def ratios(case: Case, row: dict) -> dict[str, dict[str, float]]:
    """What is asked of a case, and what it is."""
    found = {}

    def note(what: str, over: float | None, under: float | None, **asked: float) -> None:
        if over and under:
            found[what] = {"is": round(over / under, 2), **{name.replace("_", " "): n for name, n in asked.items()}}

    ours = row.get("flashcore")
    if case.mask in ("tree", "documents"):
        note("sdpa / flashcore", row.get("sdpa"), ours, at_least=4.0)
    elif case.mask in ("full", "none"):
        note("sdpa / flashcore", row.get("sdpa"), ours, at_least=1.0)
        note("sdpa / flashcore, eager", row["eager"].get("sdpa"), row["eager"].get("flashcore"), at_least=1.0)
    else:
        note("sdpa / flashcore", row.get("sdpa"), ours, at_least=1.5 if case.length >= 1024 else 1.0)
        if case.mask.startswith("bias"):
            note("flashcore / plain", ours, row.get("plain"), at_most=1.5)
        elif not case.padded:
            note("flashcore / plain", ours, row.get("plain"), at_most=1.3)
        note("flashcore / range", ours, row.get("range"), at_most=1.15)
    return found


def path_of(calls: dict[str, list[Callable]], options: dict) -> dict[str, str]:
    """Which of our kernels served each contender."""
    from flashcore_kernels import path_counts

    paths = {}
    for name in calls:
        if options[name] is not None and name != "portable":
            path_counts.clear()
            calls[name][0]()
            paths[name] = "+".join(path_counts)
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--contenders", nargs="+", default=[name for name in CONTENDERS if name != "portable"],
                        choices=CONTENDERS)  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, help="begin no case after that")
    parser.add_argument(
        "--processes", type=int, default=14, help="that compile kernels ahead; 0: none, --minutes 0: no more"
    )
    parser.add_argument("--tiny", action="store_true", help="small cases on the CPU, through the interpreter")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = cases(arguments.groups, arguments.tiny)
    chosen = [case for case in chosen if any(text in str(case) for text in arguments.only)]
    if not (arguments.tiny or torch.cuda.is_available()):
        print("bench_masks needs a GPU; its cases:", *map(str, chosen), sep="\n  ")
        return 1
    device = "cpu" if arguments.tiny else "cuda"
    dtype = torch.float16 if arguments.tiny else getattr(torch, arguments.dtype)
    names, wrong = arguments.contenders, []
    record = benchmarking.Record(arguments.json, minutes=arguments.minutes)
    compiling = functools.partial(compile_case, names=names, dtype=dtype)
    benchmarking.compile_ahead(compiling, chosen, arguments.processes)
    for case in record.each(chosen):
        row = measure(case, names, dtype, device, arguments.rounds)
        print(row, flush=True)
        record.add(row)
        if row.get("failed", {}).get("flashcore"):
            wrong.append(str(case))
    if wrong:
        print("flashcore failed:", *wrong, sep="\n  ")
    return int(bool(wrong))


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
