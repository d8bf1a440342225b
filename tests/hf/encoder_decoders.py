"""Tiny encoder-decoders of the families that translate and transcribe, and inputs for them."""

import copy
import inspect

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

from .models import HIDDEN, VOCABULARY

_STD = (2 / HIDDEN) ** 0.5
_BART = {
    "d_model": HIDDEN, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "init_std": _STD,
    "max_position_embeddings": 128,
}  # fmt: skip
_T5 = {"d_model": HIDDEN, "d_kv": 16, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}
FAMILIES = {
    "bart": _BART, "mbart": _BART, "pegasus": _BART, "marian": _BART, "blenderbot": _BART, "blenderbot-small": _BART,
    "plbart": _BART, "m2m_100": _BART,
    "t5": _T5, "mt5": _T5, "umt5": _T5,
    "whisper": {
        **_BART, "num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 128, "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
}  # fmt: skip


def pair(model_type: str, **changes):
    """(eager, flashcore): two models with the same weights, in eval mode; what they write is not one word."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        model_type, **{
            "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
            "decoder_start_token_id": 2, "forced_eos_token_id": None, "tie_word_embeddings": model_type == "whisper",
            **FAMILIES[model_type], **changes,
        },
    )  # fmt: skip
    kind = AutoModelForSpeechSeq2Seq if model_type == "whisper" else AutoModelForSeq2SeqLM
    eager, other = (
        kind.from_config(copy.deepcopy(config), attn_implementation=name).eval() for name in ("eager", "flashcore")
    )
    with torch.no_grad():
        for name, parameter in eager.named_parameters():
            # Layers that say more than the token before: else all texts are one token, over and over.
            if parameter.dim() == 2 and ("decoder" in name or "encoder" in name) and "embed" not in name:
                parameter.mul_(1.5)
    other.load_state_dict(eager.state_dict())
    return eager, other


def source(model, batch_size: int, length: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of generate(): a source of `length` tokens, right-padded; or 30 frames' worth of sound."""
    generator = torch.Generator().manual_seed(seed)
    if "input_features" in inspect.signature(model.forward).parameters:
        return {"input_features": torch.randn(batch_size, 8, 60, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch_size, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch_size):
        mask[row, length - 2 * row :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
