"""What bench_training.py trains: models with random weights, and one batch for each."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from sweep.configs import tiny_config
from zoo.inputs import lengths_of, noise_rows, token_rows

IGNORED = -100  # labels that enter no loss


class Case(NamedTuple):
    """One kind of training.

    Attributes:
        name: as the rows have it.
        model_class: a name in transformers, of a model that answers a loss.
        config: makes the configuration.
        batch: (config, batch size, length) -> forward's keywords on the CPU, labels included, floats in float32.
        size: batch size and length.
        checkpointed: gradient checkpointing.
        dropout: whether the configuration drops anything.
        learning_rate: of AdamW.
    """

    name: str
    model_class: str
    config: Callable[[], transformers.PretrainedConfig]
    batch: Callable
    size: tuple[int, int]
    checkpointed: bool = False
    dropout: bool = False
    learning_rate: float = 1e-4


def make(case: Case, device: str, dtype: torch.dtype, tiny: bool) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model in training mode with weights drawn on `device`, and its batch there.

    Args:
        tiny: two small layers of the same class, two short rows.
    """
    config, model_class = case.config(), getattr(transformers, case.model_class)
    batch_size, length = case.size
    if tiny:
        dropout = {name: value for name, value in vars(config).items() if "drop" in name}
        config = tiny_config(type(config), case.model_class)
        for name, value in dropout.items():
            setattr(config, name, value)
        batch_size, length = min(batch_size, 2), 40
    elif hasattr(config, "initializer_range"):
        # Attention that is neither flat nor one-hot: losses then tell a wrong scale.
        config.initializer_range = (2 / config.hidden_size) ** 0.5
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if getattr(config, "is_encoder_decoder", False):
        config.decoder_start_token_id = 0  # T5's configuration has none of its own
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class._from_config(config, dtype=dtype, attn_implementation="eager")
    if case.checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in case.batch(config, batch_size, length).items()
    }
    return model.train(), batch


def _text(side: str | None = None, classes: int = 0):
    """Tokens and labels: the tokens themselves (of a decoder or of an encoder's guesses), or one class a row."""

    def batch(config, rows: int, length: int) -> dict:
        ids, mask = token_rows(config.vocab_size, rows, length), torch.ones(rows, length, dtype=torch.int64)
        if side:
            for row, kept in zip(mask, lengths_of(rows, length)):
                row[slice(0, length - kept) if side == "left" else slice(kept, length)] = 0
        labels = torch.arange(rows) % classes if classes else ids.masked_fill(mask == 0, IGNORED)
        # A mask that hides nothing is what trainers leave out or pass; the loss needs none.
        return {"input_ids": ids, "labels": labels} | ({"attention_mask": mask} if side else {})

    return batch


def _translation(decoder: int):
    def batch(config, rows: int, length: int) -> dict:
        source = _text("right")(config, rows, length)
        return {**source, "labels": token_rows(config.vocab_size, rows, min(decoder, length), seed=1)}

    return batch


def _images(config, rows: int, length: int) -> dict:
    pixels = noise_rows(rows, config.num_channels, config.image_size, config.image_size)
    return {"pixel_values": pixels, "labels": torch.arange(rows) % config.num_labels}


def _config(name: str, **fields) -> Callable[[], transformers.PretrainedConfig]:
    return lambda: getattr(transformers, name)(**fields)


def _decoder(name: str, layers: int, width: int, inner: int, heads: int, kv_heads: int, **more):
    return _config(
        name, num_hidden_layers=layers, hidden_size=width, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=kv_heads, **{"vocab_size": 128256, "max_position_embeddings": 32768, **more},
    )  # fmt: skip


_LLAMA_1B = _decoder("LlamaConfig", 16, 2048, 8192, 32, 8, tie_word_embeddings=True)
_BERT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_T5_LARGE = {"d_model": 1024, "d_ff": 4096, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 16, "d_kv": 64}
_VIT_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

CASES = [
    Case("train 1B B4 S4096", "LlamaForCausalLM", _LLAMA_1B, _text(), (4, 4096)),
    Case("train 1B B8 S2048 left-padded", "LlamaForCausalLM", _LLAMA_1B, _text("left"), (8, 2048)),
    Case("train 1B B1 S16384 checkpointed", "LlamaForCausalLM", _LLAMA_1B, _text(), (1, 16384), checkpointed=True),
    Case("train BERT-base B32 S512 padded dropout 0.1", "BertForMaskedLM", _config("BertConfig", **_BERT),
         _text("right"), (32, 512), dropout=True),
    Case("train BERT-base B32 S512 padded", "BertForMaskedLM",
         _config("BertConfig", **dict.fromkeys(_BERT, 0.0)), _text("right"), (32, 512)),
    Case("train 8B 4 layers B2 S4096", "LlamaForCausalLM",
         _decoder("LlamaConfig", 4, 4096, 14336, 32, 8, vocab_size=32000), _text(), (2, 4096)),
    Case("train Mistral-7B 4 layers B1 S16384 window 4096", "MistralForCausalLM",
         _decoder("MistralConfig", 4, 4096, 14336, 32, 8, vocab_size=32000, sliding_window=4096), _text(), (1, 16384)),
    Case("train gpt-oss-20b 4 layers 4 experts B1 S4096", "GptOssForCausalLM",
         _decoder("GptOssConfig", 4, 2880, 2880, 64, 8, head_dim=64, vocab_size=32000, num_local_experts=4,
                  num_experts_per_tok=2), _text(), (1, 4096)),
    Case("train T5-large 12:12 layers B16 S512:128 padded", "T5ForConditionalGeneration",
         _config("T5Config", dropout_rate=0.0, **_T5_LARGE), _translation(128), (16, 512)),
    Case("train ViT-large B64", "ViTForImageClassification", _config("ViTConfig", num_labels=1000, **_VIT_LARGE),
         _images, (64, 0)),
]  # fmt: skip
