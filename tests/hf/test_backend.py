"""Registering, restoring, and which models are let in."""

import copy
import functools
import types
from unittest import mock

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import flashcore_hf
from flashcore_hf import backend, compat, models, serving

from .models import model_pair, prompts, tiny_config

TINY_BLOOM = {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50}
HAS_SET = hasattr(PreTrainedModel, "set_attn_implementation")


def snapshot() -> tuple:
    """Everything that enable() may touch."""
    attributes = ("_check_and_adjust_attn_implementation", "set_attn_implementation", "_autoset_attn_implementation")
    return (
        dict(compat.attention_registry()),
        dict(compat.mask_registry()),
        {name: vars(PreTrainedModel).get(name) for name in attributes}
        | {"chunked masks": getattr(compat.masking_utils, "is_flash_attention_requested", None)},
    )


def test_import_enabled_the_backend():
    assert flashcore_hf.import_error is None
    assert set(backend.status().values()) <= {"registered", "patched"}
    assert backend.NAME in compat.attention_registry() and backend.NAME in compat.mask_registry()


def test_enable_and_disable_are_idempotent_and_exact():
    enabled = snapshot()
    flashcore_hf.enable()
    assert snapshot() == enabled
    flashcore_hf.disable()
    disabled = snapshot()
    try:
        assert disabled != enabled
        assert backend.NAME not in compat.attention_registry() and backend.NAME not in compat.mask_registry()
        assert not any("flashcore" in str(getattr(function, "__code__", "")) for function in disabled[2].values())
        flashcore_hf.disable()
        assert snapshot() == disabled
        for _ in range(100):
            flashcore_hf.enable()
            flashcore_hf.disable()
        assert snapshot() == disabled
    finally:
        flashcore_hf.enable()
    assert snapshot()[0] == enabled[0] and snapshot()[1] == enabled[1]


def test_disable_restores_an_entry_of_somebody_else():
    flashcore_hf.disable()
    mine = object()
    compat.attention_registry()[backend.NAME] = mine
    try:
        flashcore_hf.enable()
        assert compat.attention_registry()[backend.NAME] is not mine
        flashcore_hf.disable()
        assert compat.attention_registry()[backend.NAME] is mine
    finally:
        compat.attention_registry().pop(backend.NAME)
        flashcore_hf.enable()


# What another package might replace after us, or before.
PLACES = [
    (place, name)
    for place, name in (
        (PreTrainedModel, "set_attn_implementation"),
        (PreTrainedModel, "_check_and_adjust_attn_implementation"),
        (compat.masking_utils, "is_flash_attention_requested"),
        ((compat.continuous_batching() or (None,))[0], "init_continuous_batching"),
    )
    if hasattr(place, name)
]


@pytest.fixture
def enabled_again():
    yield
    flashcore_hf.disable()
    flashcore_hf.enable()


@pytest.mark.parametrize("place, name", PLACES, ids=lambda each: each if isinstance(each, str) else "")
class TestAnotherPackage:
    """One that wraps what we wrap. `disable()` put back what stood there before us and with it took theirs away."""

    def wrap(self, monkeypatch, place, name, calls: list):
        below = vars(place)[name]

        @functools.wraps(below)
        def theirs(*args, **kwargs):
            calls.append(name)
            return below(*args, **kwargs)

        monkeypatch.setattr(place, name, theirs)
        return below, theirs

    def test_after_us_stays(self, enabled_again, monkeypatch, place, name):
        flashcore_hf.disable()
        original = vars(place)[name]
        flashcore_hf.enable()
        calls = []
        ours, theirs = self.wrap(monkeypatch, place, name, calls)
        flashcore_hf.disable()
        assert vars(place)[name] is theirs and ours is not original
        # Ours below it passes on what it would have refused or changed.
        got = self.answer(place, name)
        assert set(calls) == {name} and got == self.answer_of(original, name)
        flashcore_hf.enable()
        assert vars(place)[name] is not theirs
        flashcore_hf.disable()
        assert vars(place)[name] is theirs
        monkeypatch.undo()
        assert vars(place)[name] is ours and self.answer(place, name) == got
        setattr(place, name, original)
        flashcore_hf.enable()
        assert self.answer(place, name) != got
        flashcore_hf.disable()
        assert vars(place)[name] is original

    def test_before_us_is_put_back(self, enabled_again, monkeypatch, place, name):
        flashcore_hf.disable()
        _, theirs = self.wrap(monkeypatch, place, name, [])
        flashcore_hf.enable()
        assert vars(place)[name] is not theirs
        flashcore_hf.disable()
        assert vars(place)[name] is theirs

    def answer(self, place, name):
        return self.answer_of(vars(place)[name], name)

    def answer_of(self, function, name):
        """What the function says of our name: an answer or the kind of error, which ours changes."""
        config = types.SimpleNamespace(_attn_implementation="flashcore")
        subject = types.SimpleNamespace(config=config)
        try:
            if name == "is_flash_attention_requested":
                return function(config)
            if name == "init_continuous_batching":
                with mock.patch.object(serving, "why_not", lambda: "the test asks for it"):
                    return function(subject)
            return function(transformers.BloomForCausalLM(AutoConfig.for_model("bloom", **TINY_BLOOM)), "flashcore")
        except Exception as error:  # noqa: BLE001 - its kind is the answer
            return type(error), str(error)[:60]


def test_a_registry_entry_that_was_replaced_stays(enabled_again):
    """DeepSpeed's Ulysses puts its own function under the name, around ours."""
    theirs = functools.partial(compat.attention_registry()[backend.NAME])
    compat.attention_registry()[backend.NAME] = theirs
    try:
        flashcore_hf.disable()
        assert compat.attention_registry()[backend.NAME] is theirs
    finally:
        compat.attention_registry().pop(backend.NAME)


def test_disabled_backend_is_rejected_by_transformers():
    flashcore_hf.disable()
    try:
        with pytest.raises((ValueError, KeyError, ImportError)):
            AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation="flashcore")
    finally:
        flashcore_hf.enable()


def test_from_pretrained(tmp_path):
    eager, _ = model_pair("llama")
    eager.save_pretrained(tmp_path, safe_serialization=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flashcore").eval()
    assert loaded.config._attn_implementation == "flashcore"
    ids, mask = prompts(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, attention_mask=mask).logits, eager(ids, attention_mask=mask).logits)


@pytest.mark.skipif(not HAS_SET, reason="this Transformers has no set_attn_implementation")
def test_set_attn_implementation_there_and_back():
    eager, model = model_pair("llama")
    ids, mask = prompts(2, 9)
    for name in ("eager", "flashcore", "sdpa", "flashcore"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        with torch.no_grad():
            torch.testing.assert_close(
                model(ids, attention_mask=mask).logits, eager(ids, attention_mask=mask).logits, atol=1e-4, rtol=1e-4
            )


@pytest.mark.skipif(not HAS_SET, reason="this Transformers has no set_attn_implementation")
def test_parts_with_a_copy_of_the_config_are_switched_too():
    """Up to 5.17 T5's halves stayed under "sdpa", and nobody said so: `graphed` timed sdpa's kernels as ours."""
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    config = AutoConfig.for_model("t5", **sizes, decoder_start_token_id=0)
    try:
        model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    except ValueError:
        pytest.skip("no sdpa for T5 in this Transformers")
    ids = torch.randint(3, 50, (2, 9))
    for name, calls in (("flashcore", 3), ("sdpa", 0), ("flashcore", 3)):
        model.set_attn_implementation(name)
        halves = {part.config._attn_implementation for part in (model.encoder, model.decoder)}
        assert halves == {name}
        attention = mock.Mock(wraps=compat.attention_registry()["flashcore"])
        with mock.patch.dict(compat.attention_registry(), {"flashcore": attention}), torch.no_grad():
            model(input_ids=ids, decoder_input_ids=ids)
        assert attention.call_count == calls
    if compat.VERSION < (5, 18):  # newer ones do that themselves
        model.encoder.set_attn_implementation("eager")
        model.set_attn_implementation({})
        assert model.encoder.config._attn_implementation == "eager", "who asks for nothing changes nothing"


@pytest.mark.skipif(compat.VERSION < (5, 17), reason="BLIP-2 around T5 is built otherwise")
def test_a_t5_within_another_model_is_switched_whole():
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**small, "image_size": 16, "patch_size": 8},
        qformer_config={**small, "vocab_size": 50, "encoder_hidden_size": 32},
        text_config={"model_type": "t5", "vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1,
                     "num_heads": 2},
        num_query_tokens=2,
    )  # fmt: skip
    model = transformers.Blip2ForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    text = model.language_model
    for asked, answer in (
        ("eager", "eager"), ("flashcore", "flashcore"), ("sdpa", "sdpa"), ({"text_config": "flashcore"}, "flashcore"),
        ({"text_config": "sdpa"}, "sdpa"),
    ):  # fmt: skip
        model.set_attn_implementation(asked)
        assert {part.config._attn_implementation for part in (text, text.encoder, text.decoder)} == {answer}, asked


@pytest.mark.skipif(not HAS_SET, reason="this Transformers has no set_attn_implementation")
def test_a_part_that_cannot_be_served_is_refused_and_nothing_is_changed(monkeypatch):
    """As where a model is loaded; Transformers asks of the whole alone."""
    eager, model = model_pair("llama")
    refuse, inner = models.refuse_model, type(model.model)

    def refuse_the_inner_one(model_class):
        if model_class is inner:
            raise ValueError("not this one")
        refuse(model_class)

    monkeypatch.setattr(backend, "refuse_model", refuse_the_inner_one)
    eager.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="not this one"):
        eager.set_attn_implementation("flashcore")
    assert {part.config._attn_implementation for part in (eager, eager.model)} == {"sdpa"}


def llava_config():
    """A tiny vision-language model: a CLIP tower and a LLaMA."""
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 32,
    }  # fmt: skip
    text = tiny_config("llama").to_dict()
    return AutoConfig.for_model("llava", vision_config=vision, text_config=text, image_token_index=96)


def test_implementation_for_each_submodule():
    config = llava_config()
    wanted = {"text_config": "flashcore", "vision_config": "eager"}
    model_class = transformers.LlavaForConditionalGeneration
    torch.manual_seed(0)
    reference = model_class._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    mixed = model_class._from_config(copy.deepcopy(config), attn_implementation=wanted).eval()
    mixed.load_state_dict(reference.state_dict())
    assert mixed.config.text_config._attn_implementation == "flashcore"
    assert mixed.config.vision_config._attn_implementation == "eager"
    ids, mask = prompts(1, 10)
    ids[0, 2:6] = 96
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = reference(input_ids=ids, attention_mask=mask, pixel_values=image).logits
        got = mixed(input_ids=ids, attention_mask=mask, pixel_values=image).logits
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


class TestRefusal:
    """Models that run their own attention whatever the name says."""

    CONFIGS = {
        "bloom": TINY_BLOOM,
        "mpt": {"d_model": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 50},
    }

    @pytest.mark.parametrize("model_type", CONFIGS)
    def test_refused_by_name(self, model_type):
        config = AutoConfig.for_model(model_type, **self.CONFIGS[model_type])
        with pytest.raises(ValueError, match="does not use Transformers' attention interface"):
            AutoModelForCausalLM.from_config(config, attn_implementation="flashcore")

    @pytest.mark.skipif(not HAS_SET, reason="this Transformers has no set_attn_implementation")
    def test_refused_when_switched(self):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **self.CONFIGS["bloom"]))
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match="does not use Transformers' attention interface"):
            model.set_attn_implementation("flashcore")
        assert model.config._attn_implementation == before

    def test_others_are_let_in(self):
        assert models.uses_interface(transformers.LlamaForCausalLM)
        assert not models.uses_interface(transformers.BloomForCausalLM)


def test_unknown_name_is_still_transformers_business():
    with pytest.raises((ValueError, KeyError, ImportError)):
        AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation="no_such_backend")
