"""What a forward of one token is called with: what changes from step to step, and what is always the same."""

from typing import NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutput

from .cache.encoder_decoder import halves
from .cache.flashcore_cache import FlashCoreCache
from .compat import CACHE_NAMES
from .hooks import caches
from .models import unread_in_steps


class Names(NamedTuple):
    """What a model calls its tokens, the 2-D mask of the tokens so far, and other inputs that change each step."""

    tokens: str
    mask: str
    others: tuple[str, ...]


DECODER = Names(
    "input_ids", "attention_mask", ("position_ids", "cache_position", "token_type_ids", "mm_token_type_ids")
)
# Here `attention_mask` is that of the source.
ENCODER_DECODER = Names(
    "decoder_input_ids", "decoder_attention_mask", ("attention_mask", "decoder_position_ids", "cache_position")
)


class Step(NamedTuple):
    """A call of one token that a graph can serve.

    Attributes:
        names: of its inputs.
        cache_name, whole_cache: the cache as the call has it.
        cache: of the tokens so far.
        source: an encoder-decoder's cache of the source, or None.
        encoder: what its encoder returned, or None.
        inputs: the changing inputs, by name; the mask is `[B, about length + 1]`.
        constants: all other arguments.
    """

    names: Names
    cache_name: str
    whole_cache: object
    cache: FlashCoreCache
    source: FlashCoreCache | None
    encoder: BaseModelOutput | None
    inputs: dict[str, torch.Tensor]
    constants: dict

    @property
    def source_length(self) -> int:
        """Positions of the source."""
        return 0 if self.encoder is None else self.encoder.last_hidden_state.shape[1]


def cache_name_in(kwargs: dict) -> str | None:
    """What a call names its cache, or None where it has none."""
    return next((name for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def unknown_cache_in(kwargs: dict) -> str | None:
    """The name of a cache that is under none of the names that we know, or None."""
    return next(iter(caches(kwargs)), None)


def read_step(kwargs: dict, cache_name: str, names: Names, model_type: str) -> Step | str:
    """The step that a call of one token is, or why it cannot be recorded."""
    whole_cache = kwargs[cache_name]
    cache, source = halves(whole_cache)
    is_pair = names is ENCODER_DECODER
    if not isinstance(cache, FlashCoreCache) or (source is None) == is_pair:
        return (
            f"the cache is a {type(whole_cache).__name__}; graphs need a "
            + ("FlashCoreEncoderDecoderCache" if is_pair else "FlashCoreCache")
        )  # fmt: skip
    if not cache.ours or (is_pair and not source.ours):
        return "the model has layers that are not plain attention"
    filled = cache.filled_layers
    if any(layer.length != filled[0].length for layer in filled):
        return "the cache's layers hold different numbers of tokens"
    mask = kwargs.get(names.mask)
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        return f"{names.mask} is not a 2-D mask of the tokens so far"
    encoder, inputs, constants = None, {}, {}
    unread = unread_in_steps(model_type, kwargs)
    changing = (names.tokens, names.mask, *names.others)
    for name, value in kwargs.items():
        if name == cache_name or name in unread:
            continue
        if name in changing and value is not None:
            inputs[name] = value
        elif name == "encoder_outputs" and is_pair and value is not None:
            encoder = _encoder_of(value)
        elif isinstance(value, (bool, int, float, str, type(None))):
            constants[name] = value
        else:
            return f"the argument {name} is a {type(value).__name__}, which may change from step to step"
    if is_pair and (encoder is None or not source.filled_layers):
        return "the call has no encoder_outputs of a source that its cache knows, and would run the encoder anew"
    return Step(names, cache_name, whole_cache, cache, source, encoder, inputs, constants)


def _encoder_of(outputs) -> BaseModelOutput | None:
    """What an encoder returned, in one form."""
    if isinstance(outputs, BaseModelOutput) and outputs.last_hidden_state is not None:
        return outputs
    states = outputs[0] if isinstance(outputs, (tuple, list)) or hasattr(outputs, "to_tuple") else None
    if not isinstance(states, torch.Tensor) or states.dim() != 3:
        return None
    return BaseModelOutput(last_hidden_state=states)
