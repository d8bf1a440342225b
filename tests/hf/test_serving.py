"""Continuous batching: until flashcore reads pages, the call itself says no.

Transformers runs the model in a thread of its own there: an error in attention reached a log, and the caller got
empty answers.
"""

import pytest
import torch
import transformers
from transformers import GenerationConfig

import flashcore_hf
from flashcore_hf import backend, compat

from .models import model_pair
from .test_backend import llava_config

pytestmark = pytest.mark.skipif(compat.continuous_batching() is None, reason="this Transformers does not batch so")
# What the message tells to call.
OTHER = "sdpa_paged" if compat.HAS_INTERFACE and "sdpa_paged" in compat.attention_registry() else "sdpa"
PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]


def generation_config() -> GenerationConfig:
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0, bos_token_id=1)
    config.num_blocks, config.max_batch_tokens, config.block_size = 8, 16, 32
    return config


def small() -> dict:
    """Keywords that keep the pages few: by default they take most of the memory."""
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        return {}
    config = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16, block_size=32)
    return {"continuous_batching_config": config}


def ways_in(model) -> dict:
    def manager():
        with model.continuous_batching_context_manager(generation_config=generation_config()):
            pass

    ways = {
        "generate_batch": lambda: model.generate_batch(PROMPTS, generation_config=generation_config()),
        "init_continuous_batching": lambda: model.init_continuous_batching(generation_config=generation_config()),
    }
    if hasattr(model, "continuous_batching_context_manager"):
        ways["context manager"] = manager
    return ways


@pytest.mark.parametrize("way", ["generate_batch", "init_continuous_batching", "context manager"])
def test_refused_in_the_callers_thread(way):
    _, model = model_pair("llama")
    ways = ways_in(model)
    if way not in ways:
        pytest.skip("this Transformers has no such way in")
    with pytest.raises(NotImplementedError, match=rf'set_attn_implementation\("{OTHER}"\)'):
        ways[way]()
    assert model.config._attn_implementation == "flashcore"


def test_refused_where_a_part_is_ours():
    model = transformers.LlavaForConditionalGeneration._from_config(
        llava_config(), attn_implementation={"text_config": "flashcore", "vision_config": "eager"}
    )
    with pytest.raises(NotImplementedError, match="continuous batching"):
        model.generate_batch(PROMPTS, generation_config=generation_config())


@pytest.mark.skipif(not hasattr(compat.PreTrainedModel, "set_attn_implementation"), reason="no switching here")
def test_a_manager_from_before_the_switch_does_not_start():
    _, model = model_pair("llama", implementation="sdpa")
    manager = model.init_continuous_batching(generation_config=generation_config())
    model.set_attn_implementation("flashcore")
    with pytest.raises(NotImplementedError, match="continuous batching"):
        manager.start()


def test_others_pass():
    """The control, as far as a machine without a GPU goes: other models reach what stood there before."""
    _, model = model_pair("llama", implementation="sdpa")
    assert isinstance(
        model.init_continuous_batching(generation_config=generation_config()), compat.continuous_batching()[1]
    )


@pytest.mark.skipif(
    (4, 54) < compat.VERSION < (5, 4) and not torch.cuda.is_available(), reason="it wants to know a GPU's memory there"
)
def test_what_the_message_says_works():
    """The whole call, on what it says to switch to: the answers of `generate`."""
    eager, model = model_pair("llama", implementation=OTHER)
    answers = model.generate_batch(PROMPTS, generation_config=generation_config(), **small())
    got = [answer.generated_tokens for answer in answers.values()]
    want = [eager.generate(torch.tensor([p]), max_new_tokens=4, do_sample=False)[0, len(p) :].tolist() for p in PROMPTS]
    assert sorted(got) == sorted(want)


def test_disabled_it_is_transformers_business_again():
    mixin, manager = compat.continuous_batching()
    enabled = vars(mixin)["init_continuous_batching"], vars(manager)["start"]
    flashcore_hf.disable()
    try:
        disabled = vars(mixin)["init_continuous_batching"], vars(manager)["start"]
        assert not any("flashcore" in function.__code__.co_filename for function in disabled)
        assert enabled[0].__wrapped__ is disabled[0] and enabled[1].__wrapped__ is disabled[1]
    finally:
        flashcore_hf.enable()
    assert backend._enabled
