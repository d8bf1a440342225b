"""The KeyRange's layout: what it says, that it aliases nothing, and what its shape is taken for."""

import pytest
import torch
from flashcore_kernels import attention, key_range, step_key_range
from flashcore_kernels.device import Device
from flashcore_kernels.key_range import (
    FIRST,
    HEADER_WORDS,
    HOLES,
    layout_of,
    make_key_range,
    make_row_ranges,
    rows_shape,
    rows_width,
    sequence_shape,
    sequence_width,
    visible,
)
from flashcore_kernels.portable import blocks
from flashcore_kernels.step_key_range import make_step_key_range


def test_kernels_read_the_words_that_the_host_writes():
    for name in ("FIRST", "END", "QUERY_START", "LEFT", "RIGHT", "HOLES"):
        assert getattr(blocks, name).value == getattr(key_range, name), name
    assert blocks.BITMAP.value == HEADER_WORDS
    assert blocks.FAR.value == key_range.FARTHEST


@pytest.mark.parametrize("num_queries", [1, 2, 7, 64])
def test_shape_is_never_that_of_a_mask(num_queries):
    """No KeyRange broadcasts to `[B, H, Q, K]`, so an int32 mask of a user's own is told from one."""
    for num_keys in range(1, 300):
        for width in (sequence_width(num_keys), rows_width(num_keys)):
            assert width not in (1, num_keys)


def test_layouts_are_told_apart():
    for num_keys in range(1, 300):
        for num_queries in (1, 2, 5):
            ranges = make_key_range(2, num_keys)
            rows = make_row_ranges(*torch.zeros(2, 2, num_queries, dtype=torch.int32), num_keys)
            assert layout_of(ranges, 2, num_queries, num_keys) == "sequence"
            assert layout_of(rows, 2, num_queries, num_keys) == "rows"


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 1, 5, 40, dtype=torch.int32),  # an int mask
        torch.zeros(2, 1, 1, 40, dtype=torch.int32),
        make_key_range(3, 40),  # of another batch
        make_key_range(2, 40)[:, :, :1],
        make_key_range(2, 40)[:, 0],
    ],
    ids=lambda tensor: "x".join(map(str, tensor.shape)),
)
def test_another_shape_is_refused(wrong):
    with pytest.raises(ValueError, match="taken for a KeyRange.*got"):
        layout_of(wrong, 2, 5, 40)


class TestNumberOfKeys:
    """A cache that evicts tokens may keep more of them in one layer than in another, and a mask is made once for all.

    A KeyRange of 13 keys was taken for one of 25: the width was all that was looked at, and the last 12 were lost.
    """

    def test_the_width_alone_does_not_tell(self):
        assert sequence_width(13) == sequence_width(25) and rows_width(13) == rows_width(25)

    def test_each_number_has_a_shape_of_its_own(self):
        """7 and 2 are the numbers of keys for which a line has a word of slack."""
        for most in (40, 20000):
            assert len({sequence_shape(3, num_keys) for num_keys in range(1, most)}) == most - 1
            assert len({rows_shape(3, 9, num_keys) for num_keys in range(1, most)}) == most - 1

    @pytest.mark.parametrize("num_queries", [1, 2, 5, 33])
    def test_another_number_is_refused(self, num_queries):
        first = torch.zeros(2, num_queries, dtype=torch.int32)
        for made_for in range(1, 70):
            ranges = make_key_range(2, made_for), make_row_ranges(first, first, made_for)
            for num_keys in range(1, 70):
                for layout, answer in zip(("sequence", "rows"), ranges):
                    if num_keys == made_for:
                        assert layout_of(answer, 2, num_queries, num_keys) == layout
                        continue
                    with pytest.raises(ValueError, match=f"made for {made_for} keys") as refusal:
                        layout_of(answer, 2, num_queries, num_keys)
                    assert str(num_keys) in str(refusal.value)

    def test_other_queries_are_refused(self):
        rows = make_row_ranges(*torch.zeros(2, 2, 4, dtype=torch.int32), 40)
        with pytest.raises(ValueError):
            layout_of(rows, 2, 5, 40)

    @pytest.mark.parametrize(
        "copied",
        [
            torch.Tensor.clone, torch.Tensor.contiguous, torch.clone, lambda t: t.to("meta"), lambda t: t[:2][:],
            lambda t: torch.cat([t[:1], t[1:]]), lambda t: t.repeat_interleave(1, 0), torch.empty_like,
            torch.compile(lambda t: t + 0, backend="aot_eager"),
        ],
    )  # fmt: skip
    def test_no_copy_loses_it(self, copied):
        for num_keys in (1, 2, 7, 32, 39, 40):
            ranges = make_key_range(2, num_keys)
            rows = make_row_ranges(*torch.zeros(2, 2, 5, dtype=torch.int32), num_keys)
            assert layout_of(copied(ranges), 2, 5, num_keys) == "sequence"
            assert layout_of(copied(rows), 2, 5, num_keys) == "rows"

    @pytest.mark.parametrize("num_queries", [1, 40])
    def test_kernels_read_a_copy_with_lines_of_its_own(self, device, num_queries):
        """The lines of the third dimension are one in memory, until somebody makes them several."""
        generator = torch.Generator(device=device).manual_seed(0)
        query, key, value = (
            torch.randn(2, heads, length, 32, generator=generator, device=device)
            for heads, length in ((4, num_queries), (2, 40), (2, 40))
        )
        ranges = make_key_range(2, 40, first=torch.tensor([3, 9], device=device), query_start=40 - num_queries, right=0)
        assert ranges.stride(2) == 0 and ranges.contiguous().stride(2) != 0
        want = attention(query, key, value, key_range=ranges)
        assert torch.equal(attention(query, key, value, key_range=ranges.contiguous()), want)
        assert not torch.equal(attention(query, key, value, key_range=ranges.flip(0)), want)

    def test_a_growing_cache_compiles_twice(self):
        """Once for a length and once for all: a dimension of size 1 at every 32nd length would be compiled anew."""
        compiled = []

        def backend(graph, inputs):
            compiled.append(graph)
            return graph.forward

        @torch.compile(backend=backend, fullgraph=True)
        def step(key_mask):
            ranges = make_key_range(2, key_mask.shape[1], key_mask=key_mask, right=0)
            assert layout_of(ranges, 2, 1, key_mask.shape[1]) == "sequence"
            return ranges

        for num_keys in range(40, 140):
            key_mask = torch.ones(2, num_keys, dtype=torch.bool)
            assert layout_of(step(key_mask), 2, 1, num_keys) == "sequence"
        assert len(compiled) == 2


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="must be int32, got torch.int64"):
        layout_of(make_key_range(2, 40).long(), 2, 5, 40)


def test_defaults_see_everything():
    assert visible(make_key_range(2, 40), 5, 40).all()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_words(as_tensor):
    first, end, start = [3, 0], [30, 17], [25, 12]
    if as_tensor:
        first, end, start = map(torch.tensor, (first, end, start))
        seen = visible(make_key_range(2, 40, first=first, end=end, query_start=start, left=4, right=0), 5, 40)
    else:
        lines = zip(first, end, start)
        seen = torch.cat(
            [visible(make_key_range(1, 40, first=f, end=e, query_start=s, left=4, right=0), 5, 40) for f, e, s in lines]
        )
        first, end, start = map(torch.tensor, (first, end, start))
    for b in range(2):
        for q in range(5):
            at = start[b].item() + q
            want = [first[b] <= k < end[b] and at - 4 <= k <= at for k in range(40)]
            assert seen[b, 0, q].tolist() == want


@pytest.mark.parametrize("num_keys", [1, 5, 31, 32, 33, 64, 129])
def test_bitmap(num_keys):
    generator = torch.Generator().manual_seed(num_keys)
    key_mask = torch.rand(8, num_keys, generator=generator) < 0.5
    ranges = make_key_range(8, num_keys, key_mask=key_mask)
    assert torch.equal(visible(ranges, 1, num_keys)[:, 0, 0], key_mask)
    # Bit 31 is a word's sign.
    assert torch.equal(visible(make_key_range(8, num_keys, key_mask=torch.ones_like(key_mask)), 1, num_keys)[:, 0, 0],
                       torch.ones_like(key_mask))  # fmt: skip


@pytest.mark.parametrize(
    "mask, holes",
    [([1, 1, 1, 1], 0), ([0, 0, 1, 1], 0), ([1, 1, 0, 0], 0), ([0, 1, 1, 0], 0), ([0, 0, 0, 0], 0), ([1, 0, 1, 1], 1)],
    ids=str,
)
def test_holes_flag(mask, holes):
    """The bitmap is read only where there really are holes."""
    ranges = make_key_range(1, 4, key_mask=torch.tensor([mask], dtype=torch.bool))
    assert ranges[0, 0, 0, HOLES] == holes
    assert visible(ranges, 1, 4)[0, 0, 0].int().tolist() == mask


class TestKernel:
    """The launch that makes a KeyRange from a mask on a GPU, beside the operators that make it elsewhere."""

    @pytest.fixture
    def both(self, device):
        kernel = pytest.importorskip("flashcore_kernels.portable.key_range_kernel")

        def both(key_mask, query_start=0, left=-1, right=-1):
            batch_size, num_keys = key_mask.shape
            want = make_key_range(
                batch_size, num_keys, query_start=query_start, left=left, right=right, key_mask=key_mask
            )
            words = torch.full((batch_size, sequence_width(num_keys)), 77, dtype=torch.int32, device=device)
            if isinstance(query_start, torch.Tensor):
                query_start = query_start.to(device)
            kernel.run_key_range(words, key_mask.to(device), query_start, left, right, HEADER_WORDS)
            return words.cpu(), want[:, 0, 0]

        return both

    @pytest.mark.parametrize("num_keys", [1, 6, 7, 31, 32, 33, 129, 4095, 4096, 9001])
    def test_every_word(self, both, num_keys):
        """7 keys: a line has a word of slack. 4096: one block of the kernel."""
        generator = torch.Generator().manual_seed(num_keys)
        mask = torch.rand(6, num_keys, generator=generator) < torch.tensor([0.5, 1.1, -1.0, 0.99, 0.01, 0.5])[:, None]
        mask[5] = torch.arange(num_keys) >= num_keys // 3
        words, want = both(mask, query_start=num_keys - 1, right=0)
        assert torch.equal(words, want)
        mask[0, num_keys // 2] ^= True
        assert not torch.equal(words, both(mask, query_start=num_keys - 1, right=0)[0]), "each key counts"

    @pytest.mark.parametrize("query_start", [5, torch.tensor(5), torch.tensor([6]), torch.tensor([1, 2, 40])], ids=str)
    def test_where_queries_stand(self, both, query_start):
        mask = torch.rand(3, 100, generator=torch.Generator().manual_seed(1)) < 0.7
        words, want = both(mask, query_start, left=9, right=0)
        assert torch.equal(words, want)

    def test_any_strides(self, both):
        mask = torch.rand(200, 3, generator=torch.Generator().manual_seed(1)) < 0.7
        words, want = both(mask.T[:, 1::2])
        assert torch.equal(words, want)

    def test_steps_on_a_gpu_take_it(self, monkeypatch):
        """And whatever it cannot say, or a compiler fuses, takes the operators."""
        kernel = pytest.importorskip("flashcore_kernels.portable.key_range_kernel")
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
        monkeypatch.setattr(step_key_range, "device_of", lambda device: Device("cuda", 90))
        launched = []
        monkeypatch.setattr(kernel, "launch", lambda *args: launched.append(args))
        mask = torch.ones(2, 40, dtype=torch.bool)
        ranges = make_step_key_range(2, 40, key_mask=mask, query_start=39, right=0)
        assert len(launched) == 1 and layout_of(ranges, 2, 1, 40) == "sequence"
        with pytest.raises(ValueError, match="key_mask must be"):
            make_step_key_range(2, 41, key_mask=mask)
        make_step_key_range(2, 40, right=0)
        make_key_range(2, 40, key_mask=mask)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        make_step_key_range(2, 40, key_mask=mask)
        assert len(launched) == 1


def test_key_mask_narrows_first_and_end():
    key_mask = torch.ones(1, 40, dtype=torch.bool)
    key_mask[:, 10] = False
    seen = visible(make_key_range(1, 40, first=5, end=20, key_mask=key_mask), 1, 40)[0, 0, 0]
    assert seen.nonzero().flatten().tolist() == [k for k in range(5, 20) if k != 10]


def test_aliases_nothing():
    """Changing an argument afterwards, as a cache does with its lengths, changes no KeyRange."""
    first, end = torch.tensor([1, 2]), torch.tensor([30, 40])
    key_mask = torch.ones(2, 40, dtype=torch.bool)
    ranges = make_key_range(2, 40, first=first, end=end, key_mask=key_mask)
    rows = make_row_ranges(first[:, None], end[:, None], 40)
    before = ranges.clone(), rows.clone()
    first += 5
    end += 5
    key_mask.zero_()
    assert torch.equal(ranges, before[0]) and torch.equal(rows, before[1])


def test_rows():
    first, end = torch.tensor([[0, 3, 5]]), torch.tensor([[2, 3, 9]])
    seen = visible(make_row_ranges(first, end, 9), 3, 9)[0, 0]
    assert seen.int().tolist() == [[1, 1] + [0] * 7, [0] * 9, [0] * 5 + [1] * 4]


def test_bad_arguments():
    with pytest.raises(ValueError, match="left and right.*left=-2"):
        make_key_range(1, 4, left=-2)
    with pytest.raises(ValueError, match=r"key_mask must be \[B, K\] = \[1, 4\], got \[1, 5\]"):
        make_key_range(1, 4, key_mask=torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"both be \[B, Q\]"):
        make_row_ranges(torch.zeros(1, 2), torch.zeros(1, 3), 4)


def test_built_where_its_tensors_are(device):
    assert make_key_range(1, 4).device.type == "cpu"
    assert make_key_range(1, 4, first=torch.zeros(1, device=device, dtype=torch.int32)).device.type == device.type
    assert make_key_range(1, 4, device=device)[..., FIRST].device.type == device.type
