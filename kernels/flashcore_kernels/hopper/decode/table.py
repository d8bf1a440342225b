"""Configurations of `flashcore_hopper_decode`, decode in Gluon for compute capability 9.0."""

from typing import NamedTuple


class DecodeRow(NamedTuple):
    """One configuration, for head dimensions up to `head_dim`.

    A choice in it is a pair (stages, programs): blocks of K and V that a program holds in shared memory, and how many
    programs of a launch an SM then holds at once.

    Attributes:
        bits: of an element of K and V.
        head_dim: the larger of K's and V's, at the most.
        rows: of a tile at the most (query tokens x group).
        block_n: keys of a block.
        stages: choices, in this order: what is best as long as all programs run at once, and last what is best where
            they do not. For a choice of one program an SM, each chunk counts as a program.
        levels: a program takes up to 2**levels chunks and merges them itself. Tiles of 16 rows have one level less, of
            32 rows two less.
        min_chunk: least keys of a chunk.
        chunks: into how many chunks one long sequence is cut, over all of its KV heads: enough to fill the GPU.
        why: what speaks for it.
        whole_sequences: choices for sequences of one length, where a program takes all keys of a sequence in a KV head
            and these programs are enough to fill the GPU: nothing has to be merged. Empty: never.
        many_rows: (stages, programs an SM, levels) where programs have too many rows for the last of `stages`, and
            there is a tile for each SM. Empty: never.
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
    whole_sequences: tuple[tuple[int, int], ...] = ()
    many_rows: tuple[int, ...] = ()


# The reasons are us on an H200 with Triton 3.6, inside CUDA graphs, for 32 query heads on 8 KV heads if none are named.
# "Not whole" is without whole_sequences.
ROWS = (
    DecodeRow(
        bits=16, head_dim=64, rows=32, block_n=128, stages=((2, 1), (1, 4)), levels=2, min_chunk=128, chunks=128,
        whole_sequences=((3, 1), (1, 4)),
        why="B16 S2048 of 8:8 heads 19.2, not whole 20.4; B1 S8192 8.4, in 3 stages 8.5, in 1 9.7",
    ),
    DecodeRow(
        bits=16, head_dim=128, rows=16, block_n=64, stages=((2, 3), (1, 4)), levels=3, min_chunk=128, chunks=128,
        whole_sequences=((3, 1), (2, 3), (1, 4)), many_rows=(2, 2, 3),
        why="B1 S8192, B16 S2048 12.5, 36.4, of 128 keys 12.5, 40.4; B4 S8192 of 32:1 heads 13.4, with 32 rows "
        "15.6; B16 S2048, B64 S4096 35.2, 245, not whole 36.4, 252; 4 tokens on B16 S2048 35.9, not whole 44.2, "
        "as if of 8 rows 50",
    ),
    DecodeRow(
        bits=16, head_dim=256, rows=16, block_n=64, stages=((2, 1), (1, 2)), levels=1, min_chunk=128, chunks=128,
        whole_sequences=((2, 1), (1, 2)),
        why="76 KiB: two programs an SM; with 2 levels 3.7 spills; of 16:8 heads B1 S8192 20.9, in 1 stage 22.6; "
        "B16 S4096 126, not whole 130",
    ),
    DecodeRow(
        bits=8, head_dim=64, rows=32, block_n=128, stages=((1, 4),), levels=2, min_chunk=128, chunks=128,
        why="B16 S2048 of 8:8 heads 13.4; of 64 keys 14.3; chunks of 512 keys 13.4",
    ),
    DecodeRow(
        bits=8, head_dim=128, rows=16, block_n=64, stages=((2, 4),), levels=3, min_chunk=128, chunks=256,
        why="B16 S2048, B64 S4096 22.9, 137; 128 keys in 1 stage 26.4, 145; B1 S32768 23.5, with 128 chunks 28.6",
    ),
    DecodeRow(
        bits=8, head_dim=256, rows=16, block_n=64, stages=((1, 2),), levels=1, min_chunk=128, chunks=128,
        why="no registers for more levels",
    ),
)  # fmt: skip


def decode_row_for(bits: int, head_dim: int) -> DecodeRow:
    """The row for elements of K and V of `bits` bits and the larger head dimension."""
    return next(row for row in ROWS if row.bits == bits and head_dim <= row.head_dim)
