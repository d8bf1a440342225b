"""Configurations of `flashcore_hopper` and `flashcore_hopper_short`, prefill in Gluon for compute capability 9.0."""

from typing import NamedTuple


class PrefillRow(NamedTuple):
    """One configuration, for head dimensions up to the sums of `head_dim` and of `value_dim`.

    Calls of the same head dimensions that take different rows, by features or by length, must give a sequence the same
    bits: their rows have one `block_n`.

    Attributes:
        head_dim, value_dim: columns of the tiles that rows of Q and K, and of V, are cut into: two powers of two, the
            second may be 0.
        consumers: warpgroups that compute, of 64 queries each.
        block_n: keys of a block.
        stages: blocks of K and V that shared memory holds.
        query_buffers: tiles of Q that shared memory holds. Where there are two, a tile's output leaves through the
            buffer that held its queries. Where there is one, the output has half a tile of its own and leaves in two
            halves, so that the next queries need not wait for it.
        scores_ahead: a block's exponentials run beside the product of the next block's scores; otherwise beside the
            product with V of the block before. It takes registers for the scores of two blocks. Rows with it serve key
            ranges too; of head_dim 256 they leave no registers for softcap.
        consumer_registers, producer_registers: of a thread.
        why: what speaks for it.
        min_queries: it serves calls with so many queries or more: causal calls, and others.
        plain: it serves only calls with neither a key range nor softcap.
        causal: it serves only causal calls.
        short_masks: at the edge of what is seen, columns are compared with constants, which takes half the
            instructions. ptxas then orders the loop over all blocks differently, by which some rows lose more than they
            gain: 3 to 5 % with head_dim 128.
        one_copy: both consumers form one partition of 8 warps and run the same machine code, which is then fetched less
            often; they write their output straight from registers. Only for Triton 3.5 to 3.7: newer ones put a
            barrier into each block, at which the consumers of a partition wait for each other.
        turns: with `one_copy`, consumers take turns in issuing their products; otherwise they drift into step and want
            the tensor cores at the same moment.
        bias_bits: it has shared memory for a bias of so many bits an element that differs from query to query.
        masked: it serves only calls with a dense mask or a bias.
        least_rounds: tiles that each program computes, at the least, of one section of heads, where tiles differ in
            length (see schedule.py).
    """

    head_dim: tuple[int, int]
    value_dim: tuple[int, int]
    consumers: int
    block_n: int
    stages: int
    query_buffers: int
    scores_ahead: bool
    consumer_registers: int
    producer_registers: int
    why: str
    min_queries: tuple[int, int] = (0, 0)
    plain: bool = False
    causal: bool = False
    short_masks: bool = False
    one_copy: bool = False
    turns: bool = False
    bias_bits: int = 0
    masked: bool = False
    least_rounds: int = 2


# The reasons are medians over B * S = 16K tokens in bf16, S = 512 to 8192, causal and full, on an H200 with Triton 3.6.
# "Ahead" is scores_ahead, "two copies" is without one_copy.
ROWS = (
    PrefillRow(
        head_dim=(64, 0), value_dim=(64, 0), consumers=3, block_n=128, stages=3, query_buffers=2, scores_ahead=True,
        consumer_registers=160, producer_registers=32, min_queries=(3072, 2048), plain=True, short_masks=True,
        least_rounds=5,
        why="522 TFLOP/s at S = 8192 where 2 consumers have 453; 7 % more than them at 2048, 7 % less at 1024; "
        "causal 3 % more at 4096, 4 % less at 2048; not ahead 477, blocks of 64 keys 444, pairs of tiles 402; "
        "sections of 2 rounds 390, 466 at S = 2048, 8192 causal, of 5 rounds 409, 510",
    ),
    PrefillRow(
        head_dim=(64, 0), value_dim=(64, 0), consumers=2, block_n=128, stages=3, query_buffers=2, scores_ahead=True,
        consumer_registers=240, producer_registers=24, plain=True, short_masks=True, one_copy=True, turns=True,
        causal=True,
        why="where it is causal 18 % more than two copies at 512, 8 % at 1024, 3 % at 1536; without turns 13 % and "
        "4 %; in full 3 % less at 1024",
    ),
    PrefillRow(
        head_dim=(64, 0), value_dim=(64, 0), consumers=2, block_n=128, stages=3, query_buffers=2, scores_ahead=True,
        consumer_registers=240, producer_registers=24, short_masks=True, bias_bits=32,
        why="1.5 % more than not ahead, padded 4 %; short masks 2 to 3 % more at S = 512, at 1024 1 % less causal, "
        "5 % more full; with 2 stages 367 of 368",
    ),
    PrefillRow(
        head_dim=(64, 32), value_dim=(64, 32), consumers=2, block_n=128, stages=2, query_buffers=2,
        scores_ahead=True, consumer_registers=240, producer_registers=24, short_masks=True, bias_bits=32,
        why="1 % more than not ahead; with 64 keys 431 of 509; short masks 6 % more where it is causal at S = 2048, "
        "padded 2 %, 2 % less in full at 8192; 3 stages 2 % less",
    ),
    PrefillRow(
        head_dim=(128, 0), value_dim=(128, 0), consumers=2, block_n=128, stages=2, query_buffers=2,
        scores_ahead=True, consumer_registers=240, producer_registers=24, plain=True,
        why="3 % more than not ahead; with 64 keys 511 of 593; with one query buffer 522 where two had 566",
    ),
    PrefillRow(
        head_dim=(128, 0), value_dim=(128, 0), consumers=2, block_n=128, stages=2, query_buffers=2,
        scores_ahead=True, consumer_registers=240, producer_registers=24, short_masks=True, bias_bits=16,
        why="padded at S = 512, 2048, 8192 161, 313, 1039 us, without short masks 172, 322, 1052, not ahead 175, "
        "329, 1083",
    ),
    PrefillRow(
        head_dim=(128, 0), value_dim=(128, 0), consumers=2, block_n=64, stages=3, query_buffers=2,
        scores_ahead=True, consumer_registers=240, producer_registers=24, short_masks=True, bias_bits=32, masked=True,
        why="never timed; a bias of 128 queries and 128 keys in fp32 has no room beside K and V",
    ),
    PrefillRow(
        head_dim=(128, 64), value_dim=(128, 0), consumers=2, block_n=128, stages=2, query_buffers=1,
        scores_ahead=True, consumer_registers=240, producer_registers=24, plain=True,
        why="4 % more than not ahead, with short masks 4 % less; 686 TFLOP/s not ahead, 656 where the output took "
        "the queries' buffer",
    ),
    PrefillRow(
        head_dim=(128, 64), value_dim=(128, 0), consumers=2, block_n=128, stages=2, query_buffers=1,
        scores_ahead=True, consumer_registers=240, producer_registers=24, short_masks=True,
        why="padded at S = 512, 2048, 8192 110, 194, 586 us, without short masks 134, 223, 628, not ahead 134, 220, "
        "634",
    ),
    PrefillRow(
        head_dim=(256, 0), value_dim=(256, 0), consumers=2, block_n=64, stages=2, query_buffers=1, scores_ahead=True,
        consumer_registers=240, producer_registers=24, plain=True, short_masks=True,
        why="702 TFLOP/s, 684 where the output took the queries' buffer; 1.5 % more than not ahead; short masks 1 % "
        "more",
    ),
    PrefillRow(
        head_dim=(256, 0), value_dim=(256, 0), consumers=2, block_n=64, stages=2, query_buffers=1,
        scores_ahead=False, consumer_registers=240, producer_registers=24, short_masks=True,
        why="8 x 2048 padded with softcap 198 us, ahead 220; padded alone 146, 145, softcap alone 280, 271",
    ),
)  # fmt: skip


def prefill_row_for(
    head_dim: int, value_dim: int, num_queries: int, *, plain: bool, causal: bool, one_copy: bool,
    masked: bool = False, bias_bits: int = 0,
) -> PrefillRow | None:  # fmt: skip
    """The row for these head dimensions and so many queries, or None where none fits.

    Args:
        plain: there is neither a key range, nor softcap, nor a dense mask.
        causal: keys behind each query are hidden.
        one_copy: this Triton can have both consumers run one copy of the code.
        masked: there is a dense mask or a bias.
        bias_bits: of an element of a bias that differs from query to query, 0 without one.
    """
    for row in ROWS:
        fits = head_dim <= sum(row.head_dim) and value_dim <= sum(row.value_dim)
        if not fits or num_queries < row.min_queries[0 if causal else 1]:
            continue
        if row.bias_bits < bias_bits or row.masked and not masked or masked and row.one_copy:
            continue
        if (plain or not row.plain) and (causal or not row.causal) and (one_copy or not row.one_copy):
            return row
    return None


# Keys up to which `flashcore_hopper_short` serves a call that it can serve: it has not been timed with more.
MOST_SHORT_KEYS = 1024
# Columns of its tiles of Q, K and V: head dimensions up to that.
SHORT_HEAD_DIM = 64


class ShortRow(NamedTuple):
    """One configuration of `flashcore_hopper_short`, of 64 queries a program.

    All give the bits of the rows of ROWS for such head dimensions: `block_n` is theirs, or all keys are in one block.

    Attributes:
        most_keys: it serves calls with so many key slots or fewer.
        block_n: keys of a block.
        stages: blocks of K and V that shared memory holds.
        registers: of a thread. They decide how many programs share a multiprocessor: 512 / registers.
        why: what speaks for it.
        dropout: it serves calls with dropout too; other rows without it alone.
    """

    most_keys: int
    block_n: int
    stages: int
    registers: int
    why: str
    dropout: bool = False


# The reasons are medians over B * S = 32K tokens in bf16, 12 heads, in full, on an H200 with Triton 3.6.
SHORT_ROWS = (
    ShortRow(
        most_keys=64, block_n=64, stages=1, registers=96,
        why="50.6 us at S = 64 where blocks of 128 keys have 56.0, flashcore_hopper 116, the best of SDPA 80.5; padded "
        "54.8, 77.7, 218, 117",
        dropout=True,
    ),
    ShortRow(
        most_keys=MOST_SHORT_KEYS, block_n=128, stages=1, registers=128,
        why="97.9, 125, 224 us at S = 197, 512, 1024 where flashcore_hopper has 112, 129, 238, the best of SDPA 111, "
        "135, 245, 2 stages with 168 registers 107, 132, 238, programs of 128 queries 106, 138, 250; padded at 128, "
        "512 75.6, 122, flashcore_hopper 113, 171, SDPA 123, 297",
    ),
    ShortRow(
        most_keys=MOST_SHORT_KEYS, block_n=128, stages=2, registers=168,
        why="never timed; with a key range 128 registers spill 27 in a loop of 950 instructions, of which three "
        "programs give a multiprocessor as much as it can do",
        dropout=True,
    ),
)  # fmt: skip


def short_row_for(head_dim: int, value_dim: int, num_keys: int, *, dropout: bool = False) -> ShortRow | None:
    """The row of SHORT_ROWS for so many key slots, or None where none fits."""
    if max(head_dim, value_dim) > SHORT_HEAD_DIM:
        return None
    return next((row for row in SHORT_ROWS if num_keys <= row.most_keys and row.dropout >= dropout), None)
