"""Tiny models that see images, and prompts with images for them."""

import copy

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from .models import HIDDEN, VOCABULARY

# Tokens that stand for an image, and what begins and ends one.
IMAGE, BEGIN, END, VIDEO = 90, 91, 92, 93
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "initializer_range": (2 / HIDDEN) ** 0.5, "tie_word_embeddings": False,
}  # fmt: skip


def qwen():
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4, "window_size": 16,
        "out_hidden_size": HIDDEN, "fullatt_block_indexes": [1],
    }  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_scaling": rope}, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=BEGIN, vision_end_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration, config


def gemma():
    text = {**TEXT, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 4,
    }  # fmt: skip
    config = Gemma3Config(
        text_config={**text, "layer_types": ["sliding_attention", "full_attention"]}, vision_config=vision,
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=BEGIN, eoi_token_index=END,
        tie_word_embeddings=False,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration, config


def seen(family, seed: int = 1) -> dict[str, torch.Tensor]:
    """Two prompts with an image each, of four tokens; the first is left-padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([
        [0, 0, 5, 6, BEGIN, IMAGE, IMAGE, IMAGE, IMAGE, END, 7, 8],
        [5, 9, 4, 6, BEGIN, IMAGE, IMAGE, IMAGE, IMAGE, END, 7, 11],
    ])  # fmt: skip
    given = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if family is gemma:
        pixels = torch.randn(2, 3, 16, 16, generator=generator)
        return {**given, "pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}
    pixels = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=generator)
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return {**given, "pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}


def pair(family, implementation="flashcore"):
    """(eager, other) with the same weights."""
    kind, config = family()
    torch.manual_seed(0)
    eager = kind._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    if family is gemma:
        torch.nn.init.normal_(eager.model.multi_modal_projector.mm_input_projection_weight)  # zeros else: no image
    other = kind._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    other.load_state_dict(eager.state_dict())
    return eager, other
