"""Llama-3.1-8B's shape at full size in bf16: tokens by the parity rule beside sdpa and eager, and memory."""

import pytest
import torch
from transformers import DynamicCache

from flashcore_hf.parity.rules import check_paths, compare, largest_difference
from flashcore_hf.parity.runs import Cell, caught_at, generate, wrong_scale

from ..hf.compare import named
from .large_models import make_model, random_prompts

VOCABULARY = 128256

# One copy of the model is enough, also where tests run in several processes.
pytestmark = pytest.mark.xdist_group("llama")


@pytest.fixture(scope="module")
def model():
    made = make_model("Llama-3.1-8B")
    yield made
    del made
    torch.cuda.empty_cache()


def requested_bytes() -> int:
    """Bytes that live tensors asked for, without the allocator's rounding."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


def assert_parity(model, cell: Cell) -> None:
    """flashcore beside sdpa, eager saying what rounding may excuse; and a wrong scale is caught."""
    model.set_attn_implementation("sdpa")
    reference = generate(model, cell)
    model.set_attn_implementation("eager")
    noise = largest_difference(generate(model, cell, reference.tokens).logits, reference.logits)
    model.set_attn_implementation("flashcore")
    free = generate(model, cell)
    forced = generate(model, cell, reference.tokens)
    found = compare(reference, free, forced, noise)
    assert not found.failures + check_paths(free.paths)
    with wrong_scale(model):
        assert caught_at(model, cell, reference.tokens, found.excusable) is not None


def test_single_token(model):
    """One prompt, one token: the prefill alone. One step proves little, so all logits of the prompt are compared."""
    ids = torch.tensor(random_prompts(1, 512, VOCABULARY), device="cuda")
    logits = {}
    for name in ("sdpa", "eager", "flashcore"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits[name] = model(ids).logits[0].float()
    noise = (logits["eager"] - logits["sdpa"]).abs().amax(-1)
    difference = (logits["flashcore"] - logits["sdpa"]).abs().amax(-1)
    assert difference.mean() <= 1.5 * noise.mean()
    # Near-ties fall either way in any backend: no more of them than between the two references.
    others = (logits["eager"].argmax(-1) != logits["sdpa"].argmax(-1)).sum()
    ours = (logits["flashcore"].argmax(-1) != logits["sdpa"].argmax(-1)).sum()
    assert ours <= 2 * others + 5
    with wrong_scale(model), torch.no_grad():
        wrong = model(ids).logits[0].float()
    assert (wrong - logits["sdpa"]).abs().amax(-1).mean() > 3 * noise.mean()


@pytest.mark.parametrize("tokens", [50, 200])
def test_tokens(model, tokens):
    assert_parity(model, Cell("dynamic", random_prompts(1, 2048, VOCABULARY), tokens, 0))


def test_batch_of_4_left_padded(model):
    assert_parity(model, Cell("dynamic", random_prompts(4, 1024, VOCABULARY), 50, 0))


def test_memory(model):
    """The cache is Hkv / H of what MHA's would be, and decoding allocates the cache's growth and nothing else."""
    model.set_attn_implementation("flashcore")
    config = model.config
    ids = torch.tensor(random_prompts(1, 1024, VOCABULARY), device="cuda")
    cache = DynamicCache(config=config)
    with torch.no_grad():
        token = model(ids, **named(cache), use_cache=True).logits[:, -1:].argmax(-1)
        token = model(token, **named(cache), use_cache=True).logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()

        def cached_bytes() -> int:
            return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))

        head_dim = config.hidden_size // config.num_attention_heads
        mha = 2 * config.num_hidden_layers * config.num_attention_heads * head_dim * 2 * cache.get_seq_length()
        assert cached_bytes() * config.num_attention_heads == mha * config.num_key_value_heads

        before, before_cached = requested_bytes(), cached_bytes()
        for _ in range(200):
            token = model(token, **named(cache), use_cache=True).logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        grown = requested_bytes() - before
    assert grown == cached_bytes() - before_cached
