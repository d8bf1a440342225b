"""What a case is: a model class at a size, workloads for it, and how it is built."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from sweep.configs import parts_of, tiny_config

Inputs = dict[str, torch.Tensor]


class Workload(NamedTuple):
    """What one model is given.

    Attributes:
        what: sizes and padding, as the case's name has them: "B64 S512 padded".
        batch: sequences or images.
        length: tokens of the longest sequence (0 where there is no text).
        inputs: (model, batch, length) -> keywords of forward. Row i is the same in every batch, so that two rows can be
            computed by eager and held against the same rows of a large batch. Floats are float32, on the CPU.
        tokens: 0 to time a forward; else so many tokens of generate().
    """

    what: str
    batch: int
    length: int
    inputs: Callable[[torch.nn.Module, int, int], Inputs]
    tokens: int = 0


class Entry(NamedTuple):
    """One model class at one size.

    Attributes:
        name: of the checkpoint whose shape it has; "8 of 32 layers" where it has fewer layers than that.
        group: "text", "vision", "audio", "seq2seq", "vision-language", "decoders".
        model_class: a name in transformers, or "module.Class" below transformers.models.
        config: makes the configuration.
        workloads: what it is given.
    """

    name: str
    group: str
    model_class: str
    config: Callable[[], transformers.PretrainedConfig]
    workloads: list[Workload]


def config_of(name: str, **fields) -> Callable[[], transformers.PretrainedConfig]:
    """A maker of the configuration class `name` with these fields; the rest are its defaults."""
    return lambda: getattr(transformers, name)(**fields)


def class_of(entry: Entry) -> type:
    """The model's class."""
    module, _, name = entry.model_class.rpartition(".")
    if not module:
        return getattr(transformers, name)
    return getattr(__import__(f"transformers.models.{module}", fromlist=[name]), name)


def build(entry: Entry, device: str, dtype: torch.dtype, tiny: bool = False) -> torch.nn.Module:
    """The model in eval mode under `eager`, its weights drawn on `device`.

    Weights are so large that attention is neither flat nor one-hot (initializer_range about sqrt(2 / hidden_size)): a
    wrong scale then changes the output.

    Args:
        tiny: two small layers of the same class, as the sweep over all classes has them.
    """
    model_class, config = class_of(entry), entry.config()
    if tiny:
        config = tiny_config(type(config), model_class.__name__)
        if hasattr(config, "mm_tokens_per_image"):
            config.mm_tokens_per_image = 4  # of 16 patches
    else:
        for part in (config, *parts_of(config)):
            width = getattr(part, "hidden_size", None)
            if hasattr(part, "initializer_range") and isinstance(width, int):
                part.initializer_range = (2 / width) ** 0.5
    for name in ("eos_token_id", "forced_eos_token_id"):
        for part in (config, *parts_of(config)):
            if hasattr(part, name):
                setattr(part, name, None)
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class._from_config(config, dtype=dtype, attn_implementation="eager").eval()
    # What a model makes by `torch.Tensor(size)` (Wav2Vec2's masked_spec_embed) does not hear of `torch.device`.
    model.to(device)
    if hasattr(model, "generation_config"):
        start = getattr(config, "decoder_start_token_id", None)
        model.generation_config = transformers.GenerationConfig(
            pad_token_id=0, bos_token_id=1, decoder_start_token_id=1 if start is None else start
        )
    return model.requires_grad_(False)
