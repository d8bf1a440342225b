"""What a dense mask hides, found once a call: which blocks a tile need not visit, and one bit for each query and key.

A kernel in plain Triton that runs before `flashcore_hopper`, a program for each block of each tile of queries. Where
the mask is broadcast it is looked at once: over batch, heads or queries there is one line, or one row of bits, for all.
Causal attention, windows and KeyRanges are not in it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...problem import Problem, distinct
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
def _load(Mask, rows, cols, stride_mq, stride_mk, width, num_rows, UNIT: tl.constexpr):
    """A mask's elements `[M, N]`, 0 where there are none."""
    at = rows.to(tl.int64)[:, None] * stride_mq * UNIT + cols.to(tl.int64)[None, :] * stride_mk
    return tl.load(Mask + at, mask=(rows < num_rows)[:, None] & (cols < width * UNIT)[None, :], other=0)


@triton.jit
def _shows(x, FLOAT: tl.constexpr):
    """Whether elements of a mask show their key."""
    if FLOAT:
        return x.to(tl.float32) > float("-inf")
    else:
        return x != 0


@triton.jit(
    do_not_specialize=[
        "stride_mb", "stride_mh", "stride_mq", "width", "num_keys", "heads", "tiles", "num_rows", "num_blocks",
    ]
)  # fmt: skip
def flashcore_mask_map(
    Mask,
    Lines,
    Bits,
    Done,
    stride_mk,
    stride_mb,
    stride_mh,
    stride_mq,
    width,
    num_keys,
    heads,
    tiles,
    num_rows,
    num_blocks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLOAT: tl.constexpr,
    UNIT: tl.constexpr,
):
    """A line of the map, and the bits of its rows.

    Shapes: Mask `[B', H', Q', K]`, bool as bytes, or floating point; its strides but the last, and how many elements of
    a row may be read, come in units of UNIT elements. A line of Lines: int32 `[num_blocks + 1]`: how many blocks before
    each one are seen by a query, and `[num_blocks + 1]`: those blocks with their flags, and behind them one without a
    key. Bits: int32 `[B', H', Q', num_blocks, BLOCK_N / 32]`, written where a block HIDES: the bit of a key is 1 where
    the query sees it. Done: int32 `[lines]`, 0, and 0 again at the end.
    Grid: a program a block, `(B' * H' * T' * num_blocks,)`; the last of a line to end makes the line.
    """
    line = tl.program_id(0) // num_blocks
    block = tl.program_id(0) % num_blocks
    bh = line // tiles
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    STEP: tl.constexpr = 32 if BLOCK_M >= 32 else BLOCK_M
    WORDS: tl.constexpr = BLOCK_N // 32
    rows = line % tiles * BLOCK_M + tl.arange(0, STEP)
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    present = cols < num_keys  # [N]
    counts = Lines + line.to(tl.int64) * (2 * num_blocks + 2)
    blocks = counts + num_blocks + 1
    Mask += (b * stride_mb + h * stride_mh) * UNIT
    # A bit for each question, so that all are answered by one look over the tile.
    found = tl.zeros([STEP, BLOCK_N], tl.int32)
    for r in range(0, BLOCK_M, STEP):
        x = _load(Mask, rows + r, cols, stride_mq, stride_mk, width, num_rows, UNIT)
        there = (rows + r < num_rows)[:, None] & present[None, :]
        seen = there & _shows(x, FLOAT)
        found |= seen.to(tl.int32) * FLAGS | (there & (seen == 0)).to(tl.int32) * HIDES
        if FLOAT:
            far = seen & (x.to(tl.float32) < FAR_BELOW)
            found |= (there & (x != 0.0)).to(tl.int32) * READ | far.to(tl.int32) * FAR_BIAS
    flags = tl.reduce(found, None, _either)
    if (flags & HIDES) != 0:
        columns = tl.zeros([STEP, WORDS], tl.int32)
        for r in range(0, BLOCK_M, STEP):
            x = _load(Mask, rows + r, cols, stride_mq, stride_mk, width, num_rows, UNIT)
            valid = rows + r < num_rows
            words = _bits(valid[:, None] & present[None, :] & _shows(x, FLOAT))  # [STEP, N / 32]
            columns |= words
            at = (bh.to(tl.int64) * num_rows + rows + r) * num_blocks + block
            at = at[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
            tl.store(Bits + at, words, mask=valid[:, None])
        exist = tl.reshape(_bits(tl.reshape(present, [1, BLOCK_N])), [WORDS])
        gaps = tl.max((tl.reduce(columns, 0, _either) != exist).to(tl.int32), axis=0)
        flags |= gaps * GAPS
        if not FLOAT:
            flags |= READ
    tl.store(blocks + block, tl.where(flags >= FLAGS, block * FLAGS + flags % FLAGS, -1))
    # Every thread's stores come before the atomic, which the other programs' loads come after.
    tl.debug_barrier()
    if tl.atomic_add(Done + line, 1, sem="acq_rel") == num_blocks - 1:
        tl.store(Done + line, 0)
        count = 0
        for first in range(0, num_blocks, 128):
            each = first + tl.arange(0, 128)
            entry = tl.load(blocks + each, mask=each < num_blocks, other=-1, cache_modifier=".cg")
            some = (entry >= 0).to(tl.int32)
            place = count + tl.cumsum(some, axis=0) - some
            tl.debug_barrier()  # entries move to the front, where others were read
            tl.store(counts + each, place, mask=each < num_blocks)
            tl.store(blocks + place, entry, mask=entry >= 0)
            count += tl.sum(some, axis=0)
        tl.store(counts + num_blocks, count)
        tl.store(blocks + count, num_blocks * FLAGS)


def vector_unit(mask: torch.Tensor) -> int:
    """Elements of a vector of 16 bytes if a mask's rows lie and are read in such, or else 1."""
    unit = 16 // mask.element_size()
    strides = [stride for size, stride in zip(mask.shape[:3], mask.stride()) if size > 1]
    if mask.stride(3) != 1 or mask.data_ptr() % 16 or any(stride % unit for stride in strides):
        return 1
    # Behind a row's last key the rest of a vector is read, where there is memory.
    last = mask.storage_offset() + sum((size - 1) * stride for size, stride in zip(mask.shape, mask.stride()))
    end = last + 1 + -mask.shape[3] % unit
    return unit if end * mask.element_size() <= mask.untyped_storage().nbytes() else 1


def make_map_launch(problem: Problem, mask: torch.Tensor, shape: MapShape) -> Launch:
    """The launch of `flashcore_mask_map` for a mask `[B, H, Q, K]`, each 1 where it is broadcast; bool as bytes."""
    mask = distinct(mask)
    batch, heads, tiles = shape.lines
    rows = mask.shape[2]
    unit = vector_unit(mask) if mask.shape[3] == problem.num_keys else 1
    *strides, stride_mk = (0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))
    return Launch(
        kernel=flashcore_mask_map,
        grid=(batch * heads * tiles * shape.num_blocks, 1),
        operands=("mask", "mask_lines", "mask_bits", "counters"),
        # All strides are here, although one alone is specialised on: any may be wider than 32 bits.
        integers=(stride_mk, *(stride // unit for stride in strides)),
        scalars=(-(-problem.num_keys // unit), problem.num_keys, heads, tiles, rows, shape.num_blocks),
        constants=(shape.block_m if rows > 1 else 1, shape.block_n, problem.mask_kind == "float", unit),
        num_warps=8,
        num_stages=1,
        counters=batch * heads * tiles,
    )  # fmt: skip
