"""Configurations of the Gluon kernel for compute capability 9.0.

The reasons are medians over B * S = 16K tokens in bf16, S = 512 to 8192, causal and full, on an H200 with Triton 3.6.
"""

from ...portable.tables.row import HopperDecodeRow, HopperRow

ROWS = (
    HopperRow(
        (64, 0), (64, 0), 3, 128, 3, 2, True, 160, 32, "522 TFLOP/s at S = 8192 where 2 consumers have 453; 7 % "
        "more than them at 2048, 7 % less at 1024; causal 3 % more at 4096, 4 % less at 2048; not ahead 477, blocks of "
        "64 keys 444, pairs of tiles 402; sections of 2 rounds 390, 466 at S = 2048, 8192 causal, of 5 rounds 409, 510",
        min_queries=(3072, 2048), plain=True, short_masks=True, least_rounds=5,
    ),
    HopperRow(
        (64, 0), (64, 0), 2, 128, 3, 2, True, 240, 24, "where it is causal 18 % more than two copies at 512, 8 % at "
        "1024, 3 % at 1536; without turns 13 % and 4 %; in full 3 % less at 1024", plain=True, short_masks=True,
        one_copy=True, turns=True, causal=True,
    ),
    HopperRow(
        (64, 0), (64, 0), 2, 128, 3, 2, True, 240, 24, "1.5 % more than not ahead, padded 4 %; short masks 2 to 3 % "
        "more at S = 512, at 1024 1 % less causal, 5 % more full; with 2 stages 367 of 368", short_masks=True,
    ),
    HopperRow(
        (64, 32), (64, 32), 2, 128, 2, 2, True, 240, 24, "1 % more than not ahead; with 64 keys 431 of 509; short "
        "masks 6 % more where it is causal at S = 2048, padded 2 %, 2 % less in full at 8192; 3 stages 2 % less",
        short_masks=True,
    ),
    HopperRow(
        (128, 0), (128, 0), 2, 128, 2, 2, True, 240, 24, "3 % more than not ahead; with 64 keys 511 of 593; with one "
        "slot for queries 522 where two had 566", plain=True,
    ),
    HopperRow(
        (128, 0), (128, 0), 2, 128, 2, 2, True, 240, 24, "padded at S = 512, 2048, 8192 161, 313, 1039 us, without "
        "short masks 172, 322, 1052, not ahead 175, 329, 1083", short_masks=True,
    ),
    HopperRow(
        (128, 64), (128, 0), 2, 128, 2, 1, True, 240, 24, "4 % more than not ahead, with short masks 4 % less; 686 "
        "TFLOP/s not ahead, 656 where the output took the queries' slot", plain=True,
    ),
    HopperRow(
        (128, 64), (128, 0), 2, 128, 2, 1, True, 240, 24, "padded at S = 512, 2048, 8192 110, 194, 586 us, without "
        "short masks 134, 223, 628, not ahead 134, 220, 634", short_masks=True,
    ),
    HopperRow(
        (256, 0), (256, 0), 2, 64, 2, 1, True, 240, 24, "702 TFLOP/s, 684 where the output took the queries' slot; "
        "1.5 % more than not ahead; short masks 1 % more", plain=True, short_masks=True,
    ),
    HopperRow(
        (256, 0), (256, 0), 2, 64, 2, 1, False, 240, 24, "8 x 2048 padded with softcap 198 us, ahead 220; padded alone "
        "146, 145, softcap alone 280, 271", short_masks=True,
    ),
)  # fmt: skip


def hopper_configuration(
    head_dim: int, value_dim: int, num_queries: int, plain: bool, causal: bool, one_copy: bool
) -> HopperRow | None:
    """The row for these head dimensions and so many queries, or None where none fits.

    Args:
        plain: there is neither a key range nor softcap.
        causal: keys behind each query are hidden.
        one_copy: this Triton can have both consumers run one copy of the code.
    """
    for row in ROWS:
        fits = head_dim <= sum(row.head_dim) and value_dim <= sum(row.value_dim)
        if not fits or num_queries < row.min_queries[0 if causal else 1]:
            continue
        if (plain or not row.plain) and (causal or not row.causal) and (one_copy or not row.one_copy):
            return row
    return None


# The reasons are us on an H200 with Triton 3.6, inside CUDA graphs, for 32 query heads on 8 KV heads if none are named.
DECODE_ROWS = (
    HopperDecodeRow(
        16, 64, 32, 128, ((2, 1), (1, 4)), 2, 128, 128,
        "B16 S2048 of 8:8 heads 19.2, not whole 20.4; B1 S8192 8.4, in 3 stages 8.5, in 1 9.7",
        whole=((3, 1), (1, 4)),
    ),
    HopperDecodeRow(
        16, 128, 16, 64, ((2, 3), (1, 4)), 3, 128, 128,
        "B1 S8192, B16 S2048 12.5, 36.4, of 128 keys 12.5, 40.4; B4 S8192 of 32:1 heads 13.4, with 32 rows 15.6; "
        "B16 S2048, B64 S4096 35.2, 245, not whole 36.4, 252; 4 tokens on B16 S2048 35.9, not whole 44.2, as "
        "if of 8 rows 50",
        whole=((3, 1), (2, 3), (1, 4)), tall=(2, 2, 3),
    ),
    HopperDecodeRow(
        16, 256, 16, 64, ((2, 1), (1, 2)), 1, 128, 128, "76 KiB: two programs an SM; with 2 levels 3.7 spills; of 16:8 "
        "heads B1 S8192 20.9, in 1 stage 22.6; B16 S4096 126, not whole 130", whole=((2, 1), (1, 2)),
    ),
    HopperDecodeRow(
        8, 64, 32, 128, ((1, 4),), 2, 128, 128, "B16 S2048 of 8:8 heads 13.4; of 64 keys 14.3; chunks of 512 keys 13.4"
    ),
    HopperDecodeRow(
        8, 128, 16, 64, ((2, 4),), 3, 128, 256,
        "B16 S2048, B64 S4096 22.9, 137; 128 keys in 1 stage 26.4, 145; B1 S32768 23.5, with 128 chunks 28.6",
    ),
    HopperDecodeRow(8, 256, 16, 64, ((1, 2),), 1, 128, 128, "no registers for more levels"),
)  # fmt: skip


def hopper_decode_configuration(bits: int, head_dim: int) -> HopperDecodeRow:
    """The decode kernel's row for elements of K and V of `bits` bits and the larger head dimension."""
    return next(row for row in DECODE_ROWS if row.bits == bits and head_dim <= row.head_dim)
