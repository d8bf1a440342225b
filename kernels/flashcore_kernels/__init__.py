"""flashcore_kernels: cached, grouped-query, causal attention in Triton. Knows nothing of Transformers."""

from .cache.kv_cache import KVCache, attention_with_kv_cache
from .cache.kv_write import write_kv
from .cache.paged import Pages, paged_attention, write_pages
from .counting import count_path, path_counts
from .device import device_of, nobody_listens
from .document_ranges import make_document_ranges
from .fallback import FlashcoreFallbackWarning, note_fallback, torch_attention
from .key_range import UNLIMITED, layout_of, make_key_range, make_row_ranges, visible
from .naive import naive_attention
from .op import attend, attention, explain
from .portable.interpreter_pace import interpreter_pace
from .precompile import Ahead, Prompt, begin_compiling, steps_follow
from .problem import Inputs, check_problem
from .runtime.workspace import replayed_in_order
from .step_key_range import make_step_key_range
from .version import __version__

__all__ = [
    "__version__",
    "FlashcoreFallbackWarning",
    "KVCache",
    "Pages",
    "attention",
    "attention_with_kv_cache",
    "explain",
    "make_document_ranges",
    "make_key_range",
    "make_row_ranges",
    "naive_attention",
    "paged_attention",
    "path_counts",
    "write_kv",
    "write_pages",
    # What adapters use beside these: the public names' insides, which may change with any release.
    "Ahead",
    "Inputs",
    "Prompt",
    "UNLIMITED",
    "attend",
    "begin_compiling",
    "check_problem",
    "count_path",
    "device_of",
    "interpreter_pace",
    "layout_of",
    "make_step_key_range",
    "nobody_listens",
    "note_fallback",
    "replayed_in_order",
    "steps_follow",
    "torch_attention",
    "visible",
]
