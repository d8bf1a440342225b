"""A language model of 1B in bfloat16 that learns: our losses are as near to `sdpa`'s as eager's are."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ..hf.training import wrong_scale

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

STEPS, BATCHES, BATCH, LENGTH, VOCABULARY = 200, 4, 4, 512, 8192


def texts() -> torch.Tensor:
    """`[STEPS, BATCH, LENGTH]` tokens: BATCHES batches over and over, which a model learns by heart.

    In each text every other token is the one that followed the same token before, so looking back helps.
    """
    generator = torch.Generator().manual_seed(0)
    pairs = torch.randint(VOCABULARY, (BATCHES, BATCH, 32, 2), generator=generator)
    order = torch.randint(32, (BATCHES, BATCH, LENGTH // 2), generator=generator)
    tokens = pairs.gather(2, order[..., None].expand(-1, -1, -1, 2)).flatten(2)
    return tokens.repeat(STEPS // BATCHES, 1, 1)


def losses(implementation: str, steps: int = STEPS) -> torch.Tensor:
    """Loss of each step, AdamW in bfloat16 on weights of one seed."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=2048, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=implementation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()
    found = []
    for ids in texts()[:steps].cuda():
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).float().cpu()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean distance of two curves, of the means of ten steps each: single steps are noise."""
    return (a - b).unflatten(0, (-1, 10)).mean(1).abs().mean().item()


def test_our_curve_is_as_near_as_eagers():
    sdpa, eager, ours = (losses(name) for name in ("sdpa", "eager", "flashcore"))
    print("sdpa", sdpa[9::10].tolist(), "\neager", eager[9::10].tolist(), "\nours", ours[9::10].tolist())
    rounding = distance(eager, sdpa)
    print("eager to sdpa", rounding, "ours to sdpa", distance(ours, sdpa))
    assert sdpa[-10:].mean() < sdpa[:10].mean() - 1.0, "it must learn something, or equal losses say little"
    # Both distances are single draws of the same thing where nothing is wrong.
    assert distance(ours, sdpa) <= 2 * rounding
    # The control: a softmax that is sharper by half learns otherwise.
    with wrong_scale(1.5):
        wrong = losses("flashcore")
    print("wrong to sdpa", distance(wrong, sdpa))
    assert distance(wrong, sdpa) > 2 * rounding
