"""What bench_prefill.py and bench_backward.py time: shapes of one layer, which keys are seen, and random inputs."""

import itertools
import random
from typing import NamedTuple

import torch

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
TOKENS = 16384
SHAPES = {"d128": (32, 8, 128, 128), "d64": (32, 32, 64, 64), "d256": (8, 8, 256, 256), "d96": (32, 32, 96, 96),
          "mla": (16, 16, 192, 128)}  # fmt: skip
GROUPS = (*SHAPES, "more")


class Case(NamedTuple):
    """One prefill.

    Attributes:
        kind: "prefill", "window", "chunked", "padded" (left) or "packed", the first word of its name.
        window: keys that a query sees, itself included.
        lengths: of each sequence, where they are padded, or of the documents that are packed into one row.
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
        if self.kind == "packed":
            document = self.documents(rows.device)
            seen &= document[rows][:, None] == document
        elif self.lengths:
            seen &= slot >= self.keys - self.lengths[sequence]
        return seen

    def documents(self, device: torch.device) -> torch.Tensor:
        """int64 `[K]`: the document that each token of a packed row belongs to."""
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(len(self.lengths), device=device).repeat_interleave(lengths)

    def bounds(self, device: torch.device) -> torch.Tensor:
        """int32 `[sequences + 1]`: where each sequence, or document, begins among the tokens that exist."""
        lengths = torch.tensor(self.lengths or [self.queries] * self.batch, device=device)
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()

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


def document_lengths(tokens: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Random ones, the same at every call, that fill a row of so many tokens."""
    chance, lengths = random.Random(0), []
    while (left := tokens - sum(lengths)) > longest:
        lengths.append(min(chance.randint(shortest, longest), left - shortest))
    return (*lengths, left)


def packed(tokens: int, heads: int = 32, kv_heads: int = 8, head_dim: int = 128) -> Case:
    """One row of documents of 200 to 2,000 tokens."""
    lengths = document_lengths(tokens, 200, 2000)
    return Case("packed", 1, tokens, tokens, heads, kv_heads, head_dim, head_dim, lengths=lengths)


def cases(groups: list[str]) -> list[Case]:
    """The published cases: B * S = 16K tokens where nothing else is said."""
    out = []
    for group in groups:
        if group in SHAPES:
            lengths = LENGTHS if group in ("d128", "d64", "d256") else (2048, 8192)
            for length, causal in itertools.product(lengths, (True, False)):
                out.append(Case("prefill", TOKENS // length, length, length, *SHAPES[group], causal))
    if "more" in groups:
        out += [
            Case("window", 1, 16384, 16384, 32, 8, 128, 128, window=4096),
            Case("chunked", 1, 512, 8192, 32, 8, 128, 128),
            Case("padded", 8, 2048, 2048, 32, 8, 128, 128, lengths=padded_lengths(8, 1024, 2048)),
            packed(16384),
        ]
    return out


# Small enough for Triton's interpreter.
TINY = [
    Case("prefill", 1, 70, 70, 2, 1, 32, 32), Case("prefill", 1, 70, 70, 2, 1, 32, 16, causal=False),
    Case("window", 1, 40, 40, 1, 1, 16, 16, window=9), Case("chunked", 1, 12, 40, 2, 1, 16, 16),
    Case("padded", 2, 40, 40, 2, 1, 16, 16, lengths=(27, 40)),
    Case("packed", 1, 40, 40, 2, 1, 16, 16, lengths=(7, 21, 12)),
]  # fmt: skip


def make(case: Case, dtype: torch.dtype, device: str = "cuda") -> Inputs:
    """Random inputs of a case."""

    def one(heads, length, dim):
        return torch.randn(case.batch, length, heads, dim, dtype=dtype, device=device).transpose(1, 2)

    return Inputs(
        one(case.heads, case.queries, case.head_dim),
        one(case.kv_heads, case.keys, case.head_dim),
        one(case.kv_heads, case.keys, case.value_dim),
    )
