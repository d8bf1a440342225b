"""Which prefills the Gluon kernel takes on compute capability 9.0, why it does not take the rest, and its table."""

import pytest
import torch
from flashcore_kernels.device import Device
from flashcore_kernels.hopper.prefill.table import ROWS
from flashcore_kernels.plan import MAX_DECODE_QUERIES

from ...test_choose import NEW, chosen_for


class TestHopper:
    """On compute capability 9.0 with Triton 3.5 or newer the Gluon kernel takes prefill, unless a rule forbids it."""

    def chosen(self, device=NEW, num_queries=64, **changed):
        return chosen_for(num_queries, device, **{"num_keys": 4096, **changed})

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("sizes", [(16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
    def test_taken(self, sizes, dtype):
        chosen = self.chosen(head_dim=sizes[0], value_dim=sizes[1], dtype=dtype)
        assert chosen.kernel == "flashcore_hopper"
        row = chosen.config.row
        assert sum(row.head_dim) >= sizes[0] and sum(row.value_dim) >= sizes[1]
        assert (chosen.config.block_m, chosen.config.block_n) == (64 * row.consumers, row.block_n)

    @pytest.mark.parametrize(
        "changed", [{"range_layout": "sequence"}, {"range_layout": "rows"}, {"softcap": 5.0}, {"has_sinks": True},
                    {"left": 7}, {"right": 0}, {"query_start": -3}, {"dropout": 0.1}], ids=str
    )  # fmt: skip
    def test_taken_with(self, changed):
        assert self.chosen(**changed).kernel == "flashcore_hopper"

    @pytest.mark.parametrize("version", [(3, 5), (3, 9), (4, 0)])
    def test_triton_is_new_enough(self, version):
        assert self.chosen(Device("cuda", 90, triton=version)).kernel == "flashcore_hopper"

    @pytest.mark.parametrize(
        "changed, reason",
        [
            ({"device": Device("cuda", 90, triton=(3, 4))}, "needs Triton 3.5 or newer, and this is 3.4"),
            ({"dtype": torch.float32}, "takes float16 and bfloat16, not torch.float32"),
            (
                {"mask_kind": "float", "mask_bits": 16, "mask_rows": True, "head_dim": 256, "value_dim": 256},
                "room for a bias of 16 bits",
            ),
            ({"dropout": 0.1, "mask_kind": "bool", "mask_bits": 8, "mask_rows": True}, "dropped beside a dense mask"),
            ({"aligned": False}, "no multiple of 16 bytes"),
            ({"value_dim": 36}, "rows of 36 values"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_not_taken(self, changed, reason):
        chosen = self.chosen(**changed)
        assert chosen.kernel == "flashcore_forward" and reason in chosen.reason

    @pytest.mark.parametrize("arch", [80, 89, 100, 120])
    def test_other_gpus(self, arch):
        chosen = self.chosen(Device("cuda", arch, triton=(3, 9)))
        assert chosen.kernel == "flashcore_forward" and "Hopper" not in chosen.reason

    def test_decode_has_its_own(self):
        assert self.chosen(num_queries=MAX_DECODE_QUERIES).kernel == "flashcore_hopper_decode"

    def test_fits_into_shared_memory(self):
        """227 KiB a block: Q, whose place the output takes, or half of the output, K, V, and a KiB of barriers."""
        for row in ROWS:
            queries = 64 * row.consumers * row.query_buffers
            keys = row.stages * row.block_n
            size = 2 * (queries * sum(row.head_dim) + keys * (sum(row.head_dim) + sum(row.value_dim)))
            if row.query_buffers == 1:
                assert row.value_dim[1] == 0
                size += queries * row.value_dim[0]
            size += 64 * row.consumers * row.block_n * row.bias_bits // 8
            assert all(v <= k for k, v in zip(row.head_dim, row.value_dim))
            assert size + 2048 <= 232448, row

    def test_who_asks_waits_for_no_consumer_that_waits_for_the_answer(self):
        """A consumer that has computed its last block holds that and waits for the next place. The producer may still
        fetch `stages` blocks from there on, and asks for it with ASK_BLOCKS left.
        """
        producer = pytest.importorskip("flashcore_kernels.hopper.prefill.producer")
        for row in ROWS:
            others = -(-64 * (row.consumers - 1) // row.block_n)  # blocks that only other consumers see
            assert others <= row.stages - 1 + producer.ASK_BLOCKS.value - 1, row

    def test_the_next_wider_row_is_hidden_by_none(self):
        # Of one size: the special rows first, and last one for every call.
        order = [
            (sum(row.head_dim), sum(row.value_dim), -max(row.min_queries), not row.plain, not row.one_copy)
            for row in (row for row in ROWS if not row.masked)
        ]
        assert order == sorted(order) and len(set(order)) == len(order)
        rows = [row for row in ROWS if not row.masked]
        for last, following in zip(rows, [*rows[1:], None]):
            if following is None or (last.head_dim, last.value_dim) != (following.head_dim, following.value_dim):
                assert not (last.plain or any(last.min_queries) or last.one_copy or last.causal)

    def test_one_copy_of_the_code_is_of_two_consumers_and_two_buffers(self):
        for row in ROWS:
            assert not row.one_copy or (row.consumers, row.query_buffers) == (2, 2), row
            assert row.one_copy or not row.turns, row

    @pytest.mark.parametrize(
        "head_dim, right, one_copy", [(64, 0, True), (40, 0, True), (64, -1, False), (96, 0, False)]
    )
    def test_one_copy_where_it_pays_and_this_triton_can(self, head_dim, right, one_copy):
        sizes = {"head_dim": head_dim, "value_dim": head_dim, "right": right, "num_queries": 1536, "num_keys": 1536}
        for version, can in (((3, 5), True), ((3, 7), True), ((3, 8), False), ((3, 10), False)):
            chosen = self.chosen(Device("cuda", 90, triton=version), **sizes)
            assert chosen.config.row.one_copy == (one_copy and can)
            assert chosen.config.num_warps == (8 if one_copy and can else 4)
        for more in ({"range_layout": "sequence"}, {"softcap": 5.0}):
            assert not self.chosen(Device("cuda", 90, triton=(3, 6)), **sizes, **more).config.row.one_copy

    def test_rows_of_one_size_give_the_same_bits(self):
        """Their blocks of keys are the same: test_same_bits_by_all_rows shows on a GPU that the bits are."""
        blocks = {}
        for row in (row for row in ROWS if not row.masked):
            assert blocks.setdefault((row.head_dim, row.value_dim), row.block_n) == row.block_n

    @pytest.mark.parametrize("sizes", [(128, 128), (192, 128)])
    def test_short_masks_where_there_is_a_key_range_or_softcap(self, sizes):
        size = {"head_dim": sizes[0], "value_dim": sizes[1]}
        for plain in ({}, {"right": 0}, {"left": 7}, {"has_sinks": True}):
            assert not self.chosen(**size, **plain).config.row.short_masks
        for more in ({"range_layout": "sequence"}, {"range_layout": "rows"}, {"softcap": 5.0}):
            assert self.chosen(**size, **more).config.row.short_masks

    def test_dense_masks(self):
        """Bits need no shared memory; a bias has a tile for each consumer, in fp32 of fewer keys."""
        bias = {"mask_kind": "float", "mask_rows": True}
        for head_dim in (64, 96, 128, 192, 256):
            for more in ({}, {"right": 0}, {"range_layout": "sequence"}, {"num_queries": 4096, "num_keys": 4096}):
                sizes = {"head_dim": head_dim, "value_dim": min(head_dim, 128) if head_dim == 192 else head_dim, **more}
                row = self.chosen(**sizes, mask_kind="bool", mask_bits=8, mask_rows=True).config.row
                assert not row.one_copy and not row.plain and row.consumers == 2
                shared = self.chosen(**sizes, mask_kind="float", mask_bits=16).config.row
                assert shared == row, "a bias that all queries share is loaded without shared memory"
        for bits, rows in ((16, (128, 128)), (32, (128, 64)), (64, (128, 64))):
            for head_dim, block_n in zip((64, 128), rows):
                chosen = self.chosen(head_dim=head_dim, value_dim=head_dim, mask_bits=bits, **bias)
                assert chosen.config.row.bias_bits >= min(bits, 32) and chosen.config.row.block_n == block_n

    def test_a_row_for_masks_is_for_nothing_else(self):
        masked = [row for row in ROWS if row.masked]
        assert masked
        for row in masked:
            sizes = {"head_dim": sum(row.head_dim), "value_dim": sum(row.value_dim)}
            for more in ({}, {"right": 0}, {"range_layout": "rows"}, {"softcap": 5.0}):
                assert self.chosen(**sizes, **more).config.row not in masked

    def test_three_consumers_for_many_queries_of_head_dim_64(self):
        assert self.chosen(num_queries=2048, num_keys=2048).config.row.consumers == 3
        assert self.chosen(num_queries=2047, num_keys=2047).config.row.consumers == 2
        for queries, consumers in ((3072, 3), (3071, 2)):
            assert self.chosen(num_queries=queries, num_keys=3072, right=0).config.row.consumers == consumers
        assert self.chosen(num_queries=4096, num_keys=4096, range_layout="sequence").config.row.consumers == 2
        assert self.chosen(num_queries=2048, num_keys=2048, head_dim=72, value_dim=72).config.row.consumers == 2
