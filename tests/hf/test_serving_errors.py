"""What continuous batching refuses, and how an error reaches the caller; other names, and `disable()`."""

import pytest
import torch
import transformers

import flashcore_hf
from flashcore_hf import attention, backend, compat, pages, serving

from .models import model_pair
from .test_backend import llava_config
from .test_serving import OTHER, PROMPTS, WORKS, batched, each_alone, generation_config, small, tokens_of, works

pytestmark = pytest.mark.skipif(compat.continuous_batching() is None, reason="this Transformers does not batch so")


@works
class TestErrors:
    def test_of_the_forward_reach_the_caller(self, monkeypatch):
        _, model = model_pair("llama")

        def broken(*arguments, **keywords):
            raise ValueError("a wheel came off")

        monkeypatch.setattr(attention, "attend_pages", broken)
        with pytest.raises(RuntimeError, match="LlamaForCausalLM failed: a wheel came off") as caught:
            batched(model, PROMPTS)
        assert isinstance(caught.value.__cause__, ValueError)

    def test_a_switch_that_did_not_take_hold(self, monkeypatch):
        """As on a Transformers that makes its batch processors elsewhere."""
        _, model = model_pair("llama")
        monkeypatch.setattr(serving, "take_over", lambda manager, processor: processor)
        with pytest.raises(RuntimeError, match="continuous batching"):
            batched(model, PROMPTS)

    def test_another_shape_of_things_is_refused(self, monkeypatch):
        _, model = model_pair("llama")
        monkeypatch.setattr(serving, "why_not", lambda: "ContinuousBatchingIOs.x is not what it was")
        with pytest.raises(NotImplementedError, match=r"is not what it was.*set_attn_implementation"):
            model.generate_batch(PROMPTS, generation_config=generation_config(), **small())

    def test_a_window_that_the_pages_are_not_kept_for(self):
        where = pages.PagedCall(serving.Pages(*[torch.zeros(1)] * 5, ring=6), True)
        states = torch.zeros(1, 2, 1, 8)
        with pytest.raises(NotImplementedError, match="the last 6 keys.*attention to all of them"):
            pages.attend_pages(
                states, states, states, where, causal=True, sliding_window=None, scaling=None, softcap=None, sinks=None
            )


@pytest.mark.skipif(WORKS, reason="supported here")
class TestRefused:
    """In the caller's thread."""

    def ways_in(self, model) -> dict:
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
    def test_refused(self, way):
        _, model = model_pair("llama")
        ways = self.ways_in(model)
        if way not in ways:
            pytest.skip("this Transformers has no such way in")
        with pytest.raises(NotImplementedError, match=rf'set_attn_implementation\("{OTHER}"\)'):
            ways[way]()
        assert model.config._attn_implementation == "flashcore"

    def test_where_a_part_is_ours(self):
        model = transformers.LlavaForConditionalGeneration._from_config(
            llava_config(), attn_implementation={"text_config": "flashcore", "vision_config": "eager"}
        )
        with pytest.raises(NotImplementedError, match="continuous batching"):
            model.generate_batch(PROMPTS, generation_config=generation_config())

    @pytest.mark.skipif(not hasattr(compat.PreTrainedModel, "set_attn_implementation"), reason="no switching here")
    def test_a_manager_from_before_the_switch_does_not_start(self):
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
def test_others_answer_as_ever():
    """The whole call, on what a refusal says to switch to: the answers of `generate`."""
    eager, model = model_pair("llama", implementation=OTHER)
    answers = model.generate_batch(PROMPTS, generation_config=generation_config(), **small(32, 16, 8))
    assert sorted(tokens_of(answers.values())) == sorted(each_alone(eager, PROMPTS))


def test_disabled_it_is_transformers_business_again():
    mixin, manager = compat.continuous_batching()
    places = [(mixin, "init_continuous_batching"), (manager, "start")]
    if WORKS:
        places += [(mixin, "generate_batch"), (manager, "_create_batch_processor")]
    enabled = [vars(place)[name] for place, name in places]
    flashcore_hf.disable()
    try:
        disabled = [vars(place)[name] for place, name in places]
        assert not any("flashcore" in function.__code__.co_filename for function in disabled)
        assert all(ours.__wrapped__ is theirs for ours, theirs in zip(enabled, disabled))
        assert f"paged|{serving.NAME}" not in compat.attention_registry()
    finally:
        flashcore_hf.enable()
    assert backend._enabled
