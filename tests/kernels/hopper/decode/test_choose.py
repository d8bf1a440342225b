"""Which decodes the Gluon kernel takes on compute capability 9.0, why it does not take the rest, and its table."""

import pytest
import torch
from flashcore_kernels.choose import choose
from flashcore_kernels.device import Device
from flashcore_kernels.hopper.decode.table import ROWS, decode_row_for
from flashcore_kernels.plan import MAX_DECODE_QUERIES, most_chunks, power_of_2_from

from ...test_choose import NEW, chosen_for, problem


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
        keys, values = chosen.config.block_d, chosen.config.block_dv
        assert keys >= max(sizes[0], 32 if fp8 else 16) and values >= max(sizes[1], 64), "what wgmma takes"
        assert power_of_2_from(keys) == keys and power_of_2_from(values) == values

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
        assert self.chosen(heads=heads, num_queries=num_queries).config.block_m == rows

    def test_no_more_rows_than_the_table_says(self):
        chosen = self.chosen(heads=(64, 1), num_queries=16)
        assert chosen.config.block_m == decode_row_for(16, 64).rows

    @pytest.mark.parametrize("fp8", [False, True])
    @pytest.mark.parametrize("batch, num_keys", [(1, 100), (64, 10**6)])
    def test_the_same_for_every_batch_and_length(self, batch, num_keys, fp8):
        made = problem(1, num_keys)._replace(batch_size=batch, aligned=True, fp8=fp8)
        assert choose(made, NEW) == self.chosen(fp8=fp8)

    @pytest.mark.parametrize("num_keys", [1, 17, 129, 1000, 4097, 100_000])
    def test_no_sequence_needs_more_programs_than_there_are(self, num_keys):
        """The kernel's own arithmetic, as for the portable one."""
        config = self.chosen().config
        for length in {1, num_keys // 3 + 1, num_keys - 1 or 1, num_keys}:
            even = -(-length // config.max_chunks)
            chunk = max((even + 31) // 32 * 32, config.min_chunk)
            assert -(-length // chunk) <= most_chunks(num_keys, config.min_chunk, config.max_chunks)

    def test_rows_are_sane(self):
        for row in ROWS:
            assert row.block_n in (64, 128, 256) and 0 <= row.levels <= 3, "wgmma has 64 rows, which are the keys"
            assert row.rows in (8, 16, 32, 64) and row.min_chunk % 32 == 0 and len(row.why) > 10
            wide = max(power_of_2_from(row.head_dim), 64)
            for stages, resident in (*row.stages, *row.whole_sequences):
                size = stages * row.block_n * 2 * wide * row.bits // 8 + 2 * row.rows * (wide + row.block_n)
                assert size + 1536 <= 233472 // resident, "so many programs, each with a KiB for the system and scratch"
                assert 1 <= resident <= 6
        for bits in (8, 16):
            sizes = [row.head_dim for row in ROWS if row.bits == bits]
            assert sizes == sorted(set(sizes)) and sizes[-1] == 256
