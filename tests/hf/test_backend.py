"""Registering, restoring, and which models are let in."""

import copy

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import flashcore_hf
from flashcore_hf import backend, compat, models

from .models import model_pair, prompts, tiny_config

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
        "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2, "vocab_size": 50},
        "codegen": {"n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "vocab_size": 50},
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
