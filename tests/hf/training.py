"""Tiny models in float32 that learn one padded batch by heart, under two backends with the same weights."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from flashcore_hf import compat

from .models import SIZES, VOCABULARY, prompts, skip_without_config, tiny_config

MODELS = ("llama", "mistral", "gemma2", "gpt_oss", "bert", "t5")
STEPS, STEPS_ON_A_CPU = 50, 10
_ENCODERS = {
    "bert": ("BertForMaskedLM", "BertConfig", {
        **{key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                       "num_attention_heads", "initializer_range")},
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {
        "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4,
        "dropout_rate": 0.0, "decoder_start_token_id": 0, "initializer_factor": 1.0}),
}  # fmt: skip


def make(name: str, implementation: str):
    """A model of `name`, the same weights whatever the implementation, or a skip where this version lacks it."""
    torch.manual_seed(0)
    if name in _ENCODERS:
        class_name, config_name, fields = _ENCODERS[name]
        config_class = getattr(transformers, config_name)
        skip_without_config(config_class)
        model_class = getattr(transformers, class_name)
        if "ALL_ATTENTION_FUNCTIONS" not in vars(__import__(model_class.__module__, fromlist=["_"])):
            pytest.skip(f"{class_name} has attention of its own on this version")
        return model_class._from_config(config_class(**fields), attn_implementation=implementation)
    try:
        config = tiny_config(name)
    except (ValueError, KeyError) as error:
        pytest.skip(str(error))
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def losses_of(name: str, steps: int, device: str = "cpu", scale: float = 1.0) -> tuple[list[float], list[float]]:
    """(losses of `sdpa`, or of eager where there is none; losses of ours), `steps` of AdamW on one padded batch."""
    reference = "eager" if name in ("gemma2", "gpt_oss") else "sdpa"
    return tuple(
        _train(make(name, implementation).to(device), name, steps, device, scale)
        for implementation, scale in ((reference, 1.0), ("flashcore", scale))
    )


def _train(model, name: str, steps: int, device: str, scale: float) -> list[float]:
    ids, mask = (t.to(device) for t in prompts(4, 21, "right" if name in _ENCODERS else "left"))
    # A query that sees no key, or padding: what is predicted there enters no loss.
    counts = mask.bool() if name in _ENCODERS else mask.bool() & mask.roll(1, dims=1).bool()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~counts, -100)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    with wrong_scale(scale):
        for _ in range(steps):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


class wrong_scale:
    """Our attention with its scale multiplied, for negative controls."""

    def __init__(self, factor: float):
        self.factor = factor

    def __enter__(self):
        registry, factor = compat.attention_registry(), self.factor
        self.original = original = registry["flashcore"]
        if factor != 1.0:

            def scaled(module, query, *arguments, **more):
                return original(module, query * factor, *arguments, **more)

            registry["flashcore"] = scaled

    def __exit__(self, *error):
        compat.attention_registry()["flashcore"] = self.original


def difference(a: list[float], b: list[float]) -> float:
    """Largest difference of two curves relative to the first one's first loss."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True)) / a[0]
