"""The planner on compute capability 9.0: what the Gluon kernels take, and why they do not take the rest."""

import pytest
import torch
from flashcore_kernels.choose import MAX_HEAD_DIM, choose
from flashcore_kernels.device import Device
from flashcore_kernels.hopper.prefill.table import DECODE_ROWS, hopper_decode_configuration
from flashcore_kernels.hopper.prefill.table import ROWS as HOPPER_ROWS
from flashcore_kernels.plan import MAX_DECODE_QUERIES, most_chunks, power_of_2_from

from ..test_plan import problem

NEW = Device("cuda", 90, triton=(3, 5))


def chosen_for(num_queries: int, device: Device, **changed):
    """The plan for aligned tensors; `changed` are sizes and dtype, and fields of the Problem."""
    changed = {"aligned": True, **changed}
    shape = {name: changed.pop(name) for name in ("head_dim", "value_dim", "dtype", "heads") if name in changed}
    return choose(problem(num_queries, **shape)._replace(**changed), device)


class TestHopper:
    """On compute capability 9.0 with Triton 3.5 or newer the Gluon kernel takes prefill, unless a rule forbids it."""

    def chosen(self, device=NEW, num_queries=64, **changed):
        return chosen_for(num_queries, device, **changed)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("sizes", [(16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
    def test_taken(self, sizes, dtype):
        chosen = self.chosen(head_dim=sizes[0], value_dim=sizes[1], dtype=dtype)
        assert chosen.kernel == "flashcore_hopper"
        assert sum(chosen.config.row.head_dim) >= sizes[0] and sum(chosen.config.row.value_dim) >= sizes[1]
        assert (chosen.config.block_m, chosen.config.block_n) == (
            64 * chosen.config.row.consumers,
            chosen.config.row.block_n,
        )

    @pytest.mark.parametrize(
        "changed", [{"range_layout": "sequence"}, {"range_layout": "rows"}, {"softcap": 5.0}, {"has_sinks": True},
                    {"left": 7}, {"right": 0}, {"query_start": -3}], ids=str
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
            ({"mask_kind": "bool"}, "there is a dense mask"),
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
        for row in HOPPER_ROWS:
            queries = 64 * row.consumers * row.query_slots
            keys = row.stages * row.block_n
            size = 2 * (queries * sum(row.head_dim) + keys * (sum(row.head_dim) + sum(row.value_dim)))
            if row.query_slots == 1:
                assert row.value_dim[1] == 0
                size += queries * row.value_dim[0]
            assert all(v <= k for k, v in zip(row.head_dim, row.value_dim))
            assert size + 2048 <= 232448, row

    def test_who_asks_waits_for_no_consumer_that_waits_for_the_answer(self):
        """A consumer that has computed its last block holds that and waits for the next place. The producer may still
        fetch `stages` blocks from there on, and asks for it with ASK_BLOCKS left.
        """
        producer = pytest.importorskip("flashcore_kernels.hopper.prefill.producer")
        for row in HOPPER_ROWS:
            others = -(-64 * (row.consumers - 1) // row.block_n)  # blocks that only other consumers see
            assert others <= row.stages - 1 + producer.ASK_BLOCKS.value - 1, row

    def test_the_next_wider_row_is_hidden_by_none(self):
        # Of one size: the special rows first, and last one for every call.
        order = [
            (sum(row.head_dim), sum(row.value_dim), -max(row.min_queries), not row.plain, not row.one_copy)
            for row in HOPPER_ROWS
        ]
        assert order == sorted(order) and len(set(order)) == len(order)
        for last, following in zip(HOPPER_ROWS, [*HOPPER_ROWS[1:], None]):
            if following is None or (last.head_dim, last.value_dim) != (following.head_dim, following.value_dim):
                assert not (last.plain or any(last.min_queries) or last.one_copy or last.causal)

    def test_one_copy_of_the_code_is_of_two_consumers_and_two_slots(self):
        for row in HOPPER_ROWS:
            assert not row.one_copy or (row.consumers, row.query_slots) == (2, 2), row
            assert row.one_copy or not row.turns, row

    @pytest.mark.parametrize(
        "head_dim, right, one_copy", [(64, 0, True), (40, 0, True), (64, -1, False), (96, 0, False)]
    )
    def test_one_copy_where_it_pays_and_this_triton_can(self, head_dim, right, one_copy):
        sizes = {"head_dim": head_dim, "value_dim": head_dim, "right": right, "num_queries": 512, "num_keys": 512}
        for version, can in (((3, 5), True), ((3, 7), True), ((3, 8), False), ((3, 10), False)):
            chosen = self.chosen(Device("cuda", 90, triton=version), **sizes)
            assert chosen.config.row.one_copy == (one_copy and can)
            assert chosen.config.num_warps == (8 if one_copy and can else 4)
        for more in ({"range_layout": "sequence"}, {"softcap": 5.0}):
            assert not self.chosen(Device("cuda", 90, triton=(3, 6)), **sizes, **more).hopper.one_copy

    def test_rows_of_one_size_give_the_same_bits(self):
        """Their blocks of keys are the same: test_same_bits_by_all_rows shows on a GPU that the bits are."""
        blocks = {}
        for row in HOPPER_ROWS:
            assert blocks.setdefault((row.head_dim, row.value_dim), row.block_n) == row.block_n

    @pytest.mark.parametrize("sizes", [(128, 128), (192, 128)])
    def test_short_masks_where_there_is_a_key_range_or_softcap(self, sizes):
        size = {"head_dim": sizes[0], "value_dim": sizes[1]}
        for plain in ({}, {"right": 0}, {"left": 7}, {"has_sinks": True}):
            assert not self.chosen(**size, **plain).hopper.short_masks
        for more in ({"range_layout": "sequence"}, {"range_layout": "rows"}, {"softcap": 5.0}):
            assert self.chosen(**size, **more).hopper.short_masks

    def test_three_consumers_for_many_queries_of_head_dim_64(self):
        assert self.chosen(num_queries=2048, num_keys=2048).hopper.consumers == 3
        assert self.chosen(num_queries=2047, num_keys=2047).hopper.consumers == 2
        for queries, consumers in ((3072, 3), (3071, 2)):
            assert self.chosen(num_queries=queries, num_keys=3072, right=0).hopper.consumers == consumers
        assert self.chosen(num_queries=4096, num_keys=4096, range_layout="sequence").hopper.consumers == 2
        assert self.chosen(num_queries=2048, num_keys=2048, head_dim=72, value_dim=72).hopper.consumers == 2


class TestHopperDecode:
    """On compute capability 9.0 with Triton 3.5 or newer the Gluon kernel takes decode, unless a rule forbids it."""

    def chosen(self, device=NEW, num_queries=1, **changed):
        return chosen_for(num_queries, device, **changed)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("sizes", [(16, 16), (64, 64), (80, 80), (96, 96), (192, 128), (256, 256)])
    @pytest.mark.parametrize("fp8", [False, True])
    def test_taken(self, sizes, dtype, fp8):
        chosen = self.chosen(head_dim=sizes[0], value_dim=sizes[1], dtype=dtype, fp8=fp8)
        assert chosen.kernel == "flashcore_hopper_decode" and chosen.reason == "1 query tokens, at most 16"
        assert chosen.config.block_d >= max(sizes[0], 32 if fp8 else 16) and chosen.config.block_dv >= max(
            sizes[1], 64
        ), "what wgmma takes"
        assert (
            power_of_2_from(chosen.config.block_d) == chosen.config.block_d
            and power_of_2_from(chosen.config.block_dv) == chosen.config.block_dv
        )

    @pytest.mark.parametrize(
        "changed", [{"range_layout": "sequence"}, {"softcap": 5.0}, {"has_sinks": True}, {"left": 7}, {"right": 0},
                    {"query_start": -3}, {"num_queries": MAX_DECODE_QUERIES}], ids=str
    )  # fmt: skip
    def test_taken_with(self, changed):
        assert self.chosen(**changed).kernel == "flashcore_hopper_decode"

    @pytest.mark.parametrize(
        "changed, reason",
        [
            ({"device": Device("cuda", 90, triton=(3, 4))}, "needs Triton 3.5 or newer, and this is 3.4"),
            ({"dtype": torch.float32}, "takes float16 and bfloat16, not torch.float32"),
            ({"mask_kind": "bool"}, "there is a dense mask"),
            ({"aligned": False}, "no multiple of 16 bytes"),
            ({"head_dim": 20, "value_dim": 64}, "rows of 20 or 64 elements"),
            ({"head_dim": 64, "value_dim": 36}, "rows of 64 or 36 elements"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_not_taken(self, changed, reason):
        chosen = self.chosen(**changed)
        assert chosen.kernel == "flashcore_decode" and reason in chosen.reason
        chosen = self.chosen(fp8=True, **changed)
        assert chosen.kernel == "flashcore_forward" and "portable decode kernel does not read fp8" in chosen.reason

    def test_rows_of_8_bit_elements(self):
        assert self.chosen(head_dim=40).kernel == "flashcore_hopper_decode"
        assert self.chosen(head_dim=48, fp8=True).kernel == "flashcore_hopper_decode"
        assert self.chosen(head_dim=40, fp8=True).kernel == "flashcore_forward"

    def test_a_range_for_each_query(self):
        assert self.chosen(range_layout="rows").kernel == "flashcore_hopper"

    @pytest.mark.parametrize("arch", [80, 89, 100, 120])
    def test_other_gpus(self, arch):
        chosen = self.chosen(Device("cuda", arch, triton=(3, 9)))
        assert chosen.kernel == "flashcore_decode" and "Hopper" not in chosen.reason

    @pytest.mark.parametrize("heads, num_queries, rows", [((1, 1), 1, 8), ((8, 2), 4, 16), ((12, 4), 4, 16)])
    def test_rows_of_a_tile(self, heads, num_queries, rows):
        assert self.chosen(heads=heads, num_queries=num_queries).block_m == rows

    def test_no_more_rows_than_the_table_says(self):
        chosen = self.chosen(heads=(64, 1), num_queries=16)
        assert chosen.config.block_m == hopper_decode_configuration(16, 64).rows

    @pytest.mark.parametrize("fp8", [False, True])
    @pytest.mark.parametrize("batch, num_keys", [(1, 100), (64, 10**6)])
    def test_the_same_for_every_batch_and_length(self, batch, num_keys, fp8):
        made = problem(1, num_keys)._replace(batch_size=batch, aligned=True, fp8=fp8)
        assert choose(made, NEW) == self.chosen(fp8=fp8)

    @pytest.mark.parametrize("num_keys", [1, 17, 129, 1000, 4097, 100_000])
    def test_no_sequence_needs_more_programs_than_there_are(self, num_keys):
        """The kernel's own arithmetic, as for the portable one."""
        chosen = self.chosen()
        for length in {1, num_keys // 3 + 1, num_keys - 1 or 1, num_keys}:
            even = -(-length // chosen.config.max_chunks)
            chunk = max((even + 31) // 32 * 32, chosen.config.min_chunk)
            assert -(-length // chunk) <= most_chunks(num_keys, chosen.config.min_chunk, chosen.config.max_chunks)

    def test_rows_are_sane(self):
        for row in DECODE_ROWS:
            assert row.block_n in (64, 128, 256) and 0 <= row.levels <= 3, "wgmma has 64 rows, which are the keys"
            assert row.rows in (8, 16, 32, 64) and row.min_chunk % 32 == 0 and len(row.why) > 10
            wide = max(power_of_2_from(row.head_dim), 64)
            for stages, resident in (*row.stages, *row.whole):
                size = stages * row.block_n * 2 * wide * row.bits // 8 + 2 * row.rows * (wide + row.block_n)
                assert size + 1536 <= 233472 // resident, "so many programs, each with a KiB for the system and scratch"
                assert 1 <= resident <= 6
        for bits in (8, 16):
            sizes = [row.head_dim for row in DECODE_ROWS if row.bits == bits]
            assert sizes == sorted(set(sizes)) and sizes[-1] == MAX_HEAD_DIM
