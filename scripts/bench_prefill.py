"""Prefill on one GPU beside its peers: rates of the kernels, and of a whole model's forward.

usage: python scripts/bench_prefill.py --fa3 FOLDER [--peers fa3,cudnn,flash,flex,portable] [--groups ...] [--json F]

Every contender gets the same random inputs, which rotate so that none lies in the L2 from the call before. Its output
is held against float64 on a sample of rows first, by the error rule of the tests; what fails it gets no time. Times are
medians of rounds in which the contenders take turns. `fa3` needs FlashAttention-3's binaries, see
benchmarking.load_fa3; `portable` is this library's Triton forward, the kernel of every other GPU; `flash` is PyTorch's
FlashAttention-2.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import benchmarking
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

MAX_RATIO, RMS_RATIO = 2.0, 1.5
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
TOKENS = 16384
PEERS = ("fa3", "cudnn", "flash", "flex", "portable")


class Case(NamedTuple):
    """One prefill.

    Attributes:
        kind: "prefill", "window", "chunked" or "padded" (left), the first word of its name.
        window: keys that a query sees, itself included.
        lengths: of each sequence, where they are padded.
    """

    kind: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool = True
    window: int | None = None
    lengths: tuple[int, ...] = ()

    def __str__(self):
        size = f"S{self.keys}" if self.queries == self.keys else f"Q{self.queries} K{self.keys}"
        dims = f"D{self.head_dim}" + (f"/{self.value_dim}" if self.value_dim != self.head_dim else "")
        more = f" W{self.window}" if self.window else ""
        pattern = "causal" if self.causal else "full"
        return f"{self.kind} B{self.batch} {size} H{self.heads}:{self.kv_heads} {dims} {pattern}{more}"

    def visible(self, sequence: int, rows: torch.Tensor) -> torch.Tensor:
        """bool `[rows, K]`: which keys these queries of a sequence see."""
        slot = torch.arange(self.keys, device=rows.device)
        stands = (rows + self.keys - self.queries)[:, None]
        seen = torch.ones(len(rows), self.keys, dtype=torch.bool, device=rows.device)
        if self.causal:
            seen &= slot <= stands
        if self.window:
            seen &= slot > stands - self.window
        if self.lengths:
            seen &= slot >= self.keys - self.lengths[sequence]
        return seen

    def operations(self) -> float:
        """Floating-point operations that the answer takes: 2 for each element of each visible pair's two products."""
        if self.lengths:
            pairs = sum(length * (length + 1) / 2 for length in self.lengths)
        elif not self.causal:
            pairs = self.batch * self.queries * self.keys
        else:
            # Half of the square, as everybody counts; a window or earlier keys change that.
            before = self.keys - self.queries
            pairs = self.batch * (self.queries * before + self.queries**2 / 2)
            if self.window and self.window < self.keys:
                pairs -= self.batch * (self.keys - self.window) ** 2 / 2
        return 2.0 * self.heads * pairs * (self.head_dim + self.value_dim)


class Inputs(NamedTuple):
    """`[B, H, S, D]` views of `[B, S, H, D]` memory, as models have them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def padded_lengths(batch: int, shortest: int, longest: int) -> tuple[int, ...]:
    return tuple(shortest + (longest - shortest) * i // (batch - 1) for i in range(batch))


def cases(groups: list[str]) -> list[Case]:
    """The published cases: B * S = 16K tokens where nothing else is said."""
    out = []
    shapes = {"d128": (32, 8, 128, 128), "d64": (32, 32, 64, 64), "d256": (8, 8, 256, 256),
              "d96": (32, 32, 96, 96), "mla": (16, 16, 192, 128)}  # fmt: skip
    for group in groups:
        if group in shapes:
            lengths = LENGTHS if group in ("d128", "d64", "d256") else (2048, 8192)
            for length, causal in itertools.product(lengths, (True, False)):
                out.append(Case("prefill", TOKENS // length, length, length, *shapes[group], causal))
    if "more" in groups:
        out += [
            Case("window", 1, 16384, 16384, 32, 8, 128, 128, window=4096),
            Case("chunked", 1, 512, 8192, 32, 8, 128, 128),
            Case("padded", 8, 2048, 2048, 32, 8, 128, 128, lengths=padded_lengths(8, 1024, 2048)),
        ]
    return out


def make(case: Case, dtype: torch.dtype) -> Inputs:
    def one(heads, length, dim):
        return torch.randn(case.batch, length, heads, dim, dtype=dtype, device="cuda").transpose(1, 2)

    return Inputs(
        one(case.heads, case.queries, case.head_dim),
        one(case.kv_heads, case.keys, case.head_dim),
        one(case.kv_heads, case.keys, case.value_dim),
    )


# Each contender: a function from a case and inputs to a call that answers `[B, H, Q, Dv]`, or None where it cannot.


def flashcore(case: Case, x: Inputs, portable: bool = False) -> Callable | None:
    from flashcore_kernels import attention, make_key_range, op, path_counts
    from flashcore_kernels.runtime import prepared

    arguments = {"is_causal": case.causal, "window": case.window}
    if case.lengths:
        first = torch.tensor([case.keys - length for length in case.lengths], device="cuda")
        arguments = {"key_range": make_key_range(case.batch, case.keys, first=first, right=0)}
    device = op.device_of(x.query.device)

    def call():
        return attention(*x, **arguments)

    def call_portable():
        # With a Triton that is too old for the Hopper kernel, which no call like this one was served by before.
        op.device_of, prepared._calls = (lambda _: device._replace(triton=(0, 0))), prepared_portable
        try:
            return attention(*x, **arguments)
        finally:
            op.device_of, prepared._calls = original, prepared_others

    if not portable:
        return call
    original, prepared_others, prepared_portable = op.device_of, prepared._calls, {}
    path_counts.clear()
    for _ in range(2):
        call_portable()
    if set(path_counts) != {"flashcore_forward"}:
        raise RuntimeError(f"the portable kernel was to be timed, and {dict(path_counts)} served the call")
    return call_portable


def fa3(case: Case, x: Inputs, forward) -> Callable | None:
    if forward is None:
        return None
    query, key, value = (t.transpose(1, 2) for t in x)
    arguments = {"softmax_scale": case.head_dim**-0.5, "is_causal": case.causal, "num_splits": 1}
    if case.window:
        arguments |= {"window_size_left": case.window - 1, "window_size_right": 0}
    if case.kind == "chunked":
        # Few tiles: its own choice of splits and of packed heads is its best.
        arguments |= {"num_splits": 0, "pack_gqa": None}
    if not case.lengths:
        return lambda: forward(query, key, value, **arguments)[0].transpose(1, 2)

    # Left padding, as Transformers does it: the tokens that exist packed, and the answer scattered back.
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")
    exists = torch.arange(case.keys, device="cuda") >= case.keys - lengths[:, None]
    tokens = exists.flatten().nonzero().flatten()
    bounds = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = max(case.lengths)

    def call():
        packed = [t.flatten(0, 1).index_select(0, tokens) for t in (query, key, value)]
        answer = forward(
            *packed, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest, max_seqlen_k=longest, **arguments
        )[0]
        out = answer.new_zeros(case.batch * case.queries, case.heads, case.value_dim).index_copy_(0, tokens, answer)
        return out.unflatten(0, (case.batch, case.queries)).transpose(1, 2)

    return call


def fused(case: Case, x: Inputs, backend: SDPBackend) -> Callable | None:
    """PyTorch's SDPA with one of its fused kernels."""
    mask = None
    if case.window or (case.causal and case.queries != case.keys) or case.lengths:
        if backend is SDPBackend.FLASH_ATTENTION or case.keys > 8192:
            return None
        rows = torch.arange(case.queries, device="cuda")
        mask = torch.stack([case.visible(b, rows) for b in range(case.batch if case.lengths else 1)])[:, None]

    def call():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                *x, attn_mask=mask, is_causal=case.causal and mask is None, enable_gqa=case.heads != case.kv_heads
            )

    return call


def flex(case: Case, x: Inputs) -> Callable | None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    first = torch.tensor([case.keys - length for length in case.lengths] or [0] * case.batch, device="cuda")
    offset, window = case.keys - case.queries, case.window or 1 << 30

    def seen(b, h, q, k):
        return (k <= q + offset) & (k > q + offset - window) & (k >= first[b])

    mask = None
    if case.causal:
        batch = case.batch if case.lengths else None
        mask = create_block_mask(seen, batch, None, case.queries, case.keys, device="cuda")
    global _flex
    _flex = _flex or torch.compile(flex_attention, dynamic=False)
    return lambda: _flex(*x, block_mask=mask, enable_gqa=case.heads != case.kv_heads)


_flex = None


def contender(name: str, case: Case, x: Inputs, forward) -> Callable | None:
    if name in ("flashcore", "portable"):
        return flashcore(case, x, name == "portable")
    if name == "fa3":
        return fa3(case, x, forward)
    if name == "flex":
        return flex(case, x)
    return fused(case, x, {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[name])


def sampled_rows(case: Case, x: Inputs, output: torch.Tensor, dtype: torch.dtype = torch.float64):
    """(what float64 answers, what SDPA in the inputs' dtype answers, `output`) on a sample: three heads, 96 rows."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for i in range(3):
        b, h = (case.batch - 1) * i // 2, (case.heads - 1) * i // 2
        rows = torch.randint(case.queries, (96,), generator=generator).to("cuda")
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


def measure(case: Case, names: list[str], forward, dtype: torch.dtype, rounds: int) -> dict:
    """One row: what every contender reaches, None where it cannot do the case or gave a wrong answer."""
    size = sum(t.numel() * t.element_size() for t in make_meta(case, dtype))
    sets = [make(case, dtype) for _ in range(benchmarking.rotations(size, most=8))]
    calls, failed = {}, {}
    for name in names:
        try:
            each = [contender(name, case, x, forward) for x in sets]
            if each[0] is None:
                continue
            if is_right(case, sets[0], each[0]()):
                turns = itertools.cycle(each)
                calls[name] = lambda turns=turns: next(turns)()
            else:
                failed[name] = "wrong answer"
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
    if failed:
        row["failed"] = failed
    return row


def make_meta(case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """The inputs' and the output's sizes without their memory."""
    shapes = (
        (case.heads, case.queries, case.head_dim), (case.kv_heads, case.keys, case.head_dim),
        (case.kv_heads, case.keys, case.value_dim), (case.heads, case.queries, case.value_dim),
    )  # fmt: skip
    return [torch.empty(case.batch, *shape, dtype=dtype, device="meta") for shape in shapes]


MODEL_CELLS = {"B1 S32768": (1, 32768, False), "B2 S8192": (2, 8192, True), "B8 S2048": (8, 2048, True)}


def model_rows(rounds: int, forward, layers: int | None) -> Iterator[dict]:
    """Prefill of Llama-3.1-8B's shape: milliseconds with flashcore, sdpa, and an attention that returns zeros."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    import flashcore_hf  # noqa: F401
    from tests.gpu.large_models import make_model

    def zeros(module, query, key, value, attention_mask, **kwargs):
        return torch.zeros_like(query.transpose(1, 2)), None

    AttentionInterface.register("zeros", zeros)
    ALL_MASK_ATTENTION_FUNCTIONS["zeros"] = lambda **kwargs: None
    model = make_model("Llama-3.1-8B", layers=layers)
    for name, (batch, length, padded) in MODEL_CELLS.items():
        ids = torch.randint(3, model.config.vocab_size, (batch, length), device="cuda")
        mask = torch.ones_like(ids)
        lengths = padded_lengths(batch, length // 2, length) if padded else (length,)
        for b, real in enumerate(lengths):
            mask[b, : length - real] = 0
        row = {"case": f"model {name}{' left-padded' if padded else ''} Llama-3.1-8B prefill", "unit": "ms"}
        memory: dict[str, int] = {}
        times: dict[str, list[float]] = {}
        for _ in range(rounds + 1):
            for backend in ("flashcore", "sdpa", "zeros"):
                model.set_attn_implementation(backend)
                torch.cuda.reset_peak_memory_stats()
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                with torch.no_grad():
                    begin.record()
                    model(ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
                    end.record()
                end.synchronize()
                memory[backend] = torch.cuda.max_memory_allocated()
                times.setdefault(backend, []).append(begin.elapsed_time(end))
        # The first round warms up.
        row |= {backend: round(statistics.median(each[1:]), 1) for backend, each in times.items()}
        row["peak_bytes"] = memory
        if not padded and forward is not None:
            case = Case("prefill", batch, length, length, 32, 8, 128, 128)
            x = make(case, torch.bfloat16)
            fa3_us = benchmarking.eager_times({"fa3": fa3(case, x, forward)}, rounds=5, seconds=0.0)["fa3"]
            row["attention_ms_a_layer"] = round((row["flashcore"] - row["zeros"]) / model.config.num_hidden_layers, 3)
            row["fa3_ms_a_layer"] = round(fa3_us / 1e3, 3)
        yield row


def peer_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(PEERS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fa3", type=Path, help="folder with FlashAttention-3's binaries")
    parser.add_argument("--peers", type=peer_names, default=["fa3", "cudnn", "flash", "portable"],
                        help=f"of {','.join(PEERS)}, with commas between them")  # fmt: skip
    parser.add_argument("--groups", nargs="+", default=["d128", "d64", "d256", "d96", "mla", "more"],
                        choices=["d128", "d64", "d256", "d96", "mla", "more", "model"])  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, help="of the model, for a quick look")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_prefill needs a GPU; its cases:", *map(str, cases(arguments.groups)), sep="\n  ")
        return 1
    forward = benchmarking.load_fa3(arguments.fa3) if "fa3" in arguments.peers else None
    rows = []

    def note(row: dict) -> None:
        print(row, flush=True)
        rows.append(row)
        if arguments.json:
            benchmarking.write(arguments.json, rows)

    for case in cases(arguments.groups):
        row = measure(case, ["flashcore", *arguments.peers], forward, getattr(torch, arguments.dtype), arguments.rounds)
        note(row)
    if "model" in arguments.groups:
        for row in model_rows(min(arguments.rounds, 3), forward, arguments.layers):
            note(row)
    wrong = [row["case"] for row in rows if row.get("failed", {}).get("flashcore")]
    if wrong:
        print("flashcore failed:", *wrong, sep="\n  ")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
