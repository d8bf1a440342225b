"""Every family that gets KeyRanges, beside eager."""

import inspect
import sys

import pytest
import torch
from flashcore_kernels import key_range
from transformers import CONFIG_MAPPING, AutoModel

from flashcore_hf import compat, masks, models

from .compare import TOLERANCE, greedy, logit_error
from .models import FAMILIES, model_pair, prompts, skip_without_config

# What these versions of Transformers do not have, or refuse by themselves.
PRESENT = sorted(family for family in FAMILIES if family in CONFIG_MAPPING)


def build(model_type: str):
    skip_without_config(CONFIG_MAPPING[model_type])
    try:
        return model_pair(model_type)
    except ValueError as error:
        if "does not use Transformers' attention interface" in str(error) or "GPT-OSS model does not" in str(error):
            pytest.skip(f"refused on this version: {error}")
        raise


def test_every_family_gets_key_ranges():
    """The others that get them have their rows in SUPPORT.md's data: see tests/test_support_table.py."""
    assert set(FAMILIES) <= models.KEY_RANGE_MODELS


@pytest.mark.parametrize("model_type", PRESENT)
def test_family(model_type, paths, monkeypatch):
    """Logits for every padding and 8 greedy tokens; on kernels alone, and never with a dense mask."""
    eager, model = build(model_type)
    answers = []

    def listening(**kwargs):
        answers.append(masks.flashcore_mask(**kwargs))
        return answers[-1]

    monkeypatch.setitem(compat.mask_registry(), "flashcore", listening)
    for padding in (None, "left", "right"):
        ids, mask = prompts(2, 13, padding)
        assert logit_error(eager, model, ids, mask) < TOLERANCE, padding
    ids, mask = prompts(2, 9, "left")
    assert torch.equal(greedy(model, ids, mask, 8), greedy(eager, ids, mask, 8))
    assert paths["flashcore_decode"] > 0 and paths["torch"] == 0
    assert all(answer.dtype == torch.int32 for answer in answers)
    # StableLM of 5.0 asks for no mask: it hands its 2-D one to whatever has "flash" in its name.
    makes_its_own = "create_causal_mask" not in inspect.getsource(sys.modules[type(model).__module__])
    assert bool(answers) is not makes_its_own


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2"])
def test_negative_controls(model_type, monkeypatch):
    """A scale of 1.5x, padding that is ignored, a window off by one: the comparison above sees each."""
    eager, model = build(model_type)
    ids, mask = prompts(3, 13, "left")
    assert logit_error(eager, model, ids, mask) < TOLERANCE
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.5
    assert logit_error(eager, model, ids, mask) > 100 * TOLERANCE

    eager, model = build(model_type)
    made = masks.make_key_range

    def ignoring_padding(*args, **kwargs):
        return made(*args, **{**kwargs, "key_mask": None})

    monkeypatch.setattr(masks, "make_key_range", ignoring_padding)
    assert logit_error(eager, model, ids, mask) > 100 * TOLERANCE
    if model_type != "llama":

        def window_off_by_one(*args, **kwargs):
            line = made(*args, **kwargs)
            left = line[:, :, :1, key_range.LEFT]  # the other lines of that axis are the same memory
            left += (left > 0).to(left.dtype)
            return line

        monkeypatch.setattr(masks, "make_key_range", window_off_by_one)
        assert logit_error(eager, model, ids, mask) > 100 * TOLERANCE


def test_one_bias_for_all_images(monkeypatch):
    """BEiT adds its position bias to its mask: to none, or attention would get a rough bias for each image."""
    config = CONFIG_MAPPING["beit"](
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=64,
        use_relative_position_bias=True,
    )  # fmt: skip
    model = AutoModel.from_config(config).eval()
    if "create_bidirectional_mask" not in inspect.getsource(sys.modules[type(model).__module__]):
        pytest.skip("this version's BEiT makes no mask")
    sizes = []

    def listen(_, args, kwargs):
        sizes.append(kwargs["attention_mask"].shape[0])

    for module in model.modules():
        if type(module).__name__ == "BeitAttention":
            module.register_forward_pre_hook(listen, with_kwargs=True)
    pixels = torch.randn(3, 3, 64, 64)
    outputs = {}
    with torch.no_grad():
        for implementation in ("sdpa", "flashcore"):
            model.set_attn_implementation(implementation)
            outputs[implementation] = model(pixels).last_hidden_state
        monkeypatch.setattr(models, "MAYBE_NO_MASK_MODELS", models.MAYBE_NO_MASK_MODELS - {"beit"})
        model(pixels)
    assert sizes == [1, 1, 3]
    torch.testing.assert_close(outputs["flashcore"], outputs["sdpa"], atol=1e-4, rtol=1e-4)
