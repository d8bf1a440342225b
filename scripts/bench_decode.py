"""Decode in microseconds beside FlashAttention-3, cuDNN, and a kernel that only reads the same bytes, in one run.

usage: python scripts/bench_decode.py [--json FILE] [--peers FOLDER] [--only TEXT ...]

Each time is that of one call inside a CUDA graph, the median of several replays taken in turn; inputs go round sets
that together are larger than the L2. FA3 is its best over its splits and packings; "read" the best over 24 settings.
What flashcore and the peers answer is held against float64 in the same run, and a wrong answer gets no time.
"flashcore" is called as the peers are, "flashcore_range" as generate() does it: with a KeyRange in device memory. Where
there are more slots than keys, its keys begin behind a padding of another length in each sequence and end before slots
that are not filled yet; the others' are the first ones.
FP8 cases have keys and values in e4m3 with a scale for each sequence and head; their peers read 16 bits.
"""

import argparse
import inspect
import sys
from pathlib import Path
from typing import NamedTuple

import benchmarking
import torch
import triton
import triton.language as tl
from flashcore_kernels import attention, make_key_range, naive_attention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SPLITS = (0, 1, 2, 4, 8, 16, 32, 64)  # 0: FA3 chooses
CHECKED = 2  # sequences of a batch that are held against float64


class Case(NamedTuple):
    """Q query tokens, the last ones, on S keys: `[B, H, Q, D]` and `[B, Hkv, slots, D]` (0: S), bfloat16."""

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
        generator = torch.Generator("cuda").manual_seed(seed)
        slots = case.slots or case.keys
        shape = (2, case.batch_size, case.kv_heads, slots, case.head_dim)
        self.query = torch.randn(
            case.batch_size, case.queries, case.heads, case.head_dim, device="cuda", generator=generator
        ).bfloat16().transpose(1, 2)  # fmt: skip
        self.pair = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        for part in self.pair.flatten(0, 1):  # a piece at a time: float32 would need twice the memory
            part.copy_(torch.randn(part.shape, device="cuda", generator=generator))
        self.scales = (None, None)
        if case.fp8:
            from flashcore_hf.cache.quantize import head_scales, quantize

            self.scales = tuple(head_scales(part) for part in self.pair)
            stored = torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda")
            for target, part, scale in zip(stored, self.pair, self.scales):
                target.copy_(quantize(part, scale))
            self.pair = stored
        self.key, self.value = self.pair[:, :, :, : case.keys]
        self.first = [b * 197 % (slots - case.keys + 1) for b in range(case.batch_size)]
        first = torch.tensor(self.first, dtype=torch.int32, device="cuda")
        end = first + case.keys
        self.range = make_key_range(
            case.batch_size, slots, first=first, end=end, query_start=end - case.queries, right=0
        )

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
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device="cuda").tril(
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
    }
    if case.fp8:
        return found
    if case.queries == 1:  # SDPA's is_causal would mean the first keys

        def cudnn(i):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(i.query, i.key, i.value, enable_gqa=case.heads != case.kv_heads)

        found["cudnn"] = [lambda i=i: cudnn(i) for i in inputs]
    if fa3 is not None:

        def fa3_call(i, splits, pack):
            output = fa3(
                i.query.transpose(1, 2), i.key.transpose(1, 2), i.value.transpose(1, 2), is_causal=case.queries > 1,
                softmax_scale=case.head_dim**-0.5, num_splits=splits, pack_gqa=pack,
            )[0]  # fmt: skip
            return output.transpose(1, 2)

        settings = {
            f"fa3 num_splits={splits} pack_gqa={pack}": [
                lambda i=i, s=splits, p=pack: fa3_call(i, s, p) for i in inputs
            ]
            for splits in SPLITS
            for pack in (None, True)
        }
        name, calls = best(settings, max(len(inputs), 8))
        found["fa3"] = calls
        print(f"  best FA3: {name}", flush=True)
    return found


def readers(case: Case, inputs: list[Inputs]) -> list | None:
    """The fastest kernel that only reads keys and values."""
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


def measure(case: Case, fa3, rounds: int) -> dict:
    """One row."""
    row = {"case": case.name, "unit": "us"}
    inputs = [Inputs(case, seed) for seed in range(benchmarking.rotations(case.bytes))]
    contenders = {}
    for name, calls in contenders_of(case, inputs, fa3).items():
        try:
            reference, allowed = inputs[0].reference(padded=name == "flashcore_range")
            largest, rms = benchmarking.errors(calls[0]()[:CHECKED], reference)
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
    if "flashcore" in times:
        row["GB/s"] = round(case.bytes / times["flashcore"] / 1e3)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=benchmarking.RESULTS / "decode-h200.json")
    parser.add_argument("--peers", type=Path, help="folder of FA3's binaries (see benchmarking.load_fa3)")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    fa3 = benchmarking.load_fa3(arguments.peers)
    if fa3 is None:
        print("FlashAttention-3 is not there: rows have no fa3", flush=True)
    rows = []
    for case in CASES:
        if not any(text in case.name for text in arguments.only):
            continue
        if case.fp8 and "key_scale" not in inspect.signature(attention).parameters:
            continue
        row = measure(case, fa3, arguments.rounds)
        rows.append(row)
        print(row, flush=True)
        torch.cuda.empty_cache()
        benchmarking.write(arguments.json, rows)
    failed = [row["case"] for row in rows if any(key.startswith("flashcore") and key.endswith("failed") for key in row)]
    for case in failed:
        print(f"WRONG: {case}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
