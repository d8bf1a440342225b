"""Prompts on pages by the Gluon kernel: attention's answers, and the bits that the prefill has without pages."""

import itertools

import pytest
import torch
from flashcore_kernels import attention, paged_attention, path_counts

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


def run(batch, **arguments):
    """The batch's answer, by the kernel that is meant."""
    before = path_counts["flashcore_hopper_paged"]
    answer = batch.run(**arguments)
    assert path_counts["flashcore_hopper_paged"] == before + 1
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
