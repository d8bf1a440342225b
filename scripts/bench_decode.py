"""Decode in microseconds beside FlashAttention-3, cuDNN, and a kernel that only reads the same bytes, in one run.

usage: python scripts/bench_decode.py [--json FILE] [--fa3 FOLDER] [--only TEXT ...] [--minutes N]
       python scripts/bench_decode.py --tiny

Each time is that of one call inside a CUDA graph, the median of several replays taken in turn; inputs go round sets
that together are larger than the L2. FA3 is its best over its splits and packings; "read" the best over 24 settings.
What flashcore and the peers answer is held against float64 in the same run, and a wrong answer gets no time.
"flashcore" is called as the peers are, "flashcore_range" as generate() does it: with a KeyRange in device memory. Where
there are more slots than keys, its keys begin behind a padding of another length in each sequence and end before slots
that are not filled yet; the others' are the first ones. "flashcore_paged" and "fa3_paged" have those in pages of 256
keys, all over a pool, with lengths in device memory, as servers do it.
FP8 cases have keys and values in e4m3 with a scale for each head; their peers read 16 bits. `--tiny` runs small cases
on the CPU through Triton's interpreter, to see that all of this works; such times mean nothing.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

if "--tiny" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import benchmarking
import torch
import triton
import triton.language as tl
from flashcore_kernels import Pages, attention, make_key_range, naive_attention, paged_attention, path_counts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

TINY = "--tiny" in sys.argv
SPLITS = (0, 1, 2, 4, 8, 16, 32, 64)  # 0: FA3 chooses
CHECKED = 2  # sequences of a batch that are held against float64
PAGE = 16 if TINY else 256  # keys
DEVICE = "cpu" if TINY else "cuda"
DTYPE = torch.float16 if TINY else torch.bfloat16  # Triton's interpreter multiplies no bfloat16


class Case(NamedTuple):
    """Q query tokens, the last ones, on S keys: `[B, H, Q, D]` and `[B, Hkv, slots, D]` (0: S), DTYPE."""

    batch_size: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    queries: int = 1
    fp8: bool = False
    slots: int = 0

    @property
    def name(self) -> str:
        """Like "decode B1 S2048 H32:8 D128"."""
        tokens = f" Q{self.queries}" if self.queries > 1 else ""
        return (
            f"decode{'-fp8' if self.fp8 else ''} B{self.batch_size} S{self.keys} H{self.heads}:{self.kv_heads} "
            f"D{self.head_dim}{tokens}{f' in {self.slots} slots' if self.slots else ''}"
        )

    @property
    def bytes(self) -> int:
        """Of keys and values that are seen."""
        return 2 * self.batch_size * self.kv_heads * self.keys * self.head_dim * (1 if self.fp8 else 2)


CASES = [
    Case(1, 2048, 32, 8, 128), Case(1, 8192, 32, 8, 128), Case(1, 32768, 32, 8, 128), Case(1, 131072, 32, 8, 128),
    Case(16, 2048, 8, 8, 64), Case(16, 2048, 32, 8, 128), Case(16, 8192, 32, 8, 128), Case(64, 4096, 32, 8, 128),
    Case(8, 4096, 32, 8, 128), Case(8, 4096, 32, 8, 128, 4),
    Case(16, 2048, 8, 8, 64, fp8=True), Case(16, 2048, 32, 8, 128, fp8=True), Case(16, 8192, 32, 8, 128, fp8=True),
    Case(64, 4096, 32, 8, 128, fp8=True), Case(1, 32768, 32, 8, 128, fp8=True),
    Case(1, 8192, 32, 8, 64), Case(16, 4096, 32, 8, 64), Case(1, 8192, 16, 8, 256), Case(16, 4096, 16, 8, 256),
    Case(4, 8192, 32, 1, 128), Case(4, 4096, 28, 4, 128),
    Case(1, 2048, 32, 8, 128, slots=32768), Case(16, 2048, 8, 8, 64, slots=4096),
    Case(16, 2048, 32, 8, 128, slots=4096), Case(16, 4096, 32, 8, 64, slots=8192),
    Case(16, 8192, 32, 8, 128, fp8=True, slots=16384),
]  # fmt: skip
SMALL = [
    Case(2, 64, 4, 2, 32), Case(2, 64, 4, 2, 32, 3), Case(2, 64, 4, 2, 32, fp8=True), Case(2, 64, 4, 2, 32, slots=96),
]  # fmt: skip


@triton.jit
def read_kernel(Data, Out, chunk, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """Program p adds up int32 words [p * chunk, (p + 1) * chunk); chunk is a multiple of BLOCK * UNROLL."""
    base = Data + tl.program_id(0).to(tl.int64) * chunk
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(0, chunk, BLOCK * UNROLL):
        for i in tl.static_range(UNROLL):
            total += tl.load(base + start + i * BLOCK + offsets)
    tl.store(Out + tl.program_id(0), tl.sum(total))


def read_call(data: torch.Tensor, block: int, unroll: int, warps: int, programs: int):
    """A call that reads all of `data` (int32), or None where it does not divide so."""
    words = data.numel()
    while programs > 1 and words % (programs * block * unroll):
        programs //= 2
    if words % (programs * block * unroll) or programs < 64:
        return None
    out = torch.empty(programs, dtype=torch.int32, device=data.device)

    def call():
        read_kernel[(programs,)](data, out, words // programs, BLOCK=block, UNROLL=unroll, num_warps=warps)

    return call


def best(contenders: dict, count: int) -> tuple[str, list]:
    """Of name -> calls, the fastest."""
    times = benchmarking.graph_times(contenders, calls=count, rounds=5)
    name = min(times, key=times.get)
    return name, contenders[name]


class Inputs:
    """One set of inputs. Keys and values lie in one piece of memory, so that the read kernel can go through it."""

    def __init__(self, case: Case, seed: int):
        generator = torch.Generator(DEVICE).manual_seed(seed)
        slots = case.slots or case.keys
        shape = (2, case.batch_size, case.kv_heads, slots, case.head_dim)
        self.query = torch.randn(
            case.batch_size, case.queries, case.heads, case.head_dim, device=DEVICE, generator=generator
        ).to(DTYPE).transpose(1, 2)  # fmt: skip
        self.pair = torch.empty(shape, dtype=DTYPE, device=DEVICE)
        for part in self.pair.flatten(0, 1):  # a piece at a time: float32 would need twice the memory
            part.copy_(torch.randn(part.shape, device=DEVICE, generator=generator))
        self.scales = (None, None)
        if case.fp8:
            from flashcore_hf.cache.quantize import head_scales, quantize

            # The same for all sequences, because pages have one a head.
            self.scales = tuple(head_scales(part).amax(0).repeat(case.batch_size, 1) for part in self.pair)
            stored = torch.empty(shape, dtype=torch.float8_e4m3fn, device=DEVICE)
            for target, part, scale in zip(stored, self.pair, self.scales):
                target.copy_(quantize(part, scale))
            self.pair = stored
        self.key, self.value = self.pair[:, :, :, : case.keys]
        self.first = [b * 197 % (slots - case.keys + 1) for b in range(case.batch_size)]
        first = torch.tensor(self.first, dtype=torch.int32, device=DEVICE)
        end = first + case.keys
        self.range = make_key_range(
            case.batch_size, slots, first=first, end=end, query_start=end - case.queries, right=0
        )

        self.pages = self._paged(case)

    def _paged(self, case: Case) -> Pages:
        """The keys that all are shown, in pages in any order."""
        width = -(-case.keys // PAGE)
        order = torch.randperm(case.batch_size * width, device=DEVICE)
        shape = (case.batch_size * width, PAGE, case.kv_heads, case.head_dim)
        # As bytes, because fp8 cannot be indexed everywhere.
        pools = [
            part.transpose(1, 2).reshape(shape).view(torch.uint8)[order.argsort()].view(part.dtype)
            for part in (self.key, self.value)
        ]
        queries = torch.arange(case.batch_size + 1, dtype=torch.int32, device=DEVICE) * case.queries
        lengths = torch.full((case.batch_size,), case.keys, dtype=torch.int32, device=DEVICE)
        scales = (scale if scale is None else scale[0].contiguous() for scale in self.scales)
        table = order.view(case.batch_size, width).int()
        return Pages(*pools, table, queries, lengths, 0, *scales)

    def attend_pages(self) -> torch.Tensor:
        """`[B, H, Q, D]`"""
        rows = self.query.transpose(1, 2)
        output = paged_attention(rows.flatten(0, 1), self.pages, max_queries=1 if rows.shape[1] == 1 else None)
        return output.view(rows.shape).transpose(1, 2)

    def options(self) -> dict:
        key_scale, value_scale = self.scales
        return {} if key_scale is None else {"key_scale": key_scale, "value_scale": value_scale}

    def reference(self, padded: bool = False) -> tuple[torch.Tensor, float]:
        """Float64 of what is stored (quantising is not the kernel's error), and how far an answer may be from it.

        That is twice as far as SDPA's is, and two roundings of the output.

        Args:
            padded: of the keys that the KeyRange shows, else of the first ones.
        """
        keys = self.key.shape[2]
        starts = [first if padded else 0 for first in self.first[:CHECKED]]
        key, value = (
            torch.stack([part[b, :, first : first + keys] for b, first in enumerate(starts)]).double()
            * (1.0 if scale is None else scale[:CHECKED, :, None, None].double())
            for part, scale in zip(self.pair, self.scales)
        )
        query = self.query[:CHECKED]
        exact = naive_attention(query.double(), key, value, is_causal=True)[0]
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=DEVICE).tril(
            key.shape[2] - query.shape[2]
        )
        answer = scaled_dot_product_attention(
            query, key.to(query.dtype), value.to(query.dtype), attn_mask=mask, enable_gqa=True
        )
        return exact, 2 * benchmarking.errors(answer, exact)[0] + 2.0**-8 * exact.abs().max().item()


def contenders_of(case: Case, inputs: list[Inputs], fa3) -> dict:
    """name -> a call for each set of inputs; each returns `[B, H, Q, D]`."""
    found = {
        "flashcore": [lambda i=i: attention(i.query, i.key, i.value, is_causal=True, **i.options()) for i in inputs],
        "flashcore_range": [lambda i=i: attention(i.query, *i.pair, key_range=i.range, **i.options()) for i in inputs],
        "flashcore_paged": [i.attend_pages for i in inputs],
    }
    if case.fp8:
        return found
    if case.queries == 1:  # SDPA's is_causal would mean the first keys

        def cudnn(i):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(i.query, i.key, i.value, enable_gqa=case.heads != case.kv_heads)

        found["cudnn"] = [lambda i=i: cudnn(i) for i in inputs]
    if fa3 is not None:
        found["fa3"] = best_fa3(case, inputs, fa3, paged=False)
        found["fa3_paged"] = best_fa3(case, inputs, fa3, paged=True)
    return found


def best_fa3(case: Case, inputs: list[Inputs], fa3, paged: bool) -> list:
    """Calls of FA3 with its best splits and packing."""

    def call(i, splits, pack):
        keys, pages = (i.key.transpose(1, 2), i.value.transpose(1, 2)), {}
        if paged:
            keys, pages = i.pages[:2], {"page_table": i.pages.block_table, "seqused_k": i.pages.key_lengths}
        output = fa3(
            i.query.transpose(1, 2), *keys, is_causal=case.queries > 1, softmax_scale=case.head_dim**-0.5,
            num_splits=splits, pack_gqa=pack, **pages,
        )[0]  # fmt: skip
        return output.transpose(1, 2)

    settings = {
        f"num_splits={splits} pack_gqa={pack}": [lambda i=i, s=splits, p=pack: call(i, s, p) for i in inputs]
        for splits in SPLITS
        for pack in (None, True)
    }
    name, calls = best(settings, max(len(inputs), 8))
    print(f"  best FA3{' in pages' if paged else ''}: {name}", flush=True)
    return calls


def readers(case: Case, inputs: list[Inputs]) -> list | None:
    """The fastest kernel that only reads keys and values."""
    if TINY:
        return None
    settings = {}
    for programs in (128, 256, 512, 1024, 2048, 4096):
        for block, unroll, warps in ((1024, 4, 4), (2048, 4, 8), (4096, 2, 8), (1024, 8, 4)):
            words = case.bytes // 4  # side by side, wherever they are
            calls = [
                read_call(i.pair.view(torch.int32).view(-1)[:words], block, unroll, warps, programs) for i in inputs
            ]
            if None not in calls:
                settings[f"{programs} x {block} x {unroll}, {warps} warps"] = calls
    return best(settings, max(len(inputs), 8))[1] if settings else None


def compile_case(case: Case) -> None:
    """Our kernels once."""
    for name, calls in contenders_of(case, [Inputs(case, 0)], None).items():
        if name.startswith("flashcore"):
            calls[0]()


def measure(case: Case, fa3, rounds: int) -> dict:
    """One row."""
    row = {"case": case.name, "unit": "us"}
    inputs = [Inputs(case, seed) for seed in range(benchmarking.rotations(case.bytes))]
    contenders, paths = {}, {}
    for name, calls in contenders_of(case, inputs, fa3).items():
        try:
            path_counts.clear()
            reference, allowed = inputs[0].reference(padded=name == "flashcore_range")
            largest, rms = benchmarking.errors(calls[0]()[:CHECKED], reference)
            if name.startswith("flashcore"):
                paths[name] = "+".join(path_counts)
        except Exception as error:  # noqa: BLE001 - a peer that cannot is left out, and the row says so
            row[f"{name} failed"] = f"{type(error).__name__}: {error}"[:200]
            continue
        row[f"{name}_error"] = float(f"{largest:.3g}")
        if not largest <= allowed:
            row[f"{name} failed"] = f"wrong: error {largest:.3g} ({rms:.3g} RMS), at most {allowed:.3g} allowed"
            continue
        contenders[name] = calls
    reading = readers(case, inputs)
    if reading is not None:
        contenders["read"] = reading
    count = max(len(inputs), min(64, int(2e9 / case.bytes) + 1))
    times = benchmarking.graph_times(contenders, calls=count, rounds=rounds)
    row.update({name: round(time, 2) for name, time in times.items()})
    row["paths"] = paths
    if "flashcore" in times:
        row["GB/s"] = round(case.bytes / times["flashcore"] / 1e3)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="decode-h200.json of the results, where not --tiny")
    parser.add_argument("--fa3", type=Path, help="folder with FlashAttention-3's binaries")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, help="begin no case after that")
    parser.add_argument(
        "--processes", type=int, default=14, help="that compile kernels ahead; 0: none, --minutes 0: no more"
    )
    parser.add_argument("--tiny", action="store_true", help="small cases on the CPU, through the interpreter")
    arguments = parser.parse_args()
    fa3 = benchmarking.load_fa3(arguments.fa3)
    if fa3 is None:
        print("FlashAttention-3 is not there: rows have no fa3", flush=True)
    cases = [case for case in (SMALL if TINY else CASES) if any(text in case.name for text in arguments.only)]
    record = benchmarking.Record(benchmarking.target(arguments, "decode-h200.json"), minutes=arguments.minutes)
    benchmarking.compile_ahead(compile_case, cases, arguments.processes)
    failed = []
    for case in record.each(cases, lambda case: case.name):
        row = measure(case, fa3, arguments.rounds)
        print(row, flush=True)
        record.add(row)
        if not TINY:
            torch.cuda.empty_cache()
        if any(key.startswith("flashcore") and key.endswith("failed") for key in row):
            failed.append(case.name)
    for name in failed:
        print(f"WRONG: {name}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
