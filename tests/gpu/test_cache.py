"""FlashCoreCache on a GPU, where a kernel writes the tokens: contents and generate() as with a DynamicCache."""

import pytest
import torch
from transformers import DynamicCache

from flashcore_hf.cache.flashcore_cache import FlashCoreCache

from ..hf.cache.test_flashcore_cache import assert_same, layer_pair, tokens
from ..hf.compare import greedy, named
from ..hf.models import VOCABULARY, model_pair, prompts


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma3_text", "gpt_oss"])
def model(request):
    return model_pair(request.param)[1].cuda()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("padding", [None, "left"])
def test_generate(model, options, padding):
    ids, mask = (tensor.cuda() for tensor in prompts(3, 9, padding))
    answers = []
    for cache in (DynamicCache(config=model.config), FlashCoreCache(model.config)):
        torch.manual_seed(3)
        answers.append(greedy(model, ids, mask, 40, **named(cache), **options))
    assert torch.equal(*answers)


def test_prompt_lookup(model):
    ids = torch.arange(3, 9).repeat(3)[None].cuda()
    options = {"prompt_lookup_num_tokens": 4, "eos_token_id": VOCABULARY - 1}
    answers = [
        greedy(model, ids, torch.ones_like(ids), 40, **named(cache), **options)
        for cache in (DynamicCache(), FlashCoreCache(model.config))
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 6, 300])
def test_contents(window, dtype):
    """Growth, long prompts, and old tokens dropped on the way."""
    ours, other = layer_pair(window)
    for step, count in enumerate([3, 5, 1, 400, 1, 1, 7, 700, 1, 300, *[1] * 40]):
        pair = [part.cuda().to(dtype) for part in tokens(2, count, seed=step, head_dim=72, value_dim=40)]
        for got, want in zip(ours.update(*pair), other.update(*pair)):
            assert torch.equal(got, want)
        assert_same(ours, other)
