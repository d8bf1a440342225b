"""Tiny models of each family, with weights large enough that a wrong scale or mask shows."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flashcore_hf import compat
from flashcore_hf.legacy.helper import replace_attention_with_flashcore

try:
    from huggingface_hub.errors import StrictDataclassError
except ImportError:  # a hub that is older than these checks

    class StrictDataclassError(Exception):
        pass


HIDDEN = 64
VOCABULARY = 97

# What each family needs beyond SIZES to be small; model_type -> config keywords.
_SMALL_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "cohere": {},
    "cohere2": {"sliding_window": 6},
    "deepseek_v3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "num_key_value_heads": 4, "head_dim": 8,
    },
    "exaone4": {"sliding_window": 6, "sliding_window_pattern": 2},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "gpt_neox": {},
    "gpt_oss": {"head_dim": 16, "sliding_window": 6, **_SMALL_MOE},
    "granite": {"attention_multiplier": 0.25},
    "helium": {"head_dim": 16},
    "llama": {},
    "ministral": {"head_dim": 16, "sliding_window": 6},
    "mistral": {"head_dim": 16, "sliding_window": 6},
    "mixtral": {"sliding_window": 6, **_SMALL_MOE},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 6},
    "phi": {},
    "phi3": {"sliding_window": 6},
    "qwen2": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {"shared_expert_intermediate_size": 32, **_SMALL_MOE},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, **_SMALL_MOE},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": 6},
}  # fmt: skip

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None, "attention_dropout": 0.0,
    # The default 0.02 leaves attention so flat that a scale of 1.5x goes unseen.
    "initializer_range": (2 / HIDDEN) ** 0.5,
}  # fmt: skip


def tiny_config(model_type: str, **changes):
    """A small config of `model_type`, with initializer_range about sqrt(2 / hidden_size)."""
    return AutoConfig.for_model(model_type, **{**SIZES, **FAMILIES.get(model_type, {}), **changes})


def skip_without_config(config_class: type) -> None:
    """Skip the test where Transformers refuses its own defaults: some of 5.4's types are wrong for a strict hub."""
    try:
        config_class()
    except StrictDataclassError as error:
        pytest.skip(f"{config_class.__name__} cannot be made on this version: {error}")


def model_pair(model_type: str, *, seed: int = 0, implementation: str = "flashcore", **changes):
    """(eager, other): two models of one family with the same weights, in eval mode."""
    config = tiny_config(model_type, **changes)
    helped = implementation == "flashcore" and not compat.HAS_INTERFACE
    torch.manual_seed(seed)
    # A config object that is shared would make both models use the last implementation.
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    other = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="sdpa" if helped else implementation
    ).eval()
    other.load_state_dict(eager.state_dict())
    if helped:
        replace_attention_with_flashcore(other)
    return eager, other


def prompts(batch_size: int, length: int, padding: str | None = None, seed: int = 1):
    """(input_ids, attention_mask), `[B, length]`; with padding "left" or "right", rows have different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch_size, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        for row in range(batch_size):
            hidden = slice(0, 2 * row) if padding == "left" else slice(length - 2 * row, length)
            mask[row, hidden] = 0
    return ids.masked_fill(mask == 0, 0), mask
