"""What a call on pages asks, as plain values: what the choices of its kernels are made from."""

from typing import NamedTuple

import torch

from .problem import Problem


class PagedProblem(NamedTuple):
    """What one call asks, as plain values.

    Attributes:
        num_tokens, num_sequences: T and S.
        num_heads, num_kv_heads: H, Hkv.
        head_dim, value_dim: D of queries and keys, Dv of values and output.
        page_size, num_pages, table_width: keys of a page, pages of the pool, entries of a line of the block table.
        dtype: of the queries.
        ring: slots that a sequence uses over and over, 0: one for each key.
        new_keys: whether the queries' own keys are given beside the pool.
        cumulative: whether key lengths come as sums.
        max_queries: most queries that a sequence has, as far as the caller knows.
        scale, softcap, left, right: as of `problem.Problem`.
        has_sinks, fp8: as there.
    """

    num_tokens: int
    num_sequences: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    page_size: int
    num_pages: int
    table_width: int
    dtype: torch.dtype
    ring: int
    new_keys: bool
    cumulative: bool
    max_queries: int
    scale: float
    softcap: float
    left: int
    right: int
    has_sinks: bool
    fp8: bool

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def most_keys(self) -> int:
        """Keys that the longest sequence may show to one query."""
        stored = self.ring or self.table_width * self.page_size
        return min(stored, self.left + 1) if self.left >= 0 else stored

    @property
    def several(self) -> bool:
        """Whether there may be sequences of several queries, or padding that no sequence without a query stands for."""
        return self.max_queries > 1 or self.num_tokens > self.num_sequences

    @property
    def single(self) -> Problem:
        """What its single tokens ask, as if each sequence had as many keys as the longest one may show."""
        return Problem(
            batch_size=self.num_sequences, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads, num_queries=1,
            num_keys=self.most_keys, head_dim=self.head_dim, value_dim=self.value_dim, dtype=self.dtype,
            device_type="cuda", range_layout="sequence", mask_kind=None, scale=self.scale, softcap=self.softcap,
            left=self.left, right=self.right, query_start=self.most_keys - 1, has_sinks=self.has_sinks, aligned=True,
            fp8=self.fp8,
        )  # fmt: skip
