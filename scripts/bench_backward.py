"""The backward of attention alone on one GPU beside its peers.

usage: python scripts/bench_backward.py [--fa3 FOLDER] [--peers fa3,cudnn,...] [--groups ...] [--only TEXT ...]
                                        [--minutes N] [--json FILE]
       python scripts/bench_backward.py --tiny

Every contender gets the same random inputs and the answer of its own forward. Its gradients are held against float64 on
one KV head first, by the error rule of the tests with PyTorch's FlashAttention-2 for the yardstick; what fails it gets
no time. Rates count 2.5 times the forward's operations, as everybody does. Times are medians of rounds in which the
contenders take turns. `fa3` needs FlashAttention-3's binaries, see benchmarking.load_fa3; for `flex` every case is
compiled, some ten seconds each. `--tiny` runs small cases on the CPU through Triton's interpreter, to see that all of
this works; such times mean nothing.
"""

import argparse
import functools
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import benchmarking
import torch
import torch.nn.functional as F
from prefill_cases import SHAPES, TINY, Case, Inputs, cases, make, packed, padded_lengths
from prefill_contenders import arguments_of, existing, fa3_arguments, flex, rows_of
from torch.nn.attention import SDPBackend, sdpa_kernel

MAX_RATIO, RMS_RATIO = 3.0, 2.0
PEERS = ("fa3", "fa3_deterministic", "cudnn", "flash", "flex", "portable")
GROUPS = (*SHAPES, "window", "packed", "padded")


class Step(NamedTuple):
    """The inputs of a forward as leaves, and the gradient of its output `[B, H, Q, Dv]`."""

    x: Inputs
    grad: torch.Tensor


def make_step(case: Case, dtype: torch.dtype, device: str) -> Step:
    x = make(case, dtype, device)
    grad = torch.randn(case.batch, case.queries, case.heads, case.value_dim, dtype=dtype, device=device)
    return Step(Inputs(*(t.requires_grad_() for t in x)), grad.transpose(1, 2))


# Each contender: a function from a case and its step to a call that answers (dq, dk, dv), or None where it cannot.


def flashcore(case: Case, step: Step) -> Callable:
    """Autograd through `attention`, as a model has it: whichever kernel is chosen."""
    from flashcore_kernels import attention, path_counts

    path_counts.clear()
    output = attention(*step.x, **arguments_of(case, step.grad.device))

    def call():
        return torch.autograd.grad(output, step.x, step.grad, retain_graph=True)

    call()
    if path_counts["torch"]:
        raise RuntimeError("PyTorch served the backward")
    return call


def forward_of(case: Case, step: Step):
    """(problem, inputs, output, lse) of our own forward."""
    from flashcore_kernels import attention
    from flashcore_kernels.problem import check_problem, split_arguments

    x = Inputs(*(t.detach() for t in step.x))
    arguments = arguments_of(case, step.grad.device)
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
    """Left padding as in Transformers: of tokens that exist, packed; what goes in and what comes out is scattered."""
    if forward is None:
        return None
    arguments, inputs, grad = fa3_arguments(case), [t.detach() for t in step.x], step.grad
    tokens = existing(case, grad.device)
    if case.lengths:
        bounds, longest = case.bounds(grad.device), max(case.lengths)
        arguments |= {
            "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": longest, "max_seqlen_k": longest,
        }  # fmt: skip

        def gather(rows):
            return rows if tokens is None else rows.index_select(0, tokens)

        def scatter(rows):
            if tokens is not None:
                rows = rows.new_zeros(case.batch * case.keys, *rows.shape[1:]).index_copy_(0, tokens, rows)
            return rows.unflatten(0, (case.batch, case.keys)).transpose(1, 2)

        query, key, value = map(gather, rows_of(inputs))
        (grad,) = rows_of([grad])
    else:
        query, key, value, grad = (t.transpose(1, 2) for t in (*inputs, grad))

        def gather(grad):
            return grad

        def scatter(grad):
            return grad.transpose(1, 2)

    output, lse, *_ = forward(query, key, value, num_splits=1, **arguments)

    def call():
        found = torch.ops.flash_attn_3.bwd(
            gather(grad), query, key, value, output, lse, deterministic=deterministic, **arguments
        )
        return [scatter(t) for t in found[:3]]

    return call


def fused(case: Case, step: Step, backend: SDPBackend) -> Callable | None:
    """Autograd through PyTorch's SDPA with one of its fused kernels; its forward has run."""
    if case.window or case.lengths or (case.causal and case.queries != case.keys):
        return None
    with sdpa_kernel(backend):
        output = F.scaled_dot_product_attention(*step.x, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads)
    return lambda: torch.autograd.grad(output, step.x, step.grad, retain_graph=True)


def flexible(case: Case, step: Step) -> Callable | None:
    # What it keeps for the backward is needed again in the next round.
    torch._functorch.config.donated_buffer = False
    output = flex(case, step.x)()
    return lambda: torch.autograd.grad(output, step.x, step.grad, retain_graph=True)


def contender(name: str, case: Case, step: Step, forward) -> Callable | None:
    if name in ("flashcore", "portable", "flex"):
        return {"flashcore": flashcore, "portable": portable, "flex": flexible}[name](case, step)
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


def rotated(case: Case, dtype: torch.dtype, device: str) -> list[Step]:
    elements = case.batch * (2 * case.heads * case.queries + 2 * case.kv_heads * case.keys) * case.head_dim
    return [make_step(case, dtype, device) for _ in range(benchmarking.rotations(elements * dtype.itemsize, most=4))]


def compile_case(case: Case, dtype: torch.dtype) -> None:
    """Our kernels once."""
    flashcore(case, make_step(case, dtype, "cuda"))()


def measure(case: Case, names: list[str], forward, dtype: torch.dtype, device: str, rounds: int) -> dict:
    """One row: what every contender reaches, None where it cannot do the case or gave a wrong answer."""
    from flashcore_kernels import path_counts

    steps = rotated(case, dtype, device)
    place = case.batch - 1, case.kv_heads - 1
    want, peers = reference(case, steps[0], *place), yardstick(case, steps[0])
    calls, failed, path = {}, {}, ""
    for name in names:
        try:
            each = [contender(name, case, step, forward) for step in steps]
            if each[0] is None:
                continue
            path_counts.clear()
            if is_right(case, each[0](), peers, want, *place):
                turns = itertools.cycle(each)
                calls[name] = lambda turns=turns: next(turns)()
            else:
                failed[name] = "wrong answer"
            if name == "flashcore":
                path = "+".join(path_counts)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    times = benchmarking.eager_times(calls, rounds=rounds, seconds=0.004)
    row = {"case": case_name(case), "unit": "TFLOP/s"}
    row |= {name: rate(case, times[name]) if name in times else None for name in names}
    return row | {"path": path} | ({"failed": failed} if failed else {})


def case_name(case: Case) -> str:
    return f"backward {str(case).removeprefix('prefill ')}"


def rate(case: Case, microseconds: float) -> float:
    return round(2.5 * case.operations() / microseconds / 1e6, 1)


def chosen_cases(groups: list[str]) -> list[Case]:
    """Those of bench_prefill by head_dim; and a window, packed documents and left padding."""
    more = {
        "window": Case("window", 1, 16384, 16384, 32, 8, 128, 128, window=1024),
        "packed": packed(16384),
        "padded": Case("padded", 8, 2048, 2048, 32, 8, 128, 128, lengths=padded_lengths(8, 1024, 2048)),
    }
    return [case for group in groups for case in ([more[group]] if group in more else cases([group]))]


def peer_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(PEERS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fa3", type=Path, help="folder with FlashAttention-3's binaries")
    parser.add_argument("--peers", type=peer_names, default=["fa3", "fa3_deterministic", "cudnn", "flash"],
                        help=f"of {','.join(PEERS)}, with commas between them")  # fmt: skip
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=GROUPS)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, help="begin no case after that")
    parser.add_argument(
        "--processes", type=int, default=14, help="that compile kernels ahead; 0: none, --minutes 0: no more"
    )
    parser.add_argument("--tiny", action="store_true", help="small cases on the CPU, through the interpreter")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = TINY if arguments.tiny else chosen_cases(arguments.groups)
    chosen = [case for case in chosen if any(text in case_name(case) for text in arguments.only)]
    if not (arguments.tiny or torch.cuda.is_available()):
        print("bench_backward needs a GPU; its cases:", *map(case_name, chosen), sep="\n  ")
        return 1
    # Triton's interpreter multiplies no bfloat16.
    dtype = torch.float16 if arguments.tiny else getattr(torch, arguments.dtype)
    device = "cpu" if arguments.tiny else "cuda"
    # Inductor has no backward of flex_attention on a CPU.
    peers = [name for name in arguments.peers if not (arguments.tiny and name in ("flex", "cudnn"))]
    forward = benchmarking.load_fa3(arguments.fa3) if {"fa3", "fa3_deterministic"} & set(peers) else None
    record, wrong = benchmarking.Record(arguments.json, minutes=arguments.minutes), []
    benchmarking.compile_ahead(functools.partial(compile_case, dtype=dtype), chosen, arguments.processes)
    for case in record.each(chosen, case_name):
        row = measure(case, ["flashcore", *peers], forward, dtype, device, arguments.rounds)
        print(row, flush=True)
        record.add(row)
        if row["flashcore"] is None or "wrong answer" in row.get("failed", {}).values():
            wrong.append(f"{row['case']}: {row['failed']}")
    if wrong:
        print("wrong answers:", *wrong, sep="\n  ")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
