"""Whisper-large-v3 and T5-large at full size with random weights, and inputs for them."""

import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

SHAPES = {
    "Whisper-large-v3": {
        "model_type": "whisper", "vocab_size": 51866, "num_mel_bins": 128, "d_model": 1280, "encoder_layers": 32,
        "decoder_layers": 32, "encoder_attention_heads": 20, "decoder_attention_heads": 20, "encoder_ffn_dim": 5120,
        "decoder_ffn_dim": 5120, "max_source_positions": 1500, "max_target_positions": 448, "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
    "T5-large": {
        "model_type": "t5", "vocab_size": 32128, "d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24,
        "num_decoder_layers": 24, "num_heads": 16,
    },
}  # fmt: skip
# What makes them small enough to try a script on a CPU.
TINY = {
    "Whisper-large-v3": {
        "vocab_size": 500, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    },
    "T5-large": {"vocab_size": 500, "d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1},
}  # fmt: skip


def make_model(name: str, *, device: str = "cuda", tiny: bool = False, seed: int = 0):
    """The model in bf16 on `device`, in eval mode, that never ends a text."""
    shape = {**SHAPES[name], **(TINY[name] if tiny else {})}
    config = AutoConfig.for_model(
        shape.pop("model_type"), **shape, pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=2
    )
    kind = AutoModelForSpeechSeq2Seq if name.startswith("Whisper") else AutoModelForSeq2SeqLM
    torch.manual_seed(seed)
    with torch.device(device):
        model = kind.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    return model


def source(model, batch_size: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """What generate() gets: a clip of 30 s for Whisper, else `length` tokens, each further sequence shorter."""
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "whisper":
        frames = 2 * model.config.max_source_positions
        features = torch.randn(batch_size, model.config.num_mel_bins, frames, generator=generator)
        return {"input_features": features.to(model.device, model.dtype)}
    ids = torch.randint(3, model.config.vocab_size, (batch_size, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch_size):
        mask[row, length - row * length // (2 * batch_size) :] = 0
    return {"input_ids": (ids * mask).to(model.device), "attention_mask": mask.to(model.device)}
