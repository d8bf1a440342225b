"""Masks in which each query has a range of its own, beside the dense masks that sdpa would get."""

import functools
import inspect

import pytest
import torch
from flashcore_kernels.key_range import layout_of, visible
from transformers import masking_utils

from flashcore_hf import row_ranges
from flashcore_hf.masks import flashcore_mask
from flashcore_hf.range_mask import RangeMask

from .test_masks import FUNCTIONS, dense, padding, request

causal, either, both = masking_utils.causal_mask_function, masking_utils.or_masks, masking_utils.and_masks
CHUNKS_KNOW_PADDING = "left_padding" in inspect.signature(masking_utils.chunked_overlay).parameters
BLOCKWISE = hasattr(masking_utils, "blockwise_overlay")
LENGTH = 13
# Two images in the first row, one at the very end, a prefix; then blocks whose tokens lie apart.
IMAGES = torch.tensor(
    [
        [-1, 0, 0, 0, -1, -1, 1, 1, 1, 1, -1, -1, -1],
        [-1] * 9 + [0] * 4,
        [0] * 5 + [-1] * 8,
    ]
)
APART = torch.tensor([[0, 0, -1, -1, 0, 0, -1, -1, -1, -1, -1, -1, -1]] + [[-1] * 13] * 2)
# A prefix, with padding behind the text that has the prefix' number, as PaliGemma's processor makes it.
PADDED_PREFIX = torch.tensor([[0] * 4 + [-1] * 9, [0] * 4 + [-1] * 8 + [0], [0] * 4 + [-1] * 7 + [0] * 2])


def chunks(size: int, kind: str | None = None):
    if not CHUNKS_KNOW_PADDING:
        return masking_utils.chunked_causal_mask_function(size)
    mask = padding(LENGTH, kind)
    left = torch.zeros(3, dtype=torch.long) if mask is None else (mask.cumsum(-1) == 0).sum(-1)
    return masking_utils.chunked_causal_mask_function(size, left)


def blocks(numbers: torch.Tensor):
    """What makes the tokens of a block see each other, in this version."""
    if BLOCKWISE:
        return masking_utils.blockwise_overlay(numbers)
    from transformers.models.gemma3.modeling_gemma3 import token_type_ids_mask_function

    if "image_group_ids" not in inspect.signature(token_type_ids_mask_function).parameters:
        pytest.skip("this version tells images apart by a distance")
    arguments = ((numbers >= 0).long(), numbers, 256)
    return token_type_ids_mask_function(*arguments[: len(inspect.signature(token_type_ids_mask_function).parameters)])


FULL = {
    "chunks": lambda kind: chunks(4, kind),
    "images": lambda kind: either(causal, blocks(IMAGES)),
    "images, sliding": lambda kind: both(either(causal, blocks(IMAGES)), masking_utils.sliding_window_overlay(3)),
    "images beside a window": lambda kind: either(FUNCTIONS["sliding"], blocks(IMAGES)),
    "prefix": lambda kind: either(causal, blocks(PADDED_PREFIX if kind == "right" else PADDED_PREFIX[:1].repeat(3, 1))),
    "images alone": lambda kind: blocks(IMAGES),
}


@pytest.fixture(autouse=True)
def reads(monkeypatch):
    """How often the host waited for values."""
    waits = []
    hold = row_ranges._Rows.hold
    monkeypatch.setattr(row_ranges._Rows, "hold", lambda self: waits.append(1) or hold(self))
    return waits


def asked(function, shape=(LENGTH, LENGTH, 0), kind=None, model_type="", **extra) -> dict:
    num_queries, num_keys, start = shape
    mask = padding(start + num_queries, kind)
    kwargs = request(num_queries, num_keys, query_start=start, padding=mask, function=function, use_vmap=True, **extra)
    kwargs["config"].model_type = model_type or kwargs["config"].model_type
    return kwargs


@pytest.mark.parametrize("kind", [None, "left", "right", "empty row"])
@pytest.mark.parametrize("name", FULL)
def test_rows_say_what_the_dense_mask_says(name, kind, reads):
    kwargs = asked(FULL[name](kind), kind=kind)
    answer, want = flashcore_mask(**kwargs), dense(kwargs)
    assert torch.equal(visible(answer, LENGTH, LENGTH), want)
    assert layout_of(answer, 3, LENGTH, LENGTH) == "rows"
    assert len(reads) == (0 if (name, kind) == ("chunks", None) else 1)
    # The controls: neither without padding nor with causal rows would it pass.
    assert kind is None or not torch.equal(want, dense({**kwargs, "attention_mask": None}))
    assert not torch.equal(want, dense({**kwargs, "mask_function": causal}))


def test_a_window_of_nothing():
    """Qwen2-MoE asks for one where it has no window, and no layer takes it."""
    for window in (0, -1):
        answer = flashcore_mask(**asked(masking_utils.sliding_window_causal_mask_function(window)))
        assert answer.dtype == torch.int32 and not visible(answer, LENGTH, LENGTH).any()
    # The control: without the causal part it shows what comes behind the query.
    kwargs = asked(masking_utils.sliding_window_overlay(-1))
    shown = visible(flashcore_mask(**kwargs), LENGTH, LENGTH).expand(3, 1, -1, -1)
    assert shown.any() and torch.equal(shown, dense(kwargs).expand(3, 1, -1, -1))


@pytest.mark.parametrize("shape", [(4, 13, 9), (6, 13, 3), (5, 13, 0)], ids=["continued", "in between", "static cache"])
@pytest.mark.parametrize("name", FULL)
def test_queries_behind_others(name, shape):
    kwargs = asked(FULL[name](None), shape)
    answer = flashcore_mask(**kwargs)
    assert layout_of(answer, 3, *shape[:2]) == "rows"
    assert torch.equal(visible(answer, *shape[:2]), dense(kwargs))


@pytest.mark.parametrize("name", FULL)
def test_a_cache_that_dropped_old_keys(name):
    kwargs = request(3, 6, query_start=10, kv_offset=7, function=FULL[name](None), use_vmap=True)
    answer = flashcore_mask(**kwargs)
    assert answer.dtype == torch.int32 and torch.equal(visible(answer, 3, 6), dense(kwargs))


@pytest.mark.parametrize("kind", [None, "left", "right"])
@pytest.mark.parametrize("name", FULL)
def test_models_that_may_read_their_mask(name, kind):
    kwargs = asked(FULL[name](kind), kind=kind, model_type="a model that may read its mask")
    answer = flashcore_mask(**kwargs)
    assert type(answer) is RangeMask and layout_of(answer.key_range, 3, LENGTH, LENGTH) == "rows"
    assert torch.equal(answer[:], dense(kwargs))


def no_range(name: str) -> dict:
    if name == "blocks apart":
        return asked(either(causal, blocks(APART)))
    if name == "padding behind a prefix, not masked":
        return asked(either(causal, blocks(PADDED_PREFIX)))
    if name == "numbers beyond the keys":
        return asked(either(causal, blocks(IMAGES.where(IMAGES < 0, IMAGES + 1000))))
    if name == "holes in padding":
        return asked(chunks(4, "holes"), kind="holes")
    return asked(either(causal, lambda b, h, q, k: k % 2 == 1))


@pytest.mark.parametrize(
    "name",
    [
        "blocks apart", "numbers beyond the keys", "holes in padding", "padding behind a prefix, not masked",
        "a user's own",
    ],
)  # fmt: skip
def test_what_is_no_range_is_dense(name):
    kwargs = no_range(name)
    answer = flashcore_mask(**kwargs)
    assert type(answer) is torch.Tensor and answer.dtype == torch.bool
    assert torch.equal(answer.expand(3, -1, -1, -1), dense(kwargs))


@pytest.mark.parametrize("kind", [None, "left", "holes"])
@pytest.mark.parametrize("name", [*FULL, "a user's own"])
def test_one_query_gets_a_set_of_keys(name, kind, reads):
    """Any mask of one query is one: holes and functions of a user's own included, and nobody waits."""
    own = lambda kind: either(masking_utils.sliding_window_overlay(2), lambda b, h, q, k: k % 3 == 1)  # noqa: E731
    kwargs = asked({**FULL, "a user's own": own}[name](kind), (1, LENGTH, LENGTH - 1), kind)
    answer = flashcore_mask(**kwargs)
    assert layout_of(answer, 3, 1, LENGTH) == "sequence" and not reads
    assert torch.equal(visible(answer, 1, LENGTH), dense(kwargs))


@pytest.mark.parametrize("seed", range(40))
def test_random_blocks_and_padding(seed):
    """A range or a dense mask, the values are sdpa's."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randint, generator=generator)
    numbers = draw(-1, 2, (3, LENGTH)).sort(dim=-1, descending=bool(seed % 2)).values
    if seed % 3 == 0:
        numbers = numbers.roll(int(draw(0, LENGTH, ())), 1)
    function = [either(causal, blocks(numbers)), both(either(causal, blocks(numbers)), chunks(5))][seed % 4 // 2]
    kwargs = asked(function)
    kwargs["attention_mask"] = draw(0, 6, (3, LENGTH)) > 0 if seed % 5 else None
    answer = flashcore_mask(**kwargs)
    got = visible(answer, LENGTH, LENGTH) if answer.dtype == torch.int32 else answer.expand(3, -1, -1, -1)
    assert torch.equal(got, dense(kwargs))


def test_the_embedders_of_gemma3():
    from transformers.models.gemma3 import modeling_gemma3

    overlay = getattr(modeling_gemma3, "_bidirectional_window_overlay", None)
    if overlay is None:
        pytest.skip("this version has none")
    kwargs = asked(either(FUNCTIONS["sliding"], overlay(6)), kind="holes")
    answer = flashcore_mask(**kwargs)
    assert layout_of(answer, 3, LENGTH, LENGTH) == "sequence"
    assert torch.equal(visible(answer, LENGTH, LENGTH), dense(kwargs))
