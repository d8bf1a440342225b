"""Layers whose `is_causal` somebody set to False (llm2vec does): flashcore does then what `sdpa` does.

`sdpa` is given no mask where nothing is padded, and asks the layer; so such a model is bidirectional there. Where
something is padded its mask is causal and counts. Ours was causal always, as `eager` is.
"""

import importlib
import inspect

import pytest
import torch
from transformers import AutoConfig

from flashcore_hf import compat

from .models import model_pair, prompts, tiny_config

pytestmark = pytest.mark.usefixtures("through_torch")


def triple(model_type="llama", **changes):
    """(eager, sdpa, flashcore) with the same weights and no layer causal."""
    eager, model = model_pair(model_type, **changes)
    _, other = model_pair(model_type, implementation="sdpa", **changes)
    for each in (eager, model, other):
        for module in each.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = False
    return eager, other, model


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("mask", ["none", "ones", "left", "right"])
def test_like_sdpa(model_type, mask):
    eager, other, model = triple(model_type)
    # Mistral's window is 6 tokens here: within it sdpa leaves the mask out, beyond it does not.
    for length in (5, 11):
        ids, padding = prompts(3, length, mask if mask in ("left", "right") else None)
        arguments = {} if mask == "none" else {"attention_mask": padding}
        counts = padding.bool()
        with torch.no_grad():
            got, want = model(ids, **arguments).logits[counts], other(ids, **arguments).logits[counts]
            causal = eager(ids, **arguments).logits[counts]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        if mask in ("none", "ones") and (model_type != "mistral" or length == 5):
            # The control: this is not what a causal model says.
            assert (want - causal).abs().max() > 0.1
        else:
            torch.testing.assert_close(got, causal, atol=1e-4, rtol=1e-4)


def test_causal_layers_stay_causal():
    eager, model = model_pair("llama")
    ids, mask = prompts(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, attention_mask=mask).logits, eager(ids, attention_mask=mask).logits, atol=1e-4, rtol=1e-4
        )


SMALL = {"vocab_size": 97, "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96}


def decoder_alone(model_type: str, implementation: str):
    config = AutoConfig.for_model(model_type, **SMALL, max_position_embeddings=64, num_experts=2)
    folder = model_type.replace("-", "_")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    decoder = {"bigbird_pegasus": "BigBirdPegasusDecoder", "nllb-moe": "NllbMoeDecoder", "pegasus_x": "PegasusXDecoder"}
    torch.manual_seed(0)
    return getattr(module, decoder[model_type])._from_config(config, attn_implementation=implementation).eval()


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["bigbird_pegasus", "nllb-moe", "pegasus_x"])
def test_decoders_that_say_they_are_not_causal(model_type):
    """They say so in every Transformers and are; `sdpa` cannot be had for them."""
    try:
        model = decoder_alone(model_type, "flashcore")
    except ValueError as error:
        assert "does not use Transformers' attention interface" in str(error)
        pytest.skip("attention of its own in this Transformers")
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    want, got = decoder_alone(model_type, "eager")(ids)[0], model(ids)[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    # The control: a causal model's first tokens do not see the last, which does change.
    changed = ids.clone()
    changed[:, -1] = 5
    assert (model(changed)[0] - got)[:, :-1].abs().max() < 1e-5
    assert (model(changed)[0] - got)[:, -1].abs().max() > 1e-2


def test_a_models_own_mask_counts():
    """A 4-D mask that the user made is never left out."""
    eager, _, model = triple()
    ids, _ = prompts(2, 9)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(2, 1, 9, 9)
    additive = torch.zeros(2, 1, 9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)
    with torch.no_grad():
        got, want = model(ids, attention_mask=additive).logits, eager(ids, attention_mask=additive).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_output_attentions_shows_it():
    _, _, model = triple()
    ids, mask = prompts(1, 6)
    with torch.no_grad():
        weights = model(ids, attention_mask=mask, output_attentions=True).attentions[0]
    assert (weights > 0).all()


def test_decoding_goes_on_after_it():
    """One token sees all tokens, causal or not."""
    _, other, model = triple()
    ids, mask = prompts(2, 9)
    arguments = dict(attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **arguments), other.generate(ids, **arguments))


def test_a_prompt_in_a_static_cache_sees_its_tokens_alone():
    """Slots that no token fills yet are seen by nobody."""
    _, _, model = triple()
    ids, mask = prompts(2, 9)
    from transformers import StaticCache

    if "max_batch_size" in inspect.signature(StaticCache.__init__).parameters:
        pytest.skip("made in another way here")
    cache = StaticCache(config=tiny_config("llama"), max_cache_len=32)
    name = "cache" if compat.VERSION >= (5, 24) else "past_key_values"
    with torch.no_grad():
        got = model(ids, attention_mask=mask, use_cache=True, **{name: cache}).logits
        bidirectional = model(ids, attention_mask=mask).logits
        for module in model.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = True
        causal = model(ids, attention_mask=mask).logits
    # Where this Transformers' sdpa gets a mask here, it is causal.
    assert min((got - each).abs().max() for each in (bidirectional, causal)) < 1e-4
    assert (bidirectional - causal).abs().max() > 0.1
