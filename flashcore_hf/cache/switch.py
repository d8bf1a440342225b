"""The line that has `generate()` make our caches, and what it makes of Transformers' ones."""

from functools import partial

from ..hooks import on_new_cache, owner
from .encoder_decoder import FlashCoreEncoderDecoderCache
from .flashcore_cache import FlashCoreCache

# isort: split
import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache


def use_flashcore_cache(
    model, enabled: bool = True, *, max_length: int | None = None, dtype: torch.dtype | None = None
):
    """Let `model.generate()` make a FlashCoreCache wherever it would have made a DynamicCache.

    Encoder-decoders get two, in a FlashCoreEncoderDecoderCache; `max_length` and `dtype` are the first one's, that of
    the tokens which are written. Before Transformers 5.17 they keep theirs.

    Args:
        model: with Transformers' generate(), or a wrapper around one such as PEFT's. Only this object is changed.
        enabled: False puts the model back as it was.
        max_length, dtype: of `FlashCoreCache`.

    Returns:
        the model.

    Raises:
        ValueError: there is no generate(), or one that makes its cache in a way of its own.
        RuntimeError: Transformers has nothing of the name that this hooks into. `generate()` raises it where
            Transformers no longer comes by, or does not use the cache.
    """
    on_new_cache(owner(model), "cache", partial(converted, max_length=max_length, dtype=dtype) if enabled else None)
    return model


def converted(
    cache: Cache, batch_size: int | None = None, max_length: int | None = None, dtype: torch.dtype | None = None
) -> Cache:
    """Ours in place of an empty DynamicCache, or of an EncoderDecoderCache of two; anything else as it is."""
    if type(cache) is EncoderDecoderCache:
        halves = cache.self_attention_cache, cache.cross_attention_cache
        own, cross = _like_empty(halves[0], max_length, dtype), _like_empty(halves[1])
        return cache if own is halves[0] or cross is halves[1] else FlashCoreEncoderDecoderCache(own, cross)
    return _like_empty(cache, max_length, dtype)


def _like_empty(cache: Cache, max_length: int | None = None, dtype: torch.dtype | None = None) -> Cache:
    if type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0:
        return FlashCoreCache.like(cache, max_length=max_length, dtype=dtype)
    return cache
