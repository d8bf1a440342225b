"""Transformers 4.40 to 4.52, where a model's attention is replaced by ours."""

from .helper import (
    attention_replaced,
    replace_attention_with_flashcore,
    replace_llama_attention_with_flashcore,
    replace_mistral_attention_with_flashcore,
    replace_qwen2_attention_with_flashcore,
    restore_attention,
)

__all__ = [
    "attention_replaced",
    "replace_attention_with_flashcore",
    "replace_llama_attention_with_flashcore",
    "replace_mistral_attention_with_flashcore",
    "replace_qwen2_attention_with_flashcore",
    "restore_attention",
]
