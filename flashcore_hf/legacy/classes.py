"""The classes that stand in for those of LLaMA, Mistral and Qwen2 on Transformers 4.40 to 4.52.

Each is derived from the class of the very module that it is put on, so everything but attention and its mask stays the
model's own: projections, rotary embedding, caches, loss. What differs between versions:

    4.40 - 4.47   `LlamaSdpaAttention` and its kind do everything in one forward: `_ClassAttention` has another.
    4.48 - 4.52   `LlamaAttention` asks a registry of attention functions for the name in its configuration:
                  `_RegistryAttention` has a configuration of its own, with our name in it.
    4.40, 4.41    Mistral and Qwen2 make their mask in the middle of the decoder's forward.
    LLaMA, 4.42 + ... in a method of the decoder: `_MaskInMethod`. For a static cache, generate() makes it ahead of the
                  forward: by another method of the decoder from 4.46 on, in the head of LLaMA and Qwen2 in 4.44, 4.45.

Wherever the mask is made, a KeyRange takes its place that says the same. Caches that it cannot be made for (those that
drop keys), and masks that are 4-D already, go through the model's own code and become a dense mask.
"""

import copy
import functools
import importlib
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from flashcore_kernels import UNLIMITED, make_key_range
from transformers import DynamicCache, StaticCache, cache_utils

from .. import compat
from ..attention import flashcore_attention
from ..models import NAME

_SLIDING_CACHES = getattr(cache_utils, "SlidingWindowCache", ())


class Family(NamedTuple):
    """The classes of one model type in this version of Transformers.

    Attributes:
        model_type: as in its configuration.
        attentions: the attention classes that can be replaced.
        decoder: the model without a head; its `layers` have the attention.
        head: the causal language model, which prepares generate()'s inputs.
    """

    model_type: str
    attentions: tuple[type, ...]
    decoder: type
    head: type


@functools.cache
def family(model_type: str) -> Family:
    """The Family of "llama", "mistral" or "qwen2"."""
    modeling = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    prefix = model_type.capitalize()
    attentions = (getattr(modeling, f"{prefix}{kind}", None) for kind in ("Attention", "SdpaAttention"))
    return Family(
        model_type,
        tuple(kind for kind in attentions if kind is not None),
        getattr(modeling, f"{prefix}Model"),
        getattr(modeling, f"{prefix}ForCausalLM"),
    )


class _StandIn:
    """Marks a class that stands in for another, `original`, on modules of a model of type `model_type`."""

    original: type
    model_type: str

    def enter(self) -> None:
        """Add to the instance what its new class needs."""

    def leave(self) -> None:
        """Take away what `enter` added."""

    def __reduce_ex__(self, protocol: int):
        # A class that is made while running cannot be pickled by its name.
        return _empty_stand_in, (self.original, self.model_type), vars(self)


def _empty_stand_in(original: type, model_type: str) -> torch.nn.Module:
    kind = _stand_in(original, model_type)
    return kind.__new__(kind)


def is_stand_in(module: torch.nn.Module) -> bool:
    """Whether `module` has a class of this file."""
    return isinstance(module, _StandIn)


def original_class(module: torch.nn.Module) -> type:
    """The class of `module`, or the one that it had before a class of this file took its place."""
    return module.original if is_stand_in(module) else type(module)


def replace_class(module: torch.nn.Module, model_type: str) -> None:
    """Put the class of this file in place of that of `module`: attention, decoder or head of a known family."""
    _become(module, _stand_in(type(module), model_type))
    module.enter()


def restore_class(module: torch.nn.Module) -> None:
    """Undo `replace_class`."""
    module.leave()
    _become(module, module.original)


def _become(module: torch.nn.Module, kind: type) -> None:
    before = type(module).forward
    module.__class__ = kind
    # accelerate's hooks keep the class's forward, bound, on the instance, and call that.
    for name in ("forward", "_old_forward"):
        if getattr(vars(module).get(name), "__func__", None) is before:
            vars(module)[name] = MethodType(kind.forward, module)


@functools.cache
def _stand_in(original: type, model_type: str) -> type:
    """The class that takes the place of `original`. Decoders and heads keep their name, which is saved with a model."""
    members: dict[str, Any] = {"original": original, "model_type": model_type, "__module__": __name__}
    known = family(model_type)
    if original is known.head:
        mixin, name = _StandIn, original.__name__
        make_mask = "_prepare_4d_causal_attention_mask_with_cache_position"
        prepare = getattr(original, "prepare_inputs_for_generation", None)
        if make_mask in getattr(getattr(prepare, "__code__", None), "co_names", ()):
            members[prepare.__name__] = _with_globals(prepare, **{make_mask: _static_range})
    elif original is known.decoder:
        mixin, name = _MaskInMethod, original.__name__
        if not hasattr(original, "_update_causal_mask"):
            mixin = _StandIn
            makers = ("_prepare_4d_causal_attention_mask", "_prepare_4d_causal_attention_mask_for_sdpa")
            instead = {maker: _range_instead_of(original.forward.__globals__[maker]) for maker in makers}
            members["forward"] = _with_globals(original.forward, **instead)
    else:
        name = f"Flashcore{original.__name__}"
        if compat.attention_registry() is not None:
            mixin = _RegistryAttention
        else:
            mixin = _ClassAttention
            modeling = importlib.import_module(original.__module__)
            rotary = getattr(modeling, f"{model_type.capitalize()}RotaryEmbedding")
            members["apply_rotary"] = staticmethod(modeling.apply_rotary_pos_emb)
            members["rotates_by_length"] = "seq_len" in inspect.signature(rotary.forward).parameters
    return type(name, (mixin, original), members)


def _with_globals(function: Callable, **names: Callable) -> Callable:
    """The same function with some of the global names in it bound to something else."""
    missing = [name for name in names if name not in function.__code__.co_names]
    if missing:
        raise NotImplementedError(f"{function.__qualname__} of this Transformers does not call {', '.join(missing)}")
    changed = FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    changed.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(changed, function)


class _ClassAttention(_StandIn):
    """Attention of 4.40 to 4.47: the steps of the version's own, around our attention function."""

    apply_rotary: Callable
    rotates_by_length: bool

    def enter(self) -> None:
        self.scaling = self.head_dim**-0.5

    def leave(self) -> None:
        del self.scaling

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_value=None,
        output_attentions: bool = False,
        use_cache: bool = False,
        cache_position: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        """As in the class that this stands in for: `[B, Q, hidden]`, the weights or None, and the cache."""
        batch_size, num_queries, _ = hidden_states.shape
        shape = (batch_size, num_queries, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)  # [B, H, Q, D]
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)  # [B, Hkv, Q, D]
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)

        # In 4.40 a static cache of LLaMA is not handed in: it hangs on the layer.
        own_cache = getattr(self, "past_key_value", None)
        past_key_value = past_key_value if own_cache is None else own_cache
        if position_embeddings is not None:
            cos, sin = position_embeddings
            query, key = self.apply_rotary(query, key, cos, sin)
        elif self.rotates_by_length:
            length = num_queries
            if past_key_value is not None:
                length += past_key_value.get_usable_length(num_queries, self.layer_idx)
            cos, sin = self.rotary_emb(value, seq_len=length)
            query, key = self.apply_rotary(query, key, cos, sin, position_ids)
        else:
            cos, sin = self.rotary_emb(value, position_ids)
            query, key = self.apply_rotary(query, key, cos, sin)
        if past_key_value is not None:
            arguments = {"sin": sin, "cos": cos, "cache_position": cache_position}
            key, value = past_key_value.update(key, value, self.layer_idx, arguments)  # [B, Hkv, K, D]

        output, weights = flashcore_attention(
            self, query, key, value, attention_mask, scaling=self.scaling, output_attentions=output_attentions,
            dropout=self.attention_dropout if self.training else 0.0, **kwargs,
        )  # fmt: skip
        return self.o_proj(output.reshape(batch_size, num_queries, -1)), weights, past_key_value


class _RegistryAttention(_StandIn):
    """Attention of 4.48 to 4.52: its own forward, which finds our function under the name in its configuration."""

    def enter(self) -> None:
        # The model's own configuration is shared: with the mask's code, and perhaps with other models.
        self.shared_config = self.config
        self.config = copy.copy(self.config)
        self.config._attn_implementation_internal = NAME

    def leave(self) -> None:
        self.config = self.shared_config
        del self.shared_config


class _MaskInMethod(_StandIn):
    """A decoder that asks its own `_update_causal_mask` for the mask of all its layers."""

    def _update_causal_mask(self, attention_mask, input_tensor, cache_position, past, *args, **kwargs):
        """A KeyRange where it can say the mask, else what the model's own method gives.

        Args:
            attention_mask: `[B, length]`, 1 where a token is; or 4-D: a user's own, or what generate() made below.
            input_tensor: `[B, Q, hidden]`.
            cache_position: `[Q]`, key slot at which each query stands.
            past: the cache or None; in LLaMA of 4.40 the number of tokens in it.
        """
        if attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2):
            batch_size, num_queries = input_tensor.shape[:2]
            num_keys, fixed = _key_slots(self, past, num_queries, attention_mask)
            if num_keys is not None:
                return _key_range(
                    attention_mask, batch_size, num_keys, cache_position, _left(self.model_type, self.config), fixed
                )
        elif getattr(attention_mask, "dtype", None) == torch.int32:
            return attention_mask
        return super()._update_causal_mask(attention_mask, input_tensor, cache_position, past, *args, **kwargs)

    def _prepare_4d_causal_attention_mask_with_cache_position(self, attention_mask, *args, **kwargs):
        """What generate() calls ahead of the forward with a static cache, so that the mask's shape never changes."""
        static = _is_plain_static(kwargs.get("past_key_values"))
        if not static or attention_mask is None or attention_mask.dim() != 2:
            return super()._prepare_4d_causal_attention_mask_with_cache_position(attention_mask, *args, **kwargs)
        return _static_range(attention_mask, left=_left(self.model_type, self.config), **kwargs)


def _static_range(
    attention_mask: torch.Tensor,
    *,
    target_length: int,
    cache_position: torch.Tensor,
    batch_size: int,
    left: int = UNLIMITED,
    **_,
) -> torch.Tensor:
    """The KeyRange for a static cache of `target_length` slots. (Where `left` is not given, no mask has a window.)"""
    return _key_range(attention_mask, batch_size, target_length, cache_position, left, True)


def _range_instead_of(make_mask: Callable) -> Callable:
    """What Mistral and Qwen2 of 4.40 and 4.41 call in their forward in place of `make_mask`."""

    def make_range(attention_mask, input_shape, inputs_embeds, past_key_values_length, sliding_window=None):
        if attention_mask is not None and attention_mask.dim() != 2:
            return make_mask(attention_mask, input_shape, inputs_embeds, past_key_values_length, sliding_window)
        batch_size, num_queries = input_shape
        end = past_key_values_length + num_queries
        position = torch.arange(past_key_values_length, end, device=inputs_embeds.device)
        # In these versions a query sees as many keys before itself as the window says.
        left = UNLIMITED if sliding_window is None else sliding_window
        return _key_range(attention_mask, batch_size, end, position, left, False)

    return make_range


def _key_range(
    attention_mask: torch.Tensor | None,
    batch_size: int,
    num_keys: int,
    cache_position: torch.Tensor,
    left: int,
    fixed: bool,
) -> torch.Tensor:
    """The causal KeyRange of queries that stand at `cache_position` `[Q]`, in rising order.

    Args:
        attention_mask: `[B, length]`, 1 where a token is, or None.
        left: how far back a query sees.
        fixed: the key slots are those of a static cache, and the slots behind the last query are not filled yet.
    """
    key_mask = None
    if attention_mask is not None:
        missing = num_keys - attention_mask.shape[1]
        if missing > 0 and not fixed:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, and with those in the cache there are "
                f"{num_keys} keys: it needs a column for each token so far"
            )
        key_mask = attention_mask[:, :num_keys].to(torch.bool)
        key_mask = torch.nn.functional.pad(key_mask, (0, max(missing, 0)), value=True)
    end = (cache_position[-1:] + 1).clamp(max=num_keys)
    return make_key_range(
        batch_size, num_keys, end=end, query_start=cache_position[:1], left=left, right=0, key_mask=key_mask,
        device=cache_position.device,
    )  # fmt: skip


def _key_slots(decoder, past, num_queries: int, attention_mask: torch.Tensor | None) -> tuple[int | None, bool]:
    """How many key slots attention will see, None where that is not known, and whether they are a static cache's."""
    if past is None:
        return num_queries, False
    if isinstance(past, int):
        static = getattr(decoder.layers[0].self_attn, "past_key_value", None)
        if static is not None:
            return static.max_cache_len, True
        return (past + num_queries if attention_mask is None else attention_mask.shape[1]), False
    if _is_plain_static(past):
        return past.max_cache_len, True
    # A class of somebody else's may drop keys.
    if isinstance(past, DynamicCache) and type(past).__module__.startswith("transformers."):
        return past.get_seq_length() + num_queries, False
    return None, False


def _is_plain_static(past) -> bool:
    """Whether key slot i of this cache holds token i, for good."""
    return (
        isinstance(past, StaticCache)
        and not isinstance(past, _SLIDING_CACHES)
        and type(past).__module__.startswith("transformers.")
    )


def _left(model_type: str, config) -> int:
    """How many keys before itself a query sees in the masks of this model in this version; -1: all.

    Qwen2's window is left to FlashAttention alone in some versions, and `use_sliding_window` is not asked in others.
    """
    window = getattr(config, "sliding_window", None)
    if model_type == "llama" or window is None:
        return UNLIMITED
    if model_type == "qwen2":
        if compat.VERSION < (4, 46) or compat.VERSION == (4, 48):
            return UNLIMITED
        if compat.VERSION >= (4, 52) and not config.use_sliding_window:
            return UNLIMITED
    return window - 1
