"""graphed() on models that see images: the prompt runs as ever, and each step after it is replayed."""

import pytest
import torch
import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.17"):
    pytest.skip("these models' steps have other arguments", allow_module_level=True)

import flashcore_hf
from flashcore_hf import step

from .vision import gemma, pair, qwen, seen

pytestmark = pytest.mark.filterwarnings(
    "ignore::flashcore_kernels.FlashcoreFallbackWarning", "error::flashcore_hf.graphs.FlashcoreGraphWarning"
)

both = pytest.mark.parametrize("family", [qwen, gemma])


@both
def test_tokens(family, recorded):
    eager, model = pair(family)
    flashcore_hf.graphed(model)
    texts = []
    for seed in (1, 2):
        given = seen(family, seed)
        texts.append(model.generate(**given, max_new_tokens=12, do_sample=False))
        assert torch.equal(texts[-1], eager.generate(**given, max_new_tokens=12, do_sample=False))
    assert recorded == {"recorded": 1, "replayed": 22}
    assert not torch.equal(*texts)  # the image is seen


@both
@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 2}, {"num_return_sequences": 2}], ids=str)
def test_ways_of_decoding(family, options, recorded):
    eager, model = pair(family)
    flashcore_hf.graphed(model)
    options = {"do_sample": "num_return_sequences" in options, **options}
    answers = []
    for each in (eager, model):
        torch.manual_seed(1)
        answers.append(each.generate(**seen(family), max_new_tokens=8, **options))
    assert torch.equal(*answers)
    assert recorded["recorded"] == 1 and recorded["replayed"] > 4


def test_the_text_part_alone_under_flashcore(recorded):
    eager, model = pair(qwen, {"text_config": "flashcore", "vision_config": "sdpa"})
    flashcore_hf.graphed(model)
    given = seen(qwen)
    got = model.generate(**given, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, eager.generate(**given, max_new_tokens=8, do_sample=False)) and recorded["replayed"] == 7


def test_what_only_a_prompt_reads_is_left_out_where_that_is_known(recorded, monkeypatch):
    """5.17 hands Qwen's grids on to every step. Of other models nobody knows whether they read them."""
    _, model = pair(qwen)
    flashcore_hf.graphed(model)
    given = {"position_ids": torch.zeros(4, 2, 1), "image_grid_thw": torch.ones(2, 3), "mm_token_type_ids": 1}
    assert step.unread_in_steps("qwen2_5_vl_text", given) >= {"image_grid_thw", "mm_token_type_ids"}
    assert not step.unread_in_steps("qwen2_5_vl_text", {**given, "position_ids": None})
    assert not step.unread_in_steps("gemma3_text", given)
    monkeypatch.setattr(step, "unread_in_steps", lambda *rest: frozenset())
    with torch.no_grad():
        cache = flashcore_hf.FlashCoreCache(model.config)
        ids = seen(qwen)["input_ids"]
        rest = {flashcore_hf.compat.CACHE_NAME: cache, "image_grid_thw": torch.ones(2, 3)}
        model(input_ids=ids.clamp(max=80), **{flashcore_hf.compat.CACHE_NAME: cache})
        with pytest.warns(flashcore_hf.graphs.FlashcoreGraphWarning, match="image_grid_thw is a Tensor"):
            model(input_ids=ids[:, :1], **rest)
