"""Prefill on one GPU beside its peers: rates of the kernels, and of a whole model's forward.

usage: python scripts/bench_prefill.py --fa3 FOLDER [--peers fa3,cudnn,...] [--groups ...] [--minutes N] [--json FILE]
       python scripts/bench_prefill.py --tiny

`paged` and `varlen` are this library's too: the same keys in pages of 256, and sequences behind each other; `fa3_paged`
is FlashAttention-3 on such pages, `portable` this library's Triton forward, the kernel of every other GPU, `flash`
PyTorch's FlashAttention-2. `fa3` needs FlashAttention-3's binaries, see benchmarking.load_fa3.

Every contender gets the same random inputs, which rotate so that none lies in the L2 from the call before. Its output
is held against float64 on a sample of rows first, by the error rule of the tests; what fails it gets no time. Times are
medians of rounds in which the contenders take turns. `--tiny` runs small cases on the CPU through Triton's interpreter,
to see that all of this works; such times mean nothing.
"""

import argparse
import functools
import itertools
import os
import statistics
import sys
import time
from pathlib import Path

if "--tiny" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))

import benchmarking
import torch
import torch.nn.functional as F
from prefill_cases import GROUPS, TINY, Case, Inputs, cases, make, padded_lengths
from prefill_contenders import OURS, PEERS, contender, fa3

MAX_RATIO, RMS_RATIO = 2.0, 1.5


def sampled_rows(case: Case, x: Inputs, output: torch.Tensor, dtype: torch.dtype = torch.float64):
    """(what float64 answers, what SDPA in the inputs' dtype answers, `output`) on a sample: three heads, 96 rows."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for i in range(3):
        b, h = (case.batch - 1) * i // 2, (case.heads - 1) * i // 2
        rows = torch.randint(case.queries, (96,), generator=generator).to(output.device)
        seen = case.visible(b, rows)
        rows, seen = rows[seen.any(1)], seen[seen.any(1)]
        kv = h * case.kv_heads // case.heads
        query, key, value = x.query[b, h, rows], x.key[b, kv], x.value[b, kv]
        scores = (query.double() @ key.double().T * case.head_dim**-0.5).masked_fill(~seen, -torch.inf)
        want = scores.softmax(-1) @ value.double()
        peer = F.scaled_dot_product_attention(query[None, None], key[None, None], value[None, None], attn_mask=seen)
        parts.append((want, peer[0, 0], output[b, h, rows]))
    return (torch.cat(each) for each in zip(*parts))


def is_right(case: Case, x: Inputs, output: torch.Tensor) -> bool:
    """The tests' error rule on a sample of rows."""
    want, peer, got = sampled_rows(case, x, output)
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
    x = make(case, dtype)
    for name in ("flashcore", *names):
        if name in OURS and (call := contender(name, case, x, None)) is not None:
            call()


def measure(case: Case, names: list[str], forward, dtype: torch.dtype, device: str, rounds: int) -> dict:
    """One row: what every contender reaches, None where it cannot do the case or gave a wrong answer."""
    from flashcore_kernels import path_counts

    size = sum(t.numel() * t.element_size() for t in make_meta(case, dtype))
    sets = [make(case, dtype, device) for _ in range(benchmarking.rotations(size, most=8))]
    calls, failed, paths = {}, {}, {}
    for name in names:
        try:
            each = [contender(name, case, x, forward) for x in sets]
            if each[0] is None:
                continue
            path_counts.clear()
            if is_right(case, sets[0], each[0]()):
                turns = itertools.cycle(each)
                calls[name] = lambda turns=turns: next(turns)()
            else:
                failed[name] = "wrong answer"
            if name in OURS:
                paths[name] = "+".join(path_counts)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    times = benchmarking.eager_times(calls, rounds=rounds, seconds=0.004)
    row = {"case": str(case), "unit": "us" if case.lengths else "TFLOP/s"}
    for name in names:
        if name not in times:
            row[name] = None
        elif case.lengths:
            row[name] = round(times[name], 1)
        else:
            row[name] = round(case.operations() / times[name] / 1e6, 1)
    row["paths"] = paths
    return row | ({"failed": failed} if failed else {})


def make_meta(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """The inputs' and the output's sizes without their memory."""
    shapes = (
        (case.heads, case.queries, case.head_dim), (case.kv_heads, case.keys, case.head_dim),
        (case.kv_heads, case.keys, case.value_dim), (case.heads, case.queries, case.value_dim),
    )  # fmt: skip
    return [torch.empty(case.batch, *shape, dtype=dtype, device="meta") for shape in shapes]


MODEL_CELLS = {"B1 S32768": (1, 32768, False), "B2 S8192": (2, 8192, True), "B8 S2048": (8, 2048, True)}


def cell_name(cell: str) -> str:
    return f"model {cell}{' left-padded' if MODEL_CELLS[cell][2] else ''} Llama-3.1-8B prefill"


@functools.cache
def large_model(device: str, layers: int | None, tiny: bool):
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    import flashcore_hf  # noqa: F401
    from tests.gpu.large_models import make_model

    def zeros(module, query, key, value, attention_mask, **kwargs):
        return torch.zeros_like(query.transpose(1, 2)), None

    AttentionInterface.register("zeros", zeros)
    ALL_MASK_ATTENTION_FUNCTIONS["zeros"] = lambda **kwargs: None
    return make_model("Llama-3.1-8B", device=device, layers=1 if tiny else layers, tiny=tiny)


def model_row(cell: str, rounds: int, forward, device: str, layers: int | None, tiny: bool) -> dict:
    """Prefill of Llama-3.1-8B's shape: milliseconds with flashcore, sdpa, and an attention that returns zeros."""
    model = large_model(device, layers, tiny)
    batch, length, padded = MODEL_CELLS[cell]
    if tiny:
        length = 32
    ids = torch.randint(3, model.config.vocab_size, (batch, length), device=device)
    mask = torch.ones_like(ids)
    lengths = padded_lengths(batch, length // 2, length) if padded else (length,)
    for b, real in enumerate(lengths):
        mask[b, : length - real] = 0
    memory: dict[str, int] = {}
    times: dict[str, list[float]] = {}
    cuda = device == "cuda"
    for _ in range(rounds + 1):
        for backend in ("flashcore", "sdpa", "zeros"):
            model.set_attn_implementation(backend)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            began = time.perf_counter()
            with torch.no_grad():
                model(ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
            if cuda:
                torch.cuda.synchronize()
                memory[backend] = torch.cuda.max_memory_allocated()
            times.setdefault(backend, []).append((time.perf_counter() - began) * 1e3)
    # The first round warms up.
    row = {"case": cell_name(cell), "unit": "ms"}
    row |= {backend: round(statistics.median(each[1:]), 1) for backend, each in times.items()}
    row["peak_bytes"] = memory
    if not padded and forward is not None:
        case = Case("prefill", batch, length, length, 32, 8, 128, 128)
        x = make(case, torch.bfloat16)
        fa3_us = benchmarking.eager_times({"fa3": fa3(case, x, forward)}, rounds=5, seconds=0.0)["fa3"]
        row["attention_ms_a_layer"] = round((row["flashcore"] - row["zeros"]) / model.config.num_hidden_layers, 3)
        row["fa3_ms_a_layer"] = round(fa3_us / 1e3, 3)
    return row


def peer_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(PEERS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fa3", type=Path, help="folder with FlashAttention-3's binaries")
    parser.add_argument("--peers", type=peer_names, default=["paged", "varlen", "fa3", "fa3_paged", "cudnn", "flash"],
                        help=f"of {','.join(PEERS)}, with commas between them")  # fmt: skip
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=[*GROUPS, "model"])
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, help="begin no case after that")
    parser.add_argument(
        "--processes", type=int, default=14, help="that compile kernels ahead; 0: none, --minutes 0: no more"
    )
    parser.add_argument("--layers", type=int, help="of the model, for a quick look")
    parser.add_argument("--tiny", action="store_true", help="small cases on the CPU, through the interpreter")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = TINY if arguments.tiny else cases(arguments.groups)
    chosen = [case for case in chosen if any(text in str(case) for text in arguments.only)]
    if not (arguments.tiny or torch.cuda.is_available()):
        print("bench_prefill needs a GPU; its cases:", *map(str, chosen), sep="\n  ")
        return 1
    device = "cpu" if arguments.tiny else "cuda"
    # Triton's interpreter multiplies no bfloat16.
    dtype = torch.float16 if arguments.tiny else getattr(torch, arguments.dtype)
    peers = [name for name in arguments.peers if not (arguments.tiny and name in ("flex", "portable"))]
    forward = benchmarking.load_fa3(arguments.fa3) if {"fa3", "fa3_paged"} & set(peers) else None
    compiling = functools.partial(compile_case, names=peers, dtype=dtype)
    record, wrong = benchmarking.Record(arguments.json, minutes=arguments.minutes), []
    benchmarking.compile_ahead(compiling, chosen, arguments.processes)
    for case in record.each(chosen):
        with torch.no_grad():
            row = measure(case, ["flashcore", *peers], forward, dtype, device, arguments.rounds)
        print(row, flush=True)
        record.add(row)
        if {"flashcore", "paged", "varlen"} & row.get("failed", {}).keys():
            wrong.append(row["case"])
    for cell in record.each(MODEL_CELLS if "model" in arguments.groups else [], cell_name):
        row = model_row(cell, min(arguments.rounds, 3), forward, device, arguments.layers, arguments.tiny)
        print(row, flush=True)
        record.add(row)
    if wrong:
        print("flashcore failed:", *wrong, sep="\n  ")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
