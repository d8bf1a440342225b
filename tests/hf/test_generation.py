"""Caches, ways of decoding, masks of the user's own: tokens equal to eager's."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, StaticCache

from .compare import TOLERANCE, cache_of, greedy, logit_error, named
from .models import VOCABULARY, model_pair, prompts

VERSION = Version(transformers.__version__)
MODELS = ("llama", "mistral", "gemma2")


@pytest.fixture(scope="module", params=MODELS)
def pair(request):
    return model_pair(request.param)


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "no cache"])
def test_greedy(pair, cache, padding, paths):
    """The prompt is longer than the window of the sliding models already."""
    options = {"static": {"cache_implementation": "static"}, "no cache": {"use_cache": False}}.get(cache, {})
    tokens = 5 if cache == "no cache" else 12
    ids, mask = prompts(2, 9, padding)
    eager, model = pair
    assert torch.equal(greedy(model, ids, mask, tokens, **options), greedy(eager, ids, mask, tokens, **options))
    assert paths["torch"] == 0 and paths.total() > 0


def test_64_tokens_and_batch_1(paths):
    eager, model = model_pair("llama")
    ids, mask = prompts(1, 5)
    assert torch.equal(greedy(model, ids, mask, 64), greedy(eager, ids, mask, 64))


def test_static_cache_object_larger_than_needed(pair):
    """A cache made by hand: 64 slots for 9 tokens, and NaN in the slots that are not filled."""
    eager, model = pair
    ids, mask = prompts(2, 9, "left")
    answers = []
    for each in (eager, model):
        cache = StaticCache(config=each.config, max_batch_size=2, max_cache_len=64)
        answers.append(greedy(each, ids, mask, 10, **named(cache)))
    assert torch.equal(*answers)


def test_nan_in_unfilled_slots_reaches_nothing():
    _, model = model_pair("llama")
    ids, mask = prompts(2, 9)
    cache = StaticCache(config=model.config, max_batch_size=2, max_cache_len=64)
    with torch.no_grad():
        first = model(ids, attention_mask=mask, **named(cache), use_cache=True).logits
        layers = getattr(cache, "layers", None)
        buffers = (
            [t for layer in layers for t in (layer.keys, layer.values)]
            if layers
            else cache.key_cache + cache.value_cache
        )
        for buffer in buffers:
            assert (buffer[:, :, 9:] == 0).all()
            buffer[:, :, 9:] = torch.nan
        position = torch.tensor([9])
        step = model(
            ids[:, :1], attention_mask=torch.ones(2, 10, dtype=torch.long), **named(cache), use_cache=True,
            cache_position=position,
        ).logits  # fmt: skip
    assert not first.isnan().any() and not step.isnan().any()


def test_beam_search(pair):
    eager, model = pair
    ids, mask = prompts(2, 9, "left")
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(greedy(model, ids, mask, 10, **options), greedy(eager, ids, mask, 10, **options))


def test_prompt_lookup():
    for model_type in ("llama", "mistral"):
        eager, model = model_pair(model_type)
        ids = torch.arange(3, 9).repeat(3)[None]
        # Version 4.53 needs a token to stop at.
        options = {"prompt_lookup_num_tokens": 4, "eos_token_id": VOCABULARY - 1}
        mask = torch.ones_like(ids)
        if model_type == "mistral" and VERSION.release[:2] == (5, 0):
            # Its own sliding layers take no candidates back there, whatever computes attention.
            with pytest.raises(ValueError, match="Cannot `crop`"):
                greedy(eager, ids, mask, 20, **options)
            continue
        assert torch.equal(greedy(model, ids, mask, 20, **options), greedy(eager, ids, mask, 20, **options))


@pytest.mark.skipif(VERSION < Version("4.57"), reason="sampling of candidates needs the newer candidate generator")
def test_assistant_model():
    eager, model = model_pair("llama")
    helper_eager, helper = model_pair("llama", seed=1)
    ids, mask = prompts(1, 9)
    expected = greedy(eager, ids, mask, 16, assistant_model=helper_eager)
    assert torch.equal(greedy(model, ids, mask, 16, assistant_model=helper), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Transformers offloads on a side stream of an accelerator")
def test_offloaded_cache():
    eager, model = (each.cuda() for each in model_pair("llama"))
    ids, mask = (t.cuda() for t in prompts(2, 9, "left"))
    options = {"cache_implementation": "offloaded"}
    assert torch.equal(greedy(model, ids, mask, 10, **options), greedy(eager, ids, mask, 10, **options))


@pytest.mark.parametrize("chunks", [(13,), (5, 8), (1, 1, 11), (12, 1)], ids=str)
def test_chunked_prefill(pair, chunks):
    """The prompt in pieces: fewer queries than keys, across the window's edge."""
    eager, model = pair
    ids, mask = prompts(3, 13, "left")
    with torch.no_grad():
        expected = eager(ids, attention_mask=mask).logits
        cache, start, got = DynamicCache(), 0, []
        for size in chunks:
            part = slice(start, start + size)
            start += size
            out = model(ids[:, part], attention_mask=mask[:, :start], **named(cache), use_cache=True)
            cache = cache_of(out)
            got.append(out.logits)
    error = ((torch.cat(got, dim=1) - expected).abs() * mask[..., None]).max() / expected.abs().max()
    assert error < TOLERANCE


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_users_own_4d_mask(kind):
    """A prefix that everybody sees both ways, and causal after it."""
    eager, model = model_pair("llama")
    ids, _ = prompts(2, 11)
    seen = torch.ones(11, 11, dtype=torch.bool).tril()
    seen[:, :4] = True
    seen = seen.expand(2, 1, 11, 11)
    additive = torch.zeros(2, 1, 11, 11).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        # eager adds whatever it gets, so it needs the additive form.
        expected = eager(ids, attention_mask=additive).logits
        got = model(ids, attention_mask=seen if kind == "bool" else additive).logits
        causal = model(ids).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, causal, atol=1e-2)


def test_int32_mask_of_a_user_is_refused():
    _, model = model_pair("llama")
    ids, _ = prompts(2, 11)
    with pytest.raises(ValueError, match="int32 mask is taken for a KeyRange"):
        model(ids, attention_mask=torch.ones(2, 1, 11, 11, dtype=torch.int32))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2"])
def test_packed_rows_do_not_see_each_other(model_type, paths):
    """Three texts in one row by position_ids: each gives the logits that it gives alone."""
    eager, model = model_pair(model_type)
    lengths = (5, 9, 3)
    texts = [prompts(1, length, seed=length)[0] for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = model(torch.cat(texts, dim=1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([eager(text, use_cache=False).logits for text in texts], dim=1)
        mixed = model(torch.cat(texts, dim=1), use_cache=False).logits
    assert paths["torch"] == 0
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mixed, alone, atol=1e-2)


def test_logits_at_every_step(pair):
    """Not only the tokens: what generate saw before it chose them."""
    eager, model = pair
    ids, mask = prompts(2, 9, "left")
    options = {"output_logits": True, "return_dict_in_generate": True}
    expected = torch.stack(greedy(eager, ids, mask, 8, **options).logits)
    got = torch.stack(greedy(model, ids, mask, 8, **options).logits)
    assert (got - expected).abs().max() / expected.abs().max() < TOLERANCE
    assert logit_error(eager, model, ids, mask) < TOLERANCE
