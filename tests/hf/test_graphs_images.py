"""graphed() on models that see images: the prompt runs as ever, and each step after it is replayed."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.17"):
    pytest.skip("these models' steps have other arguments", allow_module_level=True)

from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import flashcore_hf
from flashcore_hf import step

from .models import HIDDEN, VOCABULARY

pytestmark = pytest.mark.filterwarnings(
    "ignore::flashcore_kernels.FlashcoreFallbackWarning", "error::flashcore_hf.graphs.FlashcoreGraphWarning"
)

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


def inputs(family, seed: int = 1) -> dict[str, torch.Tensor]:
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


def pair(family):
    """(eager, graphed) with the same weights."""
    kind, config = family()
    torch.manual_seed(0)
    eager = kind._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    if family is gemma:
        torch.nn.init.normal_(eager.model.multi_modal_projector.mm_input_projection_weight)  # zeros else: no image
    model = kind._from_config(copy.deepcopy(config), attn_implementation="flashcore").eval()
    model.load_state_dict(eager.state_dict())
    return eager, flashcore_hf.graphed(model)


@pytest.mark.parametrize("family", [qwen, gemma])
def test_tokens(family, recorded):
    eager, model = pair(family)
    texts = []
    for seed in (1, 2):
        given = inputs(family, seed)
        texts.append(model.generate(**given, max_new_tokens=12, do_sample=False))
        assert torch.equal(texts[-1], eager.generate(**given, max_new_tokens=12, do_sample=False))
    assert recorded == {"recorded": 1, "replayed": 22}
    assert not torch.equal(*texts)  # the image is seen


@pytest.mark.parametrize("family", [qwen, gemma])
@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 2}, {"num_return_sequences": 2}], ids=str)
def test_ways_of_decoding(family, options, recorded):
    eager, model = pair(family)
    options = {"do_sample": "num_return_sequences" in options, **options}
    answers = []
    for each in (eager, model):
        torch.manual_seed(1)
        answers.append(each.generate(**inputs(family), max_new_tokens=8, **options))
    assert torch.equal(*answers)
    assert recorded["recorded"] == 1 and recorded["replayed"] > 4


def test_the_text_part_alone_under_flashcore(recorded):
    kind, config = qwen()
    torch.manual_seed(0)
    eager = kind._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    names = {"text_config": "flashcore", "vision_config": "sdpa"}
    model = kind._from_config(copy.deepcopy(config), attn_implementation=names).eval()
    model.load_state_dict(eager.state_dict())
    flashcore_hf.graphed(model)
    given = inputs(qwen)
    got = model.generate(**given, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, eager.generate(**given, max_new_tokens=8, do_sample=False)) and recorded["replayed"] == 7


def test_what_only_a_prompt_reads_is_left_out_where_that_is_known(recorded, monkeypatch):
    """5.17 hands Qwen's grids on to every step. Of other models nobody knows whether they read them."""
    _, model = pair(qwen)
    given = {"position_ids": torch.zeros(4, 2, 1), "image_grid_thw": torch.ones(2, 3), "mm_token_type_ids": 1}
    assert step.unread_in_steps("qwen2_5_vl_text", given) >= {"image_grid_thw", "mm_token_type_ids"}
    assert not step.unread_in_steps("qwen2_5_vl_text", {**given, "position_ids": None})
    assert not step.unread_in_steps("gemma3_text", given)
    monkeypatch.setattr(step, "unread_in_steps", lambda *rest: frozenset())
    with torch.no_grad():
        cache = flashcore_hf.FlashCoreCache(model.config)
        ids = inputs(qwen)["input_ids"]
        rest = {flashcore_hf.compat.CACHE_NAME: cache, "image_grid_thw": torch.ones(2, 3)}
        model(input_ids=ids.clamp(max=80), **{flashcore_hf.compat.CACHE_NAME: cache})
        with pytest.warns(flashcore_hf.graphs.FlashcoreGraphWarning, match="image_grid_thw is a Tensor"):
            model(input_ids=ids[:, :1], **rest)
