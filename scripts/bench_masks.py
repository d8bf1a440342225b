"""Attention under dense masks and biases on one GPU, beside PyTorch's SDPA with the same mask: microseconds of a call.

usage: python scripts/bench_masks.py [--groups short long bias blocks wide] [--contenders ...] [--json FILE]
       python scripts/bench_masks.py --tiny

Of each case there are these contenders, where they can do it; they take turns, and times are medians of CUDA graphs'
replays:
- `flashcore`: with the mask;
- `range`: with a KeyRange that hides the same, and the bias where there is one;
- `plain`: without any mask;
- `portable`: with the mask by this library's Triton forward, the kernel of every other GPU;
- `efficient`, `cudnn`, `math`: SDPA's backends with the mask. `sdpa` is the best of them, and `ratio` its time over
  flashcore's.
Queries, keys and values rotate so that none lies in the L2 from the call before; masks stay, as they do from layer to
layer. Each answer is held against float64 on a sample of rows first, by the error rule of the tests; what fails it gets
no time. `eager` is flashcore's time from Python, back to back. `--tiny` runs small cases on the CPU through Triton's
interpreter, to see that all of this works; such times mean nothing.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if "--tiny" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))

import benchmarking
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

MAX_RATIO, RMS_RATIO = 2.0, 1.5
BACKENDS = {
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
CONTENDERS = ("flashcore", "range", "plain", "portable", *BACKENDS)
GROUPS = ("short", "long", "bias", "blocks", "wide")
# SDPA's math keeps all scores: of larger calls it is neither fast nor does it fit.
MATH_SCORES = 1 << 29


class Case(NamedTuple):
    """One call, as many queries as keys.

    Attributes:
        mask: what `mask_of` makes.
        padded: keys behind each sequence's length are hidden as well: with `mask` bool it is in the mask, beside a bias
            it is a KeyRange for us, and for SDPA in the bias.
    """

    batch: int
    length: int
    heads: int
    head_dim: int
    mask: str
    padded: bool = False
    kv_heads: int | None = None

    def __str__(self):
        heads = f"H{self.heads}" + (f":{self.kv_heads}" if self.kv_heads else "")
        padded = " padded" if self.padded else ""
        return f"{self.mask}{padded} B{self.batch} S{self.length} {heads} D{self.head_dim}"


def cases(groups: list[str], tiny: bool) -> list[Case]:
    if tiny:
        kinds = ("bool", "row", "bias", "causal bool", "tree")
        return [Case(2, 24, 1, 16, kind, padded) for kind in kinds for padded in (False, True)]
    of = {
        "short": [
            Case(64, 512, 12, 64, "bool"), Case(64, 512, 12, 64, "bool", True), Case(64, 512, 12, 64, "row", True),
            Case(256, 128, 12, 64, "bool", True),
        ],
        "long": [
            Case(4, 4096, 12, 64, "bool"), Case(4, 4096, 12, 64, "bool", True), Case(4, 4096, 32, 128, "bool", True, 8),
            Case(2, 4096, 32, 128, "causal bool", True, 8),
        ],
        "bias": [
            Case(16, 512, 16, 64, "bias"), Case(16, 512, 16, 64, "bias", True), Case(16, 512, 16, 64, "bias fp32"),
            Case(4, 2048, 16, 64, "bias"), Case(4, 2048, 16, 128, "bias"), Case(4, 197, 12, 64, "bias"),
            Case(32, 577, 12, 64, "bias"), Case(8, 512, 16, 64, "bias a sequence"),
        ],
        "blocks": [Case(2, 8192, 16, 128, "tree"), Case(2, 8192, 16, 128, "documents")],
        "wide": [Case(2, 2048, 8, 512, "none"), Case(2, 2048, 8, 512, "bool", True)],
    }  # fmt: skip
    return [case for group in groups for case in of[group]]


def lengths_of(case: Case, device: str) -> torch.Tensor:
    """From half of the keys to all."""
    steps = torch.arange(case.batch, device=device)
    return case.length - steps * (case.length // 2) // max(case.batch - 1, 1)


def mask_of(case: Case, dtype: torch.dtype, device: str) -> torch.Tensor | None:
    """The mask of a case, that of SDPA: bool, or a bias with padding in it."""
    n = case.length
    place = torch.arange(n, device=device)
    real = (place < lengths_of(case, device)[:, None])[:, None, None] if case.padded else None  # [B, 1, 1, K]
    if case.mask.startswith("bias"):
        bias = position_bias(case, dtype, device)
        return bias if real is None else bias.masked_fill(~real, -torch.inf)
    if case.mask == "none":
        return None
    if case.mask == "row":
        return real if real is not None else torch.ones(case.batch, 1, 1, n, dtype=torch.bool, device=device)
    if case.mask == "bool":
        keep = torch.ones(case.batch, 1, n, n, dtype=torch.bool, device=device)
    elif case.mask == "causal bool":
        keep = (place[:, None] >= place).expand(case.batch, 1, n, n)
    elif case.mask == "tree":
        # Branches of a sixteenth each: they see a common trunk, the first sixteenth, and causally themselves.
        branch = place // max(n // 16, 1)
        keep = (place[:, None] >= place) & ((branch[:, None] == branch) | (branch == 0))
        keep = keep[None, None]
    else:
        # Documents of a length of their own, a twelfth on average.
        generator = torch.Generator().manual_seed(0)
        number = (torch.rand(n, generator=generator) < 12 / n).cumsum(0).to(device)
        keep = (number[:, None] == number)[None, None]
    return (keep if real is None else keep & real).contiguous()


def position_bias(case: Case, dtype: torch.dtype, device: str) -> torch.Tensor:
    batch = case.batch if case.mask == "bias a sequence" else 1
    bias = torch.randn(batch, case.heads, case.length, case.length, device=device)
    return bias.to(torch.float32 if case.mask == "bias fp32" else dtype)


def make(case: Case, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    heads = (case.heads, case.kv_heads or case.heads, case.kv_heads or case.heads)
    shape = (case.batch, case.length)
    return tuple(
        torch.randn(*shape, of, case.head_dim, dtype=dtype, device=device).transpose(1, 2) for of in heads
    )  # fmt: skip


def options_of(name: str, case: Case, mask: torch.Tensor | None) -> dict | None:
    """What flashcore is asked under this name; None where there is no such call."""
    from flashcore_kernels import make_key_range

    causal = case.mask == "causal bool"
    biased = case.mask.startswith("bias")
    if name == "plain":
        return {"is_causal": causal} if case.mask not in ("tree", "documents") else {}
    ranged = {}
    if case.padded and (biased or name == "range"):
        device = "cpu" if mask is None else mask.device
        end = lengths_of(case, device)
        ranged = {"key_range": make_key_range(case.batch, case.length, end=end, right=0 if causal else -1)}
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
    if mask is not None and mask.dtype.is_floating_point:
        mask = mask.to(x[0].dtype)  # SDPA takes no other

    def call():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*x, attn_mask=mask, enable_gqa=case.kv_heads is not None)

    return call


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


def measure(case: Case, names: list[str], dtype: torch.dtype, device: str, rounds: int) -> dict:
    """One row: microseconds of each contender, None where it cannot do the case or gave a wrong answer."""
    mask = mask_of(case, dtype, device)
    given = position_bias(case, dtype, device) if case.padded and case.mask.startswith("bias") else mask
    if given is not mask:
        real = (torch.arange(case.length, device=device) < lengths_of(case, device)[:, None])[:, None, None]
        mask = given.masked_fill(~real, -torch.inf)
    size = 4 * case.batch * case.length * case.heads * case.head_dim * dtype.itemsize
    sets = [make(case, dtype, device) for _ in range(benchmarking.rotations(size, most=6) if device == "cuda" else 1)]
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
            if name == "plain" or is_right(case, sets[0], mask, each[0]()):
                calls[name] = each
            else:
                failed[name] = "wrong answer"
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    times = time_of(calls, device, rounds)
    row |= {name: round(each, 1) for name, each in times.items()}
    if device == "cuda" and "flashcore" in calls:
        turns = itertools.cycle(calls["flashcore"])
        row["eager"] = round(benchmarking.eager_times({"": lambda: next(turns)()}, rounds=5, seconds=0.004)[""], 1)
    peers = [row[name] for name in BACKENDS if row.get(name)]
    if peers and row.get("flashcore"):
        row |= {"sdpa": min(peers), "ratio": round(min(peers) / row["flashcore"], 2)}
    row["paths"] = path_of(calls, options)
    return row | ({"failed": failed} if failed else {})


def time_of(calls: dict[str, list[Callable]], device: str, rounds: int) -> dict[str, float]:
    if device == "cuda":
        return benchmarking.graph_times(calls, calls=12, rounds=rounds)
    times = {}
    for name, each in calls.items():
        begin = time.perf_counter()
        each[0]()
        times[name] = (time.perf_counter() - begin) * 1e6
    return times


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
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="small cases on the CPU, through the interpreter")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not (arguments.tiny or torch.cuda.is_available()):
        print("bench_masks needs a GPU; its cases:", *map(str, cases(arguments.groups, False)), sep="\n  ")
        return 1
    device = "cpu" if arguments.tiny else "cuda"
    dtype = torch.float16 if arguments.tiny else getattr(torch, arguments.dtype)
    rows = []
    for case in cases(arguments.groups, arguments.tiny):
        rows.append(measure(case, arguments.contenders, dtype, device, arguments.rounds))
        print(rows[-1], flush=True)
        if arguments.json:
            benchmarking.write(arguments.json, rows)
    wrong = [row["case"] for row in rows if row.get("failed", {}).get("flashcore")]
    if wrong:
        print("flashcore failed:", *wrong, sep="\n  ")
    return int(bool(wrong))


if __name__ == "__main__":
    with torch.no_grad():
        sys.exit(main())
