"""The attention implementations that whole models are timed under, in turns; among them one that costs nothing."""

from collections.abc import Iterator

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

import flashcore_hf  # noqa: F401

# What the rows call them, and what Transformers does.
IMPLEMENTATIONS = {
    "flashcore": "flashcore",
    "sdpa": "sdpa",
    "flex": "flex_attention",
    "fa3": "flash_attention_3",
    "fa2": "flash_attention_2",
    "noop": "noop",
    "eager": "eager",
}


class _Zeros(torch.autograd.Function):
    """Zeros `[B, Q, H, Dv]`, and zero gradients: the projections around attention go on costing what they cost."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


def _noop(module, query, key, value, attention_mask=None, **kwargs) -> tuple[torch.Tensor, None]:
    """The bound: a model whose attention is free. Its outputs mean nothing."""
    return _Zeros.apply(query, key, value), None


def register_noop() -> None:
    """Make "noop" known to Transformers. It asks for no masks, so these are free too."""
    AttentionInterface.register("noop", _noop)
    AttentionMaskInterface.register("noop", lambda *args, **kwargs: None)


def switch(model: torch.nn.Module, name: str) -> None:
    """Put a model under one of IMPLEMENTATIONS.

    Raises: whatever Transformers or flashcore raise on a model that they do not serve under it.
    """
    wanted = IMPLEMENTATIONS[name]
    model.set_attn_implementation(wanted)
    # T5's halves have copies of its configuration, which before 5.24 keep the name that they had.
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation != wanted:
            part.set_attn_implementation(wanted)


def in_part(items: list, part: str) -> list:
    """The items of a part such as "2/3": every third one, beginning with the second."""
    number, parts = (int(word) for word in part.split("/"))
    if not 1 <= number <= parts:
        raise ValueError(f"part {part}: it is NUMBER/OF, from 1/{parts} to {parts}/{parts}")
    return items[number - 1 :: parts]


def named(names: list[str], wanted: list[str]) -> Iterator[bool]:
    """Whether each name has one of the wanted texts in it (all of them where nothing is wanted)."""
    for name in names:
        yield not wanted or any(text.lower() in name.lower() for text in wanted)


def short(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
