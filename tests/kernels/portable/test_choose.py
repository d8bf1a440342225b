"""The portable kernels' tiles: what the tables give, and what becomes of it for the sizes of a call."""

import pytest
import torch
from flashcore_kernels.choose import MAX_HEAD_DIM, choose
from flashcore_kernels.device import Device
from flashcore_kernels.plan import most_chunks, power_of_2_from
from flashcore_kernels.portable.choose import DecodeConfig, ForwardConfig
from flashcore_kernels.portable.tables import TABLES, row_for

from ..test_choose import DTYPES, H200, problem

ARCHS = (0, 80, 86, 87, 89, 90, 100, 103, 120)


class TestValueColumns:
    """Triton 3.6 made wrong results of value_dim 24 beside head_dim 40 on an H200, by its ptxas 12.8."""

    @pytest.mark.parametrize("value_dim", [17, 20, 24, 31])
    def test_no_partly_filled_tile_of_32_on_hopper(self, value_dim):
        for dtype in (torch.float16, torch.bfloat16):
            assert choose(problem(head_dim=40, value_dim=value_dim, dtype=dtype), H200).config.block_dv == 64

    def test_everything_else_is_padded_to_a_power_of_two(self):
        for value_dim, columns in ((8, 16), (16, 16), (32, 32), (33, 64), (64, 64), (72, 128)):
            assert choose(problem(head_dim=40, value_dim=value_dim), H200).config.block_dv == columns
        assert choose(problem(head_dim=40, value_dim=24, dtype=torch.float32), H200).config.block_dv == 32
        assert choose(problem(head_dim=40, value_dim=24), Device("cuda", 80)).config.block_dv == 32


class TestDecodeTiles:
    @pytest.mark.parametrize("group, num_queries", [(1, 1), (7, 1), (4, 4), (16, 1)])
    def test_at_least_16_rows(self, group, num_queries):
        """tl.dot takes no fewer."""
        assert choose(problem(num_queries, heads=(group, 1)), H200).config.block_m == 16

    def test_whole_group_in_a_tile(self):
        assert choose(problem(2, heads=(16, 1), head_dim=64), H200).config.block_m == 32

    def test_no_more_than_the_row_says(self):
        chosen = choose(problem(16, heads=(64, 1)), H200)
        assert chosen.config.block_m == row_for("flashcore_decode", 90, torch.float16, 64).block_m

    def test_splits(self):
        assert DecodeConfig._fields[-2:] == ("min_chunk", "max_chunks")
        least, most = choose(problem(1), H200).config[-2:]
        assert most_chunks(1, least, most) == most_chunks(least, least, most) == 1
        assert most_chunks(least + 1, least, most) == 2
        assert most_chunks(10**9, least, most) == most

    @pytest.mark.parametrize("num_keys", [1, 17, 129, 1000, 4097, 100_000])
    def test_no_sequence_needs_more_programs_than_there_are(self, num_keys):
        """The kernel's own arithmetic: chunks of a sequence of any length within the slots."""
        config = choose(problem(1), H200).config
        for length in {1, num_keys // 3 + 1, num_keys - 1 or 1, num_keys}:
            even = -(-length // config.max_chunks)
            chunk = max((even + 31) // 32 * 32, config.min_chunk)
            assert -(-length // chunk) <= most_chunks(num_keys, config.min_chunk, config.max_chunks)

    @pytest.mark.parametrize("num_kv_heads, most", [(1, 128), (2, 64), (8, 16), (10, 16), (32, 4), (200, 1)])
    def test_few_kv_heads_are_cut_finer(self, num_kv_heads, most):
        """So that one sequence fills a GPU; a power of two, which the merge needs."""
        assert choose(problem(1, heads=(num_kv_heads, num_kv_heads)), H200).config.max_chunks == most


class TestBlockSizes:
    """Columns of tiles: a ForwardConfig's block_d, block_dv, block_d1, block_dv1."""

    def test_where_they_stand(self):
        assert ForwardConfig._fields[2:6] == ("block_d", "block_dv", "block_d1", "block_dv1")

    @pytest.mark.parametrize("head_dim, block", [(1, 16), (16, 16), (40, 64), (72, 128), (112, 128), (176, 256)])
    def test_head_dim_is_padded(self, head_dim, block):
        chosen = choose(problem(head_dim=head_dim), H200)
        assert chosen.config.block_d == chosen.config.block_dv == block
        assert chosen.config.block_d1 == chosen.config.block_dv1 == 0

    @pytest.mark.parametrize("head_dim, first", [(48, 32), (80, 64), (96, 64), (144, 128), (160, 128), (192, 128)])
    def test_sums_of_two_powers_of_two_are_not(self, head_dim, first):
        chosen = choose(problem(head_dim=head_dim, aligned=True), H200)
        assert chosen.config[2:6] == (first, first, head_dim - first, head_dim - first)

    @pytest.mark.parametrize(
        "other",
        [{"num_queries": 1, "aligned": True}, {"dtype": torch.float32, "aligned": True}, {"aligned": False},
         {"fp8": True, "aligned": True}, {"mask_kind": "float", "aligned": True},
         {"range_layout": "rows", "aligned": True}, {"range_layout": "sequence", "aligned": True}],
        ids=["decode", "fp32", "unaligned", "fp8", "mask", "rows", "range"],
    )  # fmt: skip
    def test_but_by_the_kernel_of_prefill_alone_in_16_bits_that_are_aligned(self, other):
        """The story: on an H200, 64 + 32 columns gave wrong answers with a mask, and read where they may not in fp8."""
        chosen = choose(problem(head_dim=96, **other), H200)
        if chosen.kernel == "flashcore_decode":  # which knows of no second tile
            assert (chosen.config.block_d, chosen.config.block_dv) == (128, 128)
            assert not hasattr(chosen.config, "block_d1")
        else:
            assert chosen.config[2:6] == (128, 128, 0, 0)

    def test_value_dim_of_its_own(self):
        chosen = choose(problem(head_dim=192, value_dim=128, aligned=True), H200)
        assert chosen.config[2:6] == (128, 128, 64, 0)

    @pytest.mark.parametrize(
        "head_dim, value_dim, full",
        [(128, 128, True), (96, 96, True), (80, 128, True), (72, 72, False), (128, 72, False), (104, 64, False)],
    )
    def test_rows_for_columns_that_are_all_there(self, head_dim, value_dim, full):
        row = next(row for row in TABLES[90] if row[:3] == ("flashcore_forward", 16, 128) and row.full_columns == full)
        chosen = choose(problem(head_dim=head_dim, value_dim=value_dim, aligned=True), H200)
        assert (chosen.config.block_m, chosen.config.num_warps) == (row.block_m, row.num_warps)

    @pytest.mark.parametrize("head_dim", [16, 40, 48, 64, 80, 96, 128, 192, 256])
    @pytest.mark.parametrize("arch", ARCHS)
    def test_a_key_range_leaves_the_blocks_as_they_are(self, arch, head_dim):
        """Or a sequence would have other bits in a padded batch than alone."""
        both = [choose(problem(head_dim=head_dim, aligned=True, range_layout=layout), Device("cuda", arch))
                for layout in (None, "sequence")]  # fmt: skip
        assert both[0].config.block_n == both[1].config.block_n

    def test_on_hopper_tiles_of_head_dim_64_are_higher_with_a_key_range(self):
        both = [choose(problem(head_dim=64, range_layout=layout), H200).config.block_m for layout in (None, "sequence")]
        assert both == [64, 128]

    def test_padded(self):
        assert [power_of_2_from(n) for n in (1, 2, 3, 16, 17, 255, 256)] == [1, 2, 4, 16, 32, 256, 256]

    @pytest.mark.parametrize(
        "changed",
        [{"mask_kind": "bool", "mask_rows": True}, {"mask_kind": "float", "mask_rows": True}, {"range_layout": "rows"}],
        ids=str,
    )
    def test_masks_have_rows_of_their_own(self, changed):
        row = row_for("flashcore_forward", 90, torch.float16, 64, gaps=True)
        chosen = choose(problem(**changed), H200)
        assert (chosen.config.block_m, chosen.config.block_n) == (row.block_m, row.block_n)

    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_a_mask_that_all_queries_share_is_like_a_key_range(self, kind):
        shared, ranged = (choose(problem(**one), H200) for one in ({"mask_kind": kind}, {"range_layout": "sequence"}))
        assert shared.config == ranged.config

    def test_fp8_has_rows_of_its_own_where_the_table_has_some(self):
        wide = {"head_dim": 256, "value_dim": 256, "num_queries": 100}
        portable = H200._replace(triton=(3, 4))
        chosen = {fp8: choose(problem(**wide, fp8=fp8), portable) for fp8 in (True, False)}
        for fp8, bits in ((True, 8), (False, 16)):
            row = next(row for row in TABLES[90] if row[:3] == ("flashcore_forward", bits, 256) and not row.gaps)
            config = chosen[fp8].config
            assert (config.block_m, config.block_n, config.num_warps) == row[3:6]
        assert chosen[True].config.block_n != chosen[False].config.block_n
        assert row_for("flashcore_forward", 89, torch.float16, 64, fp8=True).bits == 16
        assert row_for("flashcore_forward", 90, torch.float32, 64, fp8=True).bits == 32


class TestTables:
    @pytest.mark.parametrize("gaps", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("arch", ARCHS)
    @pytest.mark.parametrize("kernel", ["flashcore_forward", "flashcore_decode"])
    def test_a_row_for_everything(self, kernel, arch, dtype, gaps):
        for head_dim in range(1, MAX_HEAD_DIM + 1):
            row = row_for(kernel, arch, dtype, head_dim, gaps=gaps)
            assert row.head_dim >= head_dim and row.gaps == gaps

    @pytest.mark.parametrize("arch", TABLES)
    def test_rows_are_sane(self, arch):
        for row in TABLES[arch]:
            for size in (row.block_m, row.block_n, row.num_warps):
                assert size == power_of_2_from(size), row
            assert row.block_m >= 16 and row.block_n >= 16, "tl.dot takes no less"
            assert row.num_stages >= 1 and row.min_chunk % 32 == 0 and row.chunks >= 1
            assert len(row.why) > 10, f"no reason given: {row}"

    @pytest.mark.parametrize("arch", TABLES)
    def test_no_row_is_hidden_behind_another(self, arch):
        """The first that fits is taken, so smaller head dimensions stand first."""
        seen = {}
        for row in TABLES[arch]:
            kind = (row.kernel, row.bits, row.gaps)
            assert seen.get((*kind, row.full_columns, row.ranges), 0) < row.head_dim, row
            assert not row.full_columns or not any((*kind, False, ranges) in seen for ranges in (False, True)), row
            assert row.ranges or seen.get((*kind, row.full_columns, True), 0) < row.head_dim, row
            seen[(*kind, row.full_columns, row.ranges)] = row.head_dim

    def test_unknown_capabilities_take_the_next_below(self):
        assert row_for("flashcore_decode", 103, torch.float16, 64) in TABLES[100]
        assert row_for("flashcore_decode", 87, torch.float16, 64) in TABLES[86]

    def test_nothing_fits(self):
        with pytest.raises(LookupError, match="sm_90, 16 bits, head_dim 600"):
            row_for("flashcore_decode", 90, torch.float16, 600)
        with pytest.raises(LookupError, match="64 bits"):
            row_for("flashcore_decode", 90, torch.float64, 64)
