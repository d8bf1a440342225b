"""Tiny models on the GPU in fp32: generate()'s tokens equal eager's, with the caches that only a GPU has."""

import pytest
import torch
from transformers import DynamicCache

from ..hf.compare import greedy, named
from ..hf.models import model_pair, prompts


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2"])
def pair(request):
    return tuple(model.cuda() for model in model_pair(request.param))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_greedy(pair, cache, padding):
    """The static cache is compiled and replayed as a CUDA graph by generate() itself."""
    import flashcore_hf  # noqa: F401

    eager, model = pair
    ids, mask = (tensor.cuda() for tensor in prompts(3, 9, padding))
    options = {"cache_implementation": cache} if cache else {}
    expected = greedy(eager, ids, mask, 32, **options, disable_compile=True)
    assert torch.equal(greedy(model, ids, mask, 32, **options), expected)
    # Once more through the graphs that the first run captured.
    assert torch.equal(greedy(model, ids, mask, 32, **options), expected)


@pytest.mark.parametrize("padding", [None, "left"])
def test_offloaded(pair, padding):
    """The tokens of a cache that stays on the GPU.

    Transformers copies layers back on a side stream that does not wait for the copies away from the GPU; with layers as
    small as these eager trips over that too. So the side stream is made to wait here: what is tested is ours.
    """
    eager, model = pair
    ids, mask = (tensor.cuda() for tensor in prompts(3, 9, padding))
    expected = greedy(eager, ids, mask, 32)
    cache = DynamicCache(config=model.config, offloading=True)
    cache.prefetch_stream = torch.cuda.current_stream()
    assert torch.equal(greedy(model, ids, mask, 32, **named(cache)), expected)


def test_beams_and_prompt_lookup(pair):
    eager, model = pair
    ids, mask = (tensor.cuda() for tensor in prompts(1, 9))
    for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(greedy(model, ids, mask, 20, **options), greedy(eager, ids, mask, 20, **options))


def test_a_compiled_decode_may_be_the_first_call():
    """torch.compile warms up inside a graph's memory pool; what the kernels keep must not come out of it."""
    from flashcore_kernels import attention
    from flashcore_kernels.runtime.workspace import _counters, _mailboxes

    torch._dynamo.reset()
    for words in (_counters, _mailboxes):
        words._buffers.clear()
    query, key = torch.randn(2, 4, 1, 64, device="cuda"), torch.randn(2, 2, 2000, 64, device="cuda")
    step = torch.compile(lambda q, k: attention(q, k, k).clone(), mode="reduce-overhead", fullgraph=True)
    want = attention(query, key, key)
    for words in (_counters, _mailboxes):
        words._buffers.clear()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(step(query, key), want)
