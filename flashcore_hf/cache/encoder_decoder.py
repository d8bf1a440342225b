"""A FlashCoreCache for each half of an encoder-decoder: the tokens so far, and what its encoder said of the source."""

from .flashcore_cache import FlashCoreCache  # first: it says so where Transformers is too old

# isort: split
from transformers.cache_utils import Cache, EncoderDecoderCache


class FlashCoreEncoderDecoderCache(EncoderDecoderCache):
    """Transformers' EncoderDecoderCache of two FlashCoreCaches.

    Keys and values of the source are computed at the first token, and only read from then on.

    Args:
        self_attention_cache: of the tokens so far.
        cross_attention_cache: of the source, in the model's dtype, for layers read it as it is stored.
    """

    def __init__(self, self_attention_cache: FlashCoreCache, cross_attention_cache: FlashCoreCache):
        super().__init__(self_attention_cache, cross_attention_cache)

    def check_dynamic_cache(self, method: str) -> None:
        """Let `crop` and the like by, as with DynamicCaches: ours have them too."""

    @property
    def unused(self) -> bool:
        """Whether a layer should have got tokens by now, and none has."""
        return self.self_attention_cache.unused


def halves(cache: Cache) -> tuple[Cache, FlashCoreCache | None]:
    """The cache of the tokens so far, and that of the source where there is one of ours."""
    if isinstance(cache, FlashCoreEncoderDecoderCache):
        return cache.self_attention_cache, cache.cross_attention_cache
    return cache, None
