"""flashcore_kernels: cached, grouped-query, causal attention in Triton. Knows nothing of Transformers."""

from .cache.kv_cache import KVCache, attention_with_kv_cache
from .cache.kv_write import write_kv
from .fallback import FlashcoreFallbackWarning
from .key_range import make_key_range, make_row_ranges
from .naive import naive_attention
from .op import attention, explain, path_counts

__all__ = [
    "FlashcoreFallbackWarning",
    "KVCache",
    "attention",
    "attention_with_kv_cache",
    "explain",
    "make_key_range",
    "make_row_ranges",
    "naive_attention",
    "path_counts",
    "write_kv",
]
