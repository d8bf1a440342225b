"""The planner: a pure function of the problem and the device, one test a rule; the tables; the launch cache's key."""

import inspect
import itertools

import pytest
import torch
from flashcore_kernels import explain
from flashcore_kernels.choose import MAX_HEAD_DIM, choose, fallback_reason
from flashcore_kernels.device import Device
from flashcore_kernels.hopper.prefill.table import ROWS as HOPPER_ROWS
from flashcore_kernels.plan import MAX_DECODE_QUERIES, most_chunks, power_of_2_from
from flashcore_kernels.portable.tables import TABLES, row_for
from flashcore_kernels.problem import check_problem, with_alignment
from flashcore_kernels.runtime import launch

H200 = Device("cuda", 90)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ARCHS = (0, 80, 86, 87, 89, 90, 100, 103, 120)


def problem(num_queries=64, num_keys=64, *, heads=(4, 2), head_dim=64, value_dim=None, dtype=torch.float16, **changed):
    """A Problem of these shapes, without the tensors' memory."""
    sizes = (
        (heads[0], num_queries, head_dim),
        (heads[1], num_keys, head_dim),
        (heads[1], num_keys, value_dim or head_dim),
    )
    return check_problem(*(torch.empty(2, *size, dtype=dtype, device="meta") for size in sizes))._replace(**changed)


class TestWhichKernel:
    @pytest.mark.parametrize("num_queries", [1, 2, MAX_DECODE_QUERIES])
    def test_few_queries_decode(self, num_queries):
        assert choose(problem(num_queries), H200).kernel == "flashcore_decode"

    @pytest.mark.parametrize("num_queries", [MAX_DECODE_QUERIES + 1, 4096])
    def test_more_queries_prefill(self, num_queries):
        assert choose(problem(num_queries), H200).kernel == "flashcore_forward"

    def test_a_range_for_each_query_prefills(self):
        assert choose(problem(1, range_layout="rows"), H200).kernel == "flashcore_forward"
        assert choose(problem(1, range_layout="sequence"), H200).kernel == "flashcore_decode"

    def test_the_reason_says_the_rule(self):
        assert "1 query tokens, at most 16" in choose(problem(1), H200).reason
        assert "64 query tokens, more than 16" in choose(problem(64), H200).reason


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


class TestAlignment:
    """16 bytes is what the copy engine counts in."""

    def test_contiguous(self):
        tensor = torch.empty(2, 3, 5, 40, dtype=torch.float16)
        assert with_alignment(problem(), tensor, tensor.transpose(1, 2)).aligned

    def test_a_row_of_20_values(self):
        assert not with_alignment(problem(), torch.empty(2, 3, 5, 20, dtype=torch.float16)).aligned
        assert with_alignment(problem(), torch.empty(2, 1, 1, 40, dtype=torch.float16)[:, :, :, :20]).aligned

    def test_an_odd_address(self):
        assert not with_alignment(problem(), torch.empty(64, dtype=torch.float16)[4:].view(1, 1, 1, 60)).aligned

    def test_strides_that_are_never_used(self):
        tensor = torch.empty(2, 16, dtype=torch.float16).as_strided((2, 1, 1, 16), (16, 3, 7, 1))
        assert with_alignment(problem(), tensor).aligned


class TestFallback:
    def test_gradients(self):
        assert "gradients" in fallback_reason(problem(needs_grad=True), H200)

    def test_no_device(self):
        chosen = choose(problem(), Device("torch", reason="no Triton here"))
        assert chosen.kernel == "torch" and chosen.reason == "no Triton here"

    @pytest.mark.parametrize("dtype", [torch.float64])
    def test_dtype(self, dtype):
        assert "not torch.float64" in fallback_reason(problem(dtype=dtype), H200)

    @pytest.mark.parametrize("sizes", [(257, 64), (64, 257), (512, 512)], ids=str)
    def test_head_dim(self, sizes):
        assert f"up to {MAX_HEAD_DIM}" in fallback_reason(problem(head_dim=sizes[0], value_dim=sizes[1]), H200)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("head_dim", [1, 16, 40, 256])
    def test_not_otherwise(self, head_dim, dtype):
        assert fallback_reason(problem(head_dim=head_dim, dtype=dtype), H200) is None


class TestSameForEveryBatch:
    """A sequence is computed the same way alone and in a batch: the plan knows neither of batch nor of length."""

    @pytest.mark.parametrize("num_queries", [1, 64])
    def test_batch_and_length(self, num_queries):
        plans = {
            choose(problem(num_queries, num_keys)._replace(batch_size=batch), H200)
            for batch, num_keys in itertools.product((1, 2, 64), (1, 100, 10**6))
        }
        assert len(plans) == 1

    def test_no_state(self):
        assert choose(problem(), H200) == choose(problem(), H200)


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
        chosen = choose(problem(1), H200)
        assert (
            most_chunks(1, chosen.config.min_chunk, chosen.config.max_chunks)
            == most_chunks(chosen.config.min_chunk, chosen.config.min_chunk, chosen.config.max_chunks)
            == 1
        )
        assert most_chunks(chosen.config.min_chunk + 1, chosen.config.min_chunk, chosen.config.max_chunks) == 2
        assert most_chunks(10**9, chosen.config.min_chunk, chosen.config.max_chunks) == chosen.config.max_chunks

    @pytest.mark.parametrize("num_keys", [1, 17, 129, 1000, 4097, 100_000])
    def test_no_sequence_needs_more_programs_than_there_are(self, num_keys):
        """The kernel's own arithmetic: chunks of a sequence of any length within the slots."""
        chosen = choose(problem(1), H200)
        for length in {1, num_keys // 3 + 1, num_keys - 1 or 1, num_keys}:
            even = -(-length // chosen.config.max_chunks)
            chunk = max((even + 31) // 32 * 32, chosen.config.min_chunk)
            assert -(-length // chunk) <= most_chunks(num_keys, chosen.config.min_chunk, chosen.config.max_chunks)

    @pytest.mark.parametrize("num_kv_heads, most", [(1, 128), (2, 64), (8, 16), (10, 16), (32, 4), (200, 1)])
    def test_few_kv_heads_are_cut_finer(self, num_kv_heads, most):
        """So that one sequence fills a GPU; a power of two, which the merge needs."""
        assert choose(problem(1, heads=(num_kv_heads, num_kv_heads)), H200).config.max_chunks == most


class TestBlockSizes:
    @pytest.mark.parametrize("head_dim, block", [(1, 16), (16, 16), (40, 64), (72, 128), (112, 128), (176, 256)])
    def test_head_dim_is_padded(self, head_dim, block):
        chosen = choose(problem(head_dim=head_dim), H200)
        assert chosen.config.block_d == chosen.config.block_dv == block
        assert chosen.config.block_d1 == chosen.config.block_dv1 == 0

    @pytest.mark.parametrize("head_dim, first", [(48, 32), (80, 64), (96, 64), (144, 128), (160, 128), (192, 128)])
    def test_sums_of_two_powers_of_two_are_not(self, head_dim, first):
        chosen = choose(problem(head_dim=head_dim, aligned=True), H200)
        assert (
            (chosen.config.block_d, chosen.config.block_d1)
            == (chosen.config.block_dv, chosen.config.block_dv1)
            == (first, head_dim - first)
        )

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
        assert (chosen.config.block_d, chosen.config.block_d1, chosen.config.block_dv, chosen.config.block_dv1) == (
            128,
            0,
            128,
            0,
        )

    def test_value_dim_of_its_own(self):
        chosen = choose(problem(head_dim=192, value_dim=128, aligned=True), H200)
        assert (chosen.config.block_d, chosen.config.block_d1, chosen.config.block_dv, chosen.config.block_dv1) == (
            128,
            64,
            128,
            0,
        )

    @pytest.mark.parametrize(
        "head_dim, value_dim, whole",
        [(128, 128, True), (96, 96, True), (80, 128, True), (72, 72, False), (128, 72, False), (104, 64, False)],
    )
    def test_rows_for_columns_that_are_all_there(self, head_dim, value_dim, whole):
        row = next(row for row in TABLES[90] if row[:3] == ("flashcore_forward", 16, 128) and row.whole == whole)
        chosen = choose(problem(head_dim=head_dim, value_dim=value_dim, aligned=True), H200)
        assert (chosen.config.block_m, chosen.config.num_warps) == (row.block_m, row.num_warps)

    @pytest.mark.parametrize("head_dim", [16, 40, 48, 64, 80, 96, 128, 192, 256])
    @pytest.mark.parametrize("arch", ARCHS)
    def test_a_key_range_leaves_the_blocks_as_they_are(self, arch, head_dim):
        """Or a sequence would have other bits in a padded batch than alone."""
        both = [choose(problem(head_dim=head_dim, aligned=True, range_layout=layout), Device("cuda", arch))
                for layout in (None, "sequence")]  # fmt: skip
        assert both[0].block_n == both[1].block_n

    def test_on_hopper_tiles_of_head_dim_64_are_higher_with_a_key_range(self):
        both = [choose(problem(head_dim=64, range_layout=layout), H200).config.block_m for layout in (None, "sequence")]
        assert both == [64, 128]

    def test_padded(self):
        assert [power_of_2_from(n) for n in (1, 2, 3, 16, 17, 255, 256)] == [1, 2, 4, 16, 32, 256, 256]

    @pytest.mark.parametrize(
        "changed", [{"mask_kind": "bool"}, {"mask_kind": "float"}, {"range_layout": "rows"}], ids=str
    )
    def test_masks_have_rows_of_their_own(self, changed):
        row = row_for("flashcore_forward", 90, torch.float16, 64, gaps=True)
        chosen = choose(problem(**changed), H200)
        assert (chosen.config.block_m, chosen.config.block_n) == (row.block_m, row.block_n)

    def test_fp8_has_rows_of_its_own_where_the_table_has_some(self):
        wide = {"head_dim": 256, "value_dim": 256, "num_queries": 100}
        portable = H200._replace(triton=(3, 4))
        chosen = {fp8: choose(problem(**wide, fp8=fp8), portable) for fp8 in (True, False)}
        for fp8, bits in ((True, 8), (False, 16)):
            row = next(row for row in TABLES[90] if row[:3] == ("flashcore_forward", bits, 256) and not row.gaps)
            assert (chosen[fp8].block_m, chosen[fp8].block_n, chosen[fp8].num_warps) == row[3:6]
        assert chosen[True].block_n != chosen[False].block_n
        assert row_for("flashcore_forward", 89, torch.float16, 64, fp8=True).bits == 16
        assert row_for("flashcore_forward", 90, torch.float32, 64, fp8=True).bits == 32


class TestTables:
    @pytest.mark.parametrize("gaps", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("arch", ARCHS)
    @pytest.mark.parametrize("kernel", ["flashcore_forward", "flashcore_decode"])
    def test_a_row_for_everything(self, kernel, arch, dtype, gaps):
        for head_dim in range(1, MAX_HEAD_DIM + 1):
            row = row_for(kernel, arch, dtype, head_dim, gaps)
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
            assert seen.get((*kind, row.whole, row.ranges), 0) < row.head_dim, row
            assert not row.whole or not any((*kind, False, ranges) in seen for ranges in (False, True)), row
            assert row.ranges or seen.get((*kind, row.whole, True), 0) < row.head_dim, row
            seen[(*kind, row.whole, row.ranges)] = row.head_dim

    def test_unknown_capabilities_take_the_next_below(self):
        assert row_for("flashcore_decode", 103, torch.float16, 64) in TABLES[100]
        assert row_for("flashcore_decode", 87, torch.float16, 64) in TABLES[86]

    def test_nothing_fits(self):
        with pytest.raises(LookupError, match="sm_90, 16 bits, head_dim 300"):
            row_for("flashcore_decode", 90, torch.float16, 300)
        with pytest.raises(LookupError, match="64 bits"):
            row_for("flashcore_decode", 90, torch.float64, 64)


class TestExplain:
    def test_kernel(self):
        query, key = torch.zeros(1, 4, 1, 64, dtype=torch.float16), torch.zeros(1, 2, 9, 64, dtype=torch.float16)
        assert explain(query, key, key, device=H200).startswith("flashcore_decode (16x")

    def test_hopper(self):
        query = torch.zeros(1, 4, 64, 64, dtype=torch.float16)
        new, old = (Device("cuda", 90, triton=version) for version in ((3, 9), (3, 4)))
        row = next(row for row in HOPPER_ROWS if not any(row.min_queries))
        tile = f"flashcore_hopper ({64 * row.consumers}x{row.block_n}"
        assert explain(query, query, query, device=new).startswith(tile)
        assert "not the Hopper kernel, because that needs Triton 3.5" in explain(query, query, query, device=old)
        off = torch.zeros(1, 4, 64, 68, dtype=torch.float16)[..., 4:]
        assert "no multiple of 16 bytes" in explain(off, off, off, device=new)

    def test_fallback(self):
        query = torch.zeros(1, 4, 1, 300)
        assert explain(query, query, query, device=H200).startswith("torch: the kernels take head_dim up to 256")


class FakeKernel:
    """Stands where a triton.jit function stands, and counts how often it is compiled."""

    def __init__(self):
        self.compiled = self.reused = 0

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, num_warps, num_stages):
            self.compiled += 1
            return self.Compiled(self)

        return compile_and_launch

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch_again(*arguments):
                self.kernel.reused += 1

            return launch_again


class FakeTensor(torch.Tensor):
    """A CPU tensor that says it is on a GPU, at an address of our choice."""

    address = 0
    device = torch.device("cuda", 0)

    def data_ptr(self):
        return self.address


def fake(dtype=torch.float16, address=4096, index=0):
    tensor = torch.zeros(1, dtype=dtype).as_subclass(FakeTensor)
    tensor.address, tensor.device = address, torch.device("cuda", index)
    return tensor


class TestLaunchCache:
    """A compiled kernel is used again exactly where Triton itself would have compiled the same one."""

    BASE = ((fake(), 64, 3), (5, 0.5), (64, True))

    @pytest.fixture(autouse=True)
    def empty_cache(self, monkeypatch):
        monkeypatch.setattr(launch, "_compiled", {})

    def launched(self, first, second, plans=(None, None)):
        kernel = FakeKernel()
        usual = choose(problem(), H200)
        for call, chosen in zip((first, second), plans):
            launch.launch(kernel, 7, *call, chosen or usual)
        return kernel.compiled, kernel.reused

    def test_reused(self):
        assert self.launched(self.BASE, self.BASE) == (1, 1)

    @pytest.mark.parametrize(
        "arguments",
        [(fake(), 128, 3), (fake(), 64, 5), (fake(address=8192), 64, 3)],
        ids=["another multiple of 16", "another odd int", "another aligned address"],
    )
    def test_reused_for(self, arguments):
        assert self.launched(self.BASE, (arguments, *self.BASE[1:])) == (1, 1)

    def test_reused_for_other_scalars(self):
        """Lengths must not compile anew: one kernel serves every length."""
        assert self.launched(self.BASE, (self.BASE[0], (4096, 2.5), self.BASE[2])) == (1, 1)

    @pytest.mark.parametrize(
        "arguments",
        [
            (fake(torch.bfloat16), 64, 3),
            (fake(address=4098), 64, 3),
            (fake(index=1), 64, 3),
            (None, 64, 3),
            (fake(), 65, 3),
            (fake(), 64, 1),
            (fake(), 64, 16),
            (fake(), 2**40, 3),
        ],
        ids=["dtype", "alignment", "device", "None", "% 16", "== 1", "3 -> 16", "int64"],
    )
    def test_compiled_anew_for(self, arguments):
        first = self.BASE if arguments[0] is not None else ((fake(), fake(), 64), *self.BASE[1:])
        second = arguments if arguments[0] is not None else (fake(), None, 64)
        assert self.launched(first, (second, *self.BASE[1:])) == (2, 0)

    def test_compiled_anew_for_constants(self):
        assert self.launched(self.BASE, (*self.BASE[:2], (64, False))) == (2, 0)

    @pytest.mark.parametrize("field", ["num_warps", "num_stages"])
    def test_compiled_anew_for_options(self, field):
        usual = choose(problem(), H200)
        assert self.launched(self.BASE, self.BASE, (usual, usual._replace(**{field: 7}))) == (2, 0)

    def test_a_grid_too_large_is_refused(self):
        with pytest.raises(ValueError, match="more than a grid holds"):
            launch.launch(FakeKernel(), 2**31, *self.BASE, choose(problem(), H200))

    def test_arguments_are_the_kernels_parameters(self):
        """Positions, not names, go to Triton: a parameter moved in one place alone would go unnoticed."""
        from flashcore_kernels.portable.decode import flashcore_decode
        from flashcore_kernels.portable.forward import flashcore_forward

        for kernel in (flashcore_forward, flashcore_decode):
            parameters = inspect.signature(kernel.fn).parameters
            assert list(parameters)[:4] == ["Q", "K", "V", "Out"]
            constant = ["constexpr" in str(parameter.annotation) for parameter in parameters.values()]
            assert constant == sorted(constant), "constexprs stand last"
