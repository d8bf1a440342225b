"""Attention on pages by the Gluon kernels: attention's answers, and the bits that it has without pages."""

import itertools

import pytest
import torch
from flashcore_kernels import attention, paged_attention, path_counts, write_pages

from ..kernels.cache.test_paged import assert_all_right, build

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no GPU of this kind"
)

# Prompts alone, behind other keys, of two and three tokens, with more queries than keys; single tokens; no queries; no
# keys. Lengths on both sides of a block and of a page.
LENGTHS = (
    (600, 600), (1, 5000), (1, 1), (0, 0), (1, -1), (37, 3000), (2, 257), (129, 129), (128, 1024), (3, 4000), (40, 20),
    (33, -1), (257, 9000), (17, 17),
)  # fmt: skip
SHAPE = {"head_dim": 128, "heads": (32, 8), "dtype": torch.bfloat16, "device": "cuda", "padding": 45}


SINGLE = ((1, 5000), (1, 1), (0, 0), (1, -1), (1, 257), (1, 9000), (0, 0), (1, 64), (1, 3001), (0, 0))


def run(batch, **arguments):
    """The batch's answer, by the kernels that are meant alone."""
    path_counts.clear()
    answer = batch.run(**arguments)
    assert dict(path_counts) == {"flashcore_hopper_paged": 1}
    return answer


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256, 1024])
@pytest.mark.parametrize("window", [None, 300])
def test_right(page_size, window):
    batch = build(LENGTHS, page_size=page_size, **SHAPE)
    output, lse = run(batch, window=window, return_lse=True)
    assert_all_right(batch, output, lse, window=window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim, value_dim", [(64, 64), (40, 24), (80, 80), (128, 64)])
@pytest.mark.parametrize("heads", [(8, 1), (7, 1), (6, 2)])
def test_shapes(dtype, head_dim, value_dim, heads):
    shape = {**SHAPE, "dtype": dtype, "head_dim": head_dim, "value_dim": value_dim, "heads": heads}
    batch = build(LENGTHS, page_size=64, cumulative=head_dim == 80, **shape)
    assert_all_right(batch, run(batch))


@pytest.mark.parametrize("arguments", [{"softcap": 20.0}, {"is_causal": False}, {"window": (100, 50)}], ids=str)
def test_features(arguments):
    arguments = {"is_causal": False, **arguments} if "window" in arguments else arguments
    batch = build(LENGTHS, page_size=256, **SHAPE)
    sinks = torch.randn(32, device="cuda")
    output, lse = run(batch, return_lse=True, sinks=sinks, **arguments)
    assert_all_right(batch, output, lse, sinks=sinks, **arguments)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("window", [None, 300])
def test_bits_are_those_without_pages(head_dim, page_size, window):
    batch = build(LENGTHS, page_size=page_size, **{**SHAPE, "head_dim": head_dim})
    output, bounds = run(batch, window=window), batch.pages.cu_seqlens_q.tolist()
    compared = 0
    for (begin, end), own in zip(itertools.pairwise(bounds), batch.own):
        if 16 < len(own[0]) <= len(own[1]):  # others are a decode's
            q, k, v = (t.transpose(0, 1)[None] for t in own)
            before = path_counts["flashcore_hopper"]
            whole = attention(q, k, v, is_causal=True, window=window)[0].transpose(0, 1)
            assert path_counts["flashcore_hopper"] == before + 1
            assert torch.equal(output[begin:end], whole), f"tokens from {begin} on"
            compared += 1
    assert compared >= 6


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("window", [None, 300])
def test_single_tokens(head_dim, page_size, window):
    """The answers and bits of the decode without pages; padding is written by sequences that have no query."""
    batch = build(SINGLE, page_size=page_size, **{**SHAPE, "head_dim": head_dim, "padding": 2})
    output, lse = run(batch, window=window, max_queries=1, return_lse=True)
    assert_all_right(batch, output, lse, window=window)
    bounds = batch.pages.cu_seqlens_q.tolist()
    for (begin, _), own in zip(itertools.pairwise(bounds), batch.own):
        if len(own[0]) and len(own[1]):
            q, k, v = (t.transpose(0, 1)[None] for t in own)
            path_counts.clear()
            whole = attention(q, k, v, is_causal=True, window=window)[0, :, 0]
            assert dict(path_counts) == {"flashcore_hopper_decode": 1}
            assert torch.equal(output[begin], whole), f"token {begin}"


@pytest.mark.parametrize("ring, window", [(256, 256), (512, 300), (200, 128)])
@pytest.mark.parametrize("page_size", [16, 64])
def test_single_tokens_in_a_ring(ring, window, page_size):
    """With the token's own key in the ring, and beside it: the same bits."""
    layout = {"page_size": page_size, "ring": ring, **SHAPE, "padding": 0}
    batch = build(SINGLE, filled=False, **layout)
    beside = run(batch, window=window, max_queries=1, new_key=batch.new_key, new_value=batch.new_value)
    assert_all_right(batch, beside, window=window)
    write_pages(batch.pages, batch.new_key, batch.new_value)
    assert torch.equal(run(batch, window=window, max_queries=1), beside)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_size", [16, 256])
def test_single_tokens_in_fp8(head_dim, page_size):
    """As with the same numbers in 16 bits."""
    layout = {"page_size": page_size, **SHAPE, "head_dim": head_dim, "padding": 0, "dtype": torch.float16}
    batch = build(SINGLE, **layout)
    scales = torch.linspace(0.02, 0.05, 8, device="cuda")
    stored = [torch.full_like(pool, 448.0).to(torch.float8_e4m3fn) for pool in batch.pages[:2]]
    pages = batch.pages._replace(key=stored[0], value=stored[1], key_scale=scales, value_scale=scales)
    for pool, of in zip(stored, batch.pages[:2]):
        pool.copy_((of.float() / scales[:, None]).to(torch.float8_e4m3fn))
    rounded = [(pool.float() * scales[:, None]).half() for pool in stored]
    want = paged_attention(batch.query, batch.pages._replace(key=rounded[0], value=rounded[1]), max_queries=1)
    got = run(batch._replace(pages=pages), max_queries=1)
    assert (got - want).abs().max() < 5e-3 and got.any()


def test_a_ring_of_prompts_and_single_tokens():
    """Prompts in a ring are the portable kernel's, single tokens beside them are not."""
    batch = build(LENGTHS, page_size=64, ring=512, filled=False, **SHAPE)
    path_counts.clear()
    output = batch.run(window=300, new_key=batch.new_key, new_value=batch.new_value)
    assert dict(path_counts) == {"flashcore_hopper_paged": 1, "flashcore_paged": 1}
    assert_all_right(batch, output, window=300)


def test_bits_are_those_of_a_sequence_alone():
    batch = build(LENGTHS, page_size=256, **SHAPE)
    output, bounds, pages = run(batch), batch.pages.cu_seqlens_q.tolist(), batch.pages
    for s, own in enumerate(batch.own):
        if len(own[0]):
            one = pages._replace(
                block_table=pages.block_table[s : s + 1], key_lengths=pages.key_lengths[s : s + 1],
                cu_seqlens_q=torch.tensor([0, len(own[0])], dtype=torch.int32, device="cuda"),
            )  # fmt: skip
            assert torch.equal(paged_attention(own[0], one), output[bounds[s] : bounds[s + 1]]), f"sequence {s}"


def test_lengths_beyond_the_table_leave_nothing_behind():
    """They show the keys that the table has; a mailbox that nobody empties would be found by the next call."""
    lengths = ((1, 512), (1, 100), (1, 512))
    batch = build(lengths, page_size=64, **SHAPE)
    first = run(batch)
    # Of the first and the last sequence all that the table has is seen in either case.
    width = batch.pages.block_table.shape[1] * 64
    beyond = batch.pages._replace(key_lengths=torch.where(batch.pages.key_lengths == 512, 513 + width, 100).int())
    for _ in range(3):
        output = run(batch._replace(pages=beyond))
        assert output.isfinite().all() and torch.equal(output[1], first[1])
        assert torch.equal(run(batch), first)


def test_many_short_sequences():
    """More of them than are added up at once, and more tiles than programs."""
    lengths = tuple((i % 5 * 7 % 29, i % 5 * 7 % 29 + i % 3 * 40) for i in range(400))
    batch = build(lengths, page_size=16, **{**SHAPE, "heads": (8, 2)})
    assert_all_right(batch, run(batch))


def test_repeats():
    """Again and again, with nothing left behind by the launch before."""
    batch = build(LENGTHS, page_size=256, **SHAPE)
    first = run(batch)
    assert all(torch.equal(batch.run(), first) for _ in range(100))


class TestControls:
    """What must show."""

    @staticmethod
    def wrong(change, **arguments) -> None:
        batch = build(LENGTHS, page_size=64, **SHAPE)
        answer = run(batch._replace(pages=batch.pages._replace(**change(batch.pages))))
        with pytest.raises(AssertionError):
            assert_all_right(batch, answer, **arguments)

    def test_pages_swapped(self):
        def swapped(pages):
            table = pages.block_table.clone()
            table[0, :2] = table[0, :2].flip(0)
            return {"block_table": table}

        self.wrong(swapped)

    def test_lengths_off_by_one(self):
        self.wrong(lambda pages: {"key_lengths": pages.key_lengths - 1})

    def test_window_ignored(self):
        self.wrong(lambda pages: {}, window=300)
