"""FP8 on a GPU: what the interpreter cannot round is tried here, and a cache of e4m3 under graphs."""

import pytest
import torch

import flashcore_hf

from ..hf.compare import greedy
from ..hf.models import model_pair, prompts
from ..kernels.cache.test_kv_write import *  # noqa: F403
from ..kernels.test_fp8 import *  # noqa: F403

E4M3 = torch.float8_e4m3fn


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_graphed_tokens_equal_plain_ones(model_type):
    _, plain = model_pair(model_type)
    flashcore_hf.use_flashcore_cache(plain.cuda(), dtype=E4M3)
    _, model = model_pair(model_type)
    flashcore_hf.graphed(flashcore_hf.use_flashcore_cache(model.cuda(), dtype=E4M3))
    for seed in (1, 2):
        ids, mask = (tensor.cuda() for tensor in prompts(3, 9, "left", seed=seed))
        assert torch.equal(greedy(model, ids, mask, 20), greedy(plain, ids, mask, 20))


@pytest.mark.parametrize(
    "shape", [(1, 32, 8, 20000, 128), (16, 8, 8, 2048, 64), (3, 28, 4, 1000, 256), (2, 8, 2, 500, 96)], ids=str
)
@pytest.mark.parametrize("num_queries", [1, 7, 300])
def test_large(shape, num_queries):
    """Error beside SDPA on what is stored, in bf16."""
    from flashcore_kernels import attention, naive_attention

    batch_size, heads, kv_heads, keys, head_dim = shape
    query = torch.randn(batch_size, heads, num_queries, head_dim, device="cuda").bfloat16()
    stored, scales = [], []
    for _ in range(2):
        states = torch.randn(batch_size, kv_heads, keys, head_dim, device="cuda")
        scales.append(states.abs().amax(dim=(2, 3)) / 200)
        stored.append((states / scales[-1][:, :, None, None]).to(E4M3))
    options = {"key_scale": scales[0], "value_scale": scales[1], "is_causal": True}
    got = attention(query, *stored, **options)
    exact = naive_attention(query[:1].double(), *(part[:1] for part in stored), is_causal=True,
                            key_scale=scales[0][:1], value_scale=scales[1][:1])[0]  # fmt: skip
    plain = [(part.float() * scale[:, :, None, None]).bfloat16() for part, scale in zip(stored, scales)]
    peer = naive_attention(query[:1], *(part[:1] for part in plain), is_causal=True, probability_dtype=torch.bfloat16)[
        0
    ]
    allowed = 2 * (peer - exact).abs().max() + 2**-8 * exact.abs().max()
    assert (got[:1] - exact).abs().max() <= allowed
