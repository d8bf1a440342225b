"""What a launch of the Gluon kernel for prefill gets, caught before it: descriptors, grid, sections.

No GPU is needed. tests/gpu/test_hopper.py sees what the launches compute.
"""

import pytest
import torch
from flashcore_kernels.choose import choose
from flashcore_kernels.dispatch import empty_outputs, serve
from flashcore_kernels.dropout import drop_threshold
from flashcore_kernels.hopper.prefill import choose as prefill_choose
from flashcore_kernels.problem import Inputs, check_problem, with_alignment
from flashcore_kernels.runtime import launch

from ...runtime.test_prepared import H200, tensors_of  # which skips where there is no Triton

pytest.importorskip("flashcore_kernels.hopper.prefill.launch")


class TestHopper:
    @pytest.fixture
    def launched(self, monkeypatch):
        caught = []
        monkeypatch.setattr(
            prefill_choose, "short_row_for", lambda *sizes, **features: None
        )  # which has tests of its own
        monkeypatch.setattr(launch, "launch", lambda *args, **options: caught.append(args))

        def launch_of(query, key, value, is_causal=False, sinks=None, lse=None, device=H200, mask=None, dropout=0.0):
            philox = torch.tensor([1, 2]) if dropout else None
            inputs = Inputs(query, key, value, mask=mask, sinks=sinks, philox=philox)
            problem = check_problem(inputs, is_causal, dropout=dropout)
            chosen = choose(with_alignment(problem, inputs), device)
            assert chosen.kernel == "flashcore_hopper", chosen
            if problem.mask_kind == "bool":
                inputs = inputs._replace(mask=mask.view(torch.uint8))
            serve(chosen, problem, inputs, empty_outputs(query, value, False)[0], lse)
            assert len(caught) == (1 if mask is None else 2), "the mask's map comes first"
            if mask is not None:
                return chosen, (caught.pop(0), caught.pop())
            return chosen, caught.pop()

        return launch_of

    def test_descriptors_say_where_the_tensors_are(self, launched):
        query, key, value = tensors_of(num_queries=200)
        chosen, (_, programs, arguments, scalars, _) = launched(query, key, value)
        q, _, k, _, v, _, o, _ = arguments[:8]
        block_n = chosen.config.block_n
        for tensor, descriptor, rows in ((query, q, 64), (key, k, block_n), (value, v, block_n)):
            assert descriptor.base is tensor and list(descriptor.shape) == list(tensor.shape)
            assert list(descriptor.strides) == list(tensor.stride())
            assert list(descriptor.block_shape) == [1, 1, rows, 64]
        assert list(o.shape) == [2, 8, 200, 64] and o.strides[1] == 64
        tiles = -(-200 // chosen.config.block_m)
        assert programs == (min(132, 16 * tiles), 1)
        assert scalars[:5] == (8, 4, 200, 500, 300) and scalars[15:18] == (16, tiles, 1)

    def test_head_dims_that_are_no_power_of_two_come_in_two_pieces(self, launched):
        query, key, value = (torch.randn(1, 4, 100, size, dtype=torch.float16) for size in (192, 192, 128))
        _, (_, _, arguments, _, _) = launched(query, key, value)
        columns = [None if d is None else d.block_shape[3] for d in arguments[:8]]
        assert columns == [128, 64, 128, 64, 128, None, 64, None], "the output leaves in halves"

    def test_a_stride_that_is_never_used_does_not_matter(self, launched):
        """One sequence, whose batch stride may be anything."""
        query = torch.randn(1, 4, 100, 64, dtype=torch.float16)
        odd = query.as_strided(query.shape, (3, *query.stride()[1:]))
        _, (_, _, arguments, _, _) = launched(odd, query, query)
        assert arguments[0].strides[0] % 8 == 0

    @pytest.mark.parametrize("num_queries", [200, 4096])
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_dropout(self, num_queries, is_causal, launched):
        """By the row for every feature: three consumers have no registers for it."""
        query = torch.empty(1, 4, num_queries, 64, dtype=torch.float16)
        chosen, (kernel, _, arguments, scalars, (constants,)) = launched(query, query, query, is_causal, dropout=0.25)
        assert chosen.config.row.consumers == 2 and not chosen.config.row.plain and constants.dropout
        named = dict(zip(kernel.arg_names, (*arguments, *scalars)))
        assert named["Philox"].tolist() == [1, 2]
        assert named["drop_below"] == drop_threshold(0.25) and named["keep_scale"] == 1 / 0.75
        _, (_, _, arguments, _, (constants,)) = launched(query, query, query, is_causal)
        assert not constants.dropout and arguments[kernel.arg_names.index("Philox")] is None

    def test_causal_tiles_come_in_sections(self, launched):
        query = torch.empty(1, 32, 8192, 64, dtype=torch.float16)
        key = query[:, :8]
        full, causal = (launched(query, key, key, is_causal=c)[1][3][17] for c in (False, True))
        assert full == 1 < causal

    def test_sections_last_as_many_rounds_as_the_row_says(self, launched):
        """Of these heads 4 fit; 3 consumers want five rounds, which 8 of them make."""
        query = torch.empty(1, 32, 16384, 64, dtype=torch.float16)
        chosen, (_, _, _, scalars, _) = launched(query, query, query, is_causal=True)
        assert chosen.config.row.least_rounds == 5 and scalars[17] == 8

    def test_no_more_programs_than_processors(self, launched):
        """One stays on each, and draws its tiles: of an H20 there are 78."""
        query = torch.empty(1, 32, 8192, 64, dtype=torch.float16)
        assert launched(query, query, query)[1][1] == (132, 1)
        assert launched(query, query, query, device=H200._replace(processors=78))[1][1] == (78, 1)

    @pytest.mark.parametrize("shape", [(2, 8, 200, 500), (2, 1, 1, 500), (1, 8, 200, 500), (1, 1, 200, 1)])
    def test_a_bool_mask_has_a_map(self, launched, shape):
        query, key, value = tensors_of(num_queries=200)
        mask = torch.ones(shape, dtype=torch.bool)
        chosen, (first, second) = launched(query, key, value, mask=mask)
        batch, heads, rows, _ = shape
        tiles = -(-rows // chosen.config.block_m)
        blocks = -(-500 // chosen.config.block_n)
        assert first[0].__name__ == "flashcore_mask_map" and first[1] == (batch * heads * tiles * blocks, 1)
        lines, bits, done = first[2][1:4]
        assert done is second[2][12] and done.numel() >= batch * heads * tiles
        assert lines.numel() == batch * heads * tiles * 2 * (blocks + 1) + 1
        assert bits.numel() == batch * heads * rows * blocks * chosen.config.block_n // 32
        desc, bias, *maps = second[2][13:17]
        assert desc is None and bias is None and maps[0] is lines and maps[1] is bits
        numbers = second[3][18:]
        one = [int(size > 1) for size in shape]
        assert numbers[:3] == (heads * tiles * one[0], tiles * one[1], int(tiles > 1))
        assert numbers[3:6] == (heads * rows * one[0], rows * one[1], one[2])
        assert numbers[6:10] == (0, 0, 0, blocks)
        assert second[4][0].mask == 1

    @pytest.mark.parametrize("shape", [(2, 8, 200, 500), (1, 8, 200, 500), (2, 1, 200, 500), (1, 1, 200, 1)])
    @pytest.mark.parametrize("how", ["as it is", "odd", "expanded", "float64", "transposed"])
    def test_a_bias_comes_in_tiles(self, launched, shape, how):
        """Copied only where the copy engine could not fetch it, and without what `expand` made of it."""
        query, key, value = tensors_of(num_queries=200)
        bias = torch.randn(shape)
        given = bias
        if how == "odd":
            given = torch.cat([bias, bias], dim=3)[..., 1 : 1 + shape[3]]
            bias = given.clone()
        elif how == "expanded":
            given = bias.expand(2, 8, 200, 500)
        elif how == "float64":
            given = bias.double()
        elif how == "transposed":
            given = bias.transpose(2, 3).contiguous().transpose(2, 3)
        _, (first, second) = launched(query, key, value, mask=given)
        desc, row, *_ = second[2][13:17]
        assert row is None and second[4][0].mask == 2
        assert desc.base is first[2][0], "both launches read one tensor"
        assert (desc.base.data_ptr() == given.data_ptr()) == (how in ("as it is", "expanded") and shape[3] > 1)
        assert list(desc.shape) == [*shape[:3], 500] and list(desc.block_shape) == [1, 1, 64, 128]
        assert desc.base.data_ptr() % 16 == 0 and all(stride % 4 == 0 for stride in desc.strides[:3])
        fetched = desc.base.as_strided(desc.shape, desc.strides)
        assert torch.equal(fetched, bias.expand(*shape[:3], 500))
        assert second[3][24:27] == (int(shape[0] > 1), int(shape[1] > 1), 0)

    @pytest.mark.parametrize("num_keys, dtype", [(197, torch.bool), (577, torch.bool), (577, torch.bfloat16)])
    def test_rows_of_odd_length_are_copied_once_and_read_in_vectors(self, launched, num_keys, dtype):
        """One copy for all sequences, and a map of it, whose cost does not grow with the batch."""
        query, key, value = tensors_of(num_queries=197, num_keys=num_keys, dtype=torch.bfloat16)
        mask = torch.rand(1, 8, 197, num_keys) < 0.5 if dtype == torch.bool else torch.randn(1, 8, 197, num_keys)
        mask = mask.to(dtype)
        _, ((_, programs, arguments, scalars, constants), _) = launched(query, key, value, mask=mask)
        read, unit = arguments[0], 16 // mask.element_size()
        assert list(read.shape) == list(mask.shape) and torch.equal(read, mask.to(read.dtype))
        assert constants[-1] == unit and read.stride(2) == -(-num_keys // unit) * unit
        assert arguments[4:] == (1, 0, read.stride(1) // unit, read.stride(2) // unit)
        assert scalars[:2] == (-(-num_keys // unit), num_keys)
        assert programs == (8 * 2 * -(-num_keys // 128), 1)

    def test_a_bias_that_all_queries_share_is_one_row(self, launched):
        query, key, value = tensors_of(num_queries=200)
        bias = torch.randn(2, 1, 1, 1000, dtype=torch.float32)[..., 1::2]
        _, (_, second) = launched(query, key, value, mask=bias)
        desc, row, *_ = second[2][13:17]
        assert desc is None and row is bias and second[4][0].mask == 3
        assert second[3][24:27] == (1000, 0, 2)
