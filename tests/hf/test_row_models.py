"""Llama 4's chunks, Gemma 3's images and PaliGemma's prefix in whole models beside eager, with a range a query."""

import copy

import pytest
import torch
from flashcore_kernels import layout_of

import flashcore_hf.attention
from flashcore_hf import compat

from .compare import TOLERANCE

IMAGE = 98
TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.25, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 2, "vision_use_head": False,
}  # fmt: skip


def gemma3():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**TEXT, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=IMAGE)
    return Gemma3ForConditionalGeneration, config, slice(5, 9)


def paligemma():
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    vision = {**VISION, "projection_dim": 32, "model_type": "siglip_vision_model"}
    text = {**TEXT, "model_type": "gemma"}
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=32, hidden_size=32
    )
    return PaliGemmaForConditionalGeneration, config, slice(3, 19)


def llama4():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        **{**TEXT, "num_hidden_layers": 3}, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=8,
        no_rope_layers=[1, 1, 0], layer_types=["chunked_attention", "chunked_attention", "full_attention"],
    )  # fmt: skip
    return Llama4ForCausalLM, config, None


def inputs_of(name: str, image: slice | None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (2, 23), generator=generator)
    mask = torch.ones_like(ids)
    if image is not None:
        ids[:, image] = IMAGE
    ids[1, :3] = mask[1, :3] = 0
    if image is None:
        return {"input_ids": ids, "attention_mask": mask}
    # Gemma 3 says 1 of an image's tokens; PaliGemma 0 of the whole prompt.
    types = (ids == IMAGE).long() if name == "gemma3" else torch.zeros_like(ids)
    pixels = torch.randn(2, 3, 8, 8, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "pixel_values": pixels}


@torch.no_grad()
@pytest.mark.parametrize("made", [gemma3, paligemma, llama4])
def test_beside_eager(made, monkeypatch):
    model_class, config, image = made()
    name = made.__name__
    if name == "paligemma" and compat.VERSION < (5, 0):
        pytest.skip("this version's PaliGemma makes its mask itself")
    if name == "gemma3" and compat.VERSION < (4, 57):
        pytest.skip("this version's Gemma 3 tells images apart by a distance")
    names = {"eager": "eager", "flashcore": {"text_config": "flashcore"} if image else "flashcore"}
    torch.manual_seed(0)
    eager, model = (
        model_class._from_config(copy.deepcopy(config), attn_implementation=n).eval() for n in names.values()
    )
    model.load_state_dict(eager.state_dict())
    inputs = inputs_of(name, image)
    real = inputs["attention_mask"][..., None]
    layouts = []
    attend = flashcore_hf.attention.attend

    def watched(inputs, *options):
        assert inputs.mask is None
        if inputs.key_range is not None:
            layouts.append(
                layout_of(inputs.key_range, inputs.query.shape[0], inputs.query.shape[2], inputs.key.shape[2])
            )
        return attend(inputs, *options)

    monkeypatch.setattr(flashcore_hf.attention, "attend", watched)
    expected = eager(**inputs).logits
    assert ((model(**inputs).logits - expected) * real).abs().max() / expected.abs().max() < TOLERANCE
    assert layouts.count("rows") == 2
    text = [each.generate(**inputs, max_new_tokens=6, do_sample=False) for each in (eager, model)]
    assert torch.equal(*text)
    # The control: chunks, and images whose tokens see each other, count.
    if image is None:
        eager.config.attention_chunk_size = 64
        other = eager(**inputs).logits
    else:
        other = eager(**{**inputs, "token_type_ids": 1 - inputs["token_type_ids"]}).logits
    assert ((other - expected) * real).abs().max() / expected.abs().max() > 100 * TOLERANCE
