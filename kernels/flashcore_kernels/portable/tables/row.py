"""The type of a table's rows."""

from typing import NamedTuple


class Row(NamedTuple):
    """One configuration: for `kernel`, elements of `bits` bits (of K and V) and head dimensions up to `head_dim`.

    `gaps` rows serve calls with a dense mask or a key range for each query, and only those. `whole` rows stand before
    the others, and serve head dimensions that fill the columns of their tiles (see `plan.pieces`): others are loaded
    piece by piece, with a look at each column, which takes registers. Rows without `ranges` stand before those with
    them, and serve calls without a key range; the row that serves the others has the same `block_n`, for the same bits.

    `min_chunk` and `chunks` are for decode: the least keys of a chunk, and how many chunks one long sequence is cut
    into over all of its KV heads, which is to fill the GPU.

    `why` says what speaks for it: a measurement, or the limit that forces it.
    """

    kernel: str
    bits: int
    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    why: str
    min_chunk: int = 64
    chunks: int = 128
    gaps: bool = False
    whole: bool = False
    ranges: bool = True


class HopperRow(NamedTuple):
    """One configuration of the Gluon kernel, for head dimensions up to the sums of `head_dim` and of `value_dim`.

    Attributes:
        head_dim, value_dim: pieces (powers of two; the second may be 0) that rows of Q and K, and of V, are cut into.
        consumers: warpgroups of 64 queries each.
        block_n: keys of a block.
        stages: blocks of K and V in shared memory.
        query_slots: tiles of Q in shared memory. With two the output leaves through its queries' slot, with one half
            after half through a place of its own.
        ahead: a block's exponentials run beside the next block's scores, not beside the product with V before them.
            Two blocks' numbers are in registers then, which key ranges and softcap need: such a row serves neither.
        consumer_registers, producer_registers: of a thread.
        why: what speaks for it.
        min_queries: it serves calls with so many queries or more; causal ones, and the others.
        short_masks: half as many instructions where a block is at an edge. ptxas then orders the loop of all blocks
            differently, by which some rows lose more: 3 to 5 % with head_dim 128.
        one_copy: both consumers are one partition of 8 warps and run one copy of the machine code, which then is
            fetched less often, and write their output straight from the registers. Such a row serves Triton 3.5 to 3.7
            alone: with newer ones the consumers of a partition would wait for each other in each block.
        turns: with one copy, consumers take turns in issuing their products; else they drift into step.
        plain: it serves calls with neither a key range nor softcap alone.
        causal: it serves causal calls alone.
        least_rounds: tiles of a program, where they differ in length, that a section of heads has at least
            (hopper/schedule.py).

    Calls of the same head dimensions that take different rows, by features or by length, must give a sequence the same
    bits: their rows have one `block_n`.
    """

    head_dim: tuple[int, int]
    value_dim: tuple[int, int]
    consumers: int
    block_n: int
    stages: int
    query_slots: int
    ahead: bool
    consumer_registers: int
    producer_registers: int
    why: str
    min_queries: tuple[int, int] = (0, 0)
    plain: bool = False
    short_masks: bool = False
    one_copy: bool = False
    turns: bool = False
    causal: bool = False
    least_rounds: int = 2


class HopperDecodeRow(NamedTuple):
    """One configuration of the Gluon decode kernel, for head dimensions up to `head_dim`.

    Attributes:
        bits: of an element of K and V.
        rows: most rows (query tokens x group) of a tile.
        block_n: keys of a block.
        stages: blocks of K and V in shared memory, and how many of a launch's programs an SM then holds at once: what
            is best while all of them fit, and last what is best where they do not. What is for one program counts
            chunks: as many as SMs or fewer.
        whole: the same where sequences have one length and each program has all keys of one in a KV head, if these are
            enough to fill the GPU: nothing has to be merged. Empty: never so.
        tall: (stages, programs an SM, levels) instead of one of `stages` whose programs have too many rows to fit,
            where there are tiles for all SMs. Empty: never so.
        levels: of the tree of chunks, that a program merges by itself at the most; one less for 16 rows, two for 32.
        min_chunk, chunks: as in Row.
        why: what speaks for it.
    """

    bits: int
    head_dim: int
    rows: int
    block_n: int
    stages: tuple[tuple[int, int], ...]
    levels: int
    min_chunk: int
    chunks: int
    why: str
    whole: tuple[tuple[int, int], ...] = ()
    tall: tuple[int, ...] = ()
