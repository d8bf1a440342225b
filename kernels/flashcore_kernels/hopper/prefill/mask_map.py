"""What a dense mask hides, found once a call: which blocks a tile need not visit, and one bit for each query and key.

A kernel in plain Triton that runs before `flashcore_hopper`. It reads the mask once, where it is broadcast: over batch,
heads or queries there is one line, or one row of bits, for all. Causal attention, windows and KeyRanges are not in it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...problem import Problem
from ...runtime.launch import Launch

# Of a block in a tile's list: its number times FLAGS, and which of these hold.
READ = tl.constexpr(1)  # there is something to read: bool: it hides a key from a query; bias: it is not 0 everywhere
HIDES = tl.constexpr(2)  # it hides a key from a query
GAPS = tl.constexpr(4)  # it hides a key from all queries of the tile
FAR_BIAS = tl.constexpr(8)  # a bias is so low that in units of log2 it would be -inf, which means hidden
FLAGS = tl.constexpr(16)
# Below it a bias counts as FAR_BIAS. bf16's and fp32's least numbers are, fp16's is not.
FAR_BELOW = tl.constexpr(-1e38)


class MapShape(NamedTuple):
    """How a mask's map lies in memory.

    Attributes:
        lines: `(B', H', T')`: lists of blocks. Each is 1 where the mask is broadcast.
        rows: `(B', H', Q')`: rows of bits.
        num_blocks: blocks of keys.
        block_m, block_n: queries of a tile, keys of a block.
    """

    lines: tuple[int, int, int]
    rows: tuple[int, int, int]
    num_blocks: int
    block_m: int
    block_n: int

    @property
    def line_words(self) -> int:
        """int32 words of all lines: `num_blocks + 1` counts, and as many blocks, each."""
        batch, heads, tiles = self.lines
        # One more: a loop looks up the next block before it knows whether there is one.
        return batch * heads * tiles * 2 * (self.num_blocks + 1) + 1

    @property
    def bit_words(self) -> int:
        """int32 words of all bits: `block_n / 32` a block and row."""
        batch, heads, queries = self.rows
        return batch * heads * queries * self.num_blocks * self.block_n // 32

    @property
    def line_strides(self) -> tuple[int, int, int]:
        """From one sequence's line to the next, from one head's, and from one tile's."""
        return _strides(self.lines)

    @property
    def row_strides(self) -> tuple[int, int, int]:
        """From one sequence's row of bits to the next, from one head's, and from one query's."""
        return _strides(self.rows)


def _strides(sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    batch, heads, last = sizes
    return (heads * last if batch > 1 else 0, last if heads > 1 else 0, 1 if last > 1 else 0)


def distinct(mask: torch.Tensor) -> torch.Tensor:
    """The mask, with a size of 1 wherever it is broadcast: `expand` leaves other sizes."""
    for dim in range(4):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def map_shape(mask: torch.Tensor, num_keys: int, block_m: int, block_n: int) -> MapShape:
    """The shape of the map of a mask `[B, H, Q, K]`, each 1 where it is broadcast."""
    batch, heads, queries = distinct(mask).shape[:3]
    tiles = -(-queries // block_m)
    return MapShape((batch, heads, tiles), (batch, heads, queries), -(-num_keys // block_n), block_m, block_n)


@triton.jit
def _bits(seen):
    """int32 `[M, N / 32]`: the bits of bool `[M, N]`."""
    words = tl.reshape(seen.to(tl.int32), [seen.shape[0], seen.shape[1] // 32, 32])
    return tl.sum(words << tl.arange(0, 32)[None, None, :], axis=2)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _any(words):
    """1 where a bit of int32 `[M, W]` is 1, else 0."""
    return tl.max(tl.max((words != 0).to(tl.int32), axis=1), axis=0)


@triton.jit(do_not_specialize=["heads", "tiles", "num_rows", "num_blocks"])
def flashcore_mask_map(
    Mask,
    Lines,
    Bits,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    num_keys,
    heads,
    tiles,
    num_rows,
    num_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLOAT: tl.constexpr,
):
    """A line of the map, and the bits of its rows.

    Shapes: Mask `[B', H', Q', K]`, bool as bytes, or floating point. A line of Lines: int32 `[num_blocks + 1]`: how
    many blocks before each one are seen by a query, and `[num_blocks + 1]`: those blocks with their flags, and behind
    them one without a key. Bits: int32 `[B', H', Q', num_blocks, BLOCK_N / 32]`, written where a block HIDES: the bit
    of a key is 1 where the query sees it. Grid: a program a line, `(B' * H' * T',)`.
    """
    line = tl.program_id(0)
    bh = line // tiles
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    rows = line % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = rows < num_rows
    counts = Lines + line.to(tl.int64) * (2 * num_blocks + 2)
    blocks = counts + num_blocks + 1
    mask_rows = Mask + b * stride_mb + h * stride_mh + rows.to(tl.int64) * stride_mq  # [M]
    bit_rows = (bh.to(tl.int64) * num_rows + rows) * num_blocks  # [M]
    word = tl.arange(0, BLOCK_N // 32)
    offs_n = tl.arange(0, BLOCK_N)
    # One block ahead: otherwise each waits for memory.
    ahead = tl.load(
        mask_rows[:, None] + offs_n.to(tl.int64)[None, :] * stride_mk,
        mask=valid[:, None] & (offs_n < num_keys)[None, :], other=0,
    )  # fmt: skip
    count = 0
    for block in range(num_blocks):
        x = ahead  # [M, N]
        present = block * BLOCK_N + offs_n < num_keys  # [N]
        ahead = tl.load(
            mask_rows[:, None] + ((block + 1) * BLOCK_N + offs_n).to(tl.int64)[None, :] * stride_mk,
            mask=valid[:, None] & ((block + 1) * BLOCK_N + offs_n < num_keys)[None, :], other=0,
        )  # fmt: skip
        there = valid[:, None] & present[None, :]
        # From here on in words: whatever is summed up over a tile goes through shared memory.
        if FLOAT:
            x = x.to(tl.float32)
            seen = _bits(there & (x > float("-inf")))  # [M, N / 32]
            read = _any(_bits(there & (x != 0.0)))
            far = _any(_bits(there & (x < FAR_BELOW) & (x > float("-inf"))))
        else:
            seen = _bits(there & (x != 0))
            read = 0
            far = 0
        exist = tl.reshape(_bits(tl.reshape(present, [1, BLOCK_N])), [BLOCK_N // 32])
        hides = _any((seen ^ exist[None, :]) & tl.where(valid, -1, 0)[:, None])
        if not FLOAT:
            read = hides
        columns = tl.reduce(seen, 0, _either)  # [N / 32]
        some = tl.max((columns != 0).to(tl.int32), axis=0)
        gaps = tl.max((columns != exist).to(tl.int32), axis=0)
        at = (bit_rows + block)[:, None] * (BLOCK_N // 32) + word[None, :]
        tl.store(Bits + at, seen, mask=(valid & (rows * 0 + hides != 0))[:, None])
        tl.store(counts + block, count)
        # Written over by the next one where no query sees the block.
        tl.store(blocks + count, read * READ + hides * HIDES + gaps * GAPS + far * FAR_BIAS + block * FLAGS)
        count += some
    tl.store(counts + num_blocks, count)
    tl.store(blocks + count, num_blocks * FLAGS)


def make_map_launch(problem: Problem, mask: torch.Tensor, shape: MapShape) -> Launch:
    """The launch of `flashcore_mask_map` for a mask `[B, H, Q, K]`, each 1 where it is broadcast; bool as bytes."""
    mask = distinct(mask)
    batch, heads, tiles = shape.lines
    strides = tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))
    return Launch(
        kernel=flashcore_mask_map,
        grid=(batch * heads * tiles, 1),
        operands=("mask", "mask_lines", "mask_bits"),
        # Vectors are loaded where rows and their ends are known to be multiples of them.
        integers=(*strides, problem.num_keys),
        scalars=(heads, tiles, mask.shape[2], shape.num_blocks),
        constants=(shape.block_m, shape.block_n, problem.mask_kind == "float"),
        num_warps=8,
        num_stages=1,
    )
