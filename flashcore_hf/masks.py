"""The function that Transformers calls once a forward: what may attend to what, as a KeyRange where that can say it.

Transformers describes a mask by a function of (batch, head, query, key) made of a few known parts. `Pattern` is what
the parts that we know amount to; anything else becomes the dense bool mask that `sdpa` would get, always right.
"""

import functools
import inspect
import sys
from typing import NamedTuple

import torch
from flashcore_kernels import make_key_range, make_row_ranges
from flashcore_kernels.key_range import make_step_key_range

from .compat import MaskCall, mask_call, masking_utils

# Models that hand the mask from the mask function to the attention function as it is. Others may read or slice it,
# and get a dense mask. Every entry was run beside eager by scripts/sweep_architectures.py, and its code read for uses
# of the mask in Transformers 4.53 to 5.24.
KEY_RANGE_MODELS = frozenset(
    (
        "afmoe apertus apertus1p5_text arcee aria_text axk1 bailing_hybrid bamba bitnet codegen cohere cohere2 "
        "cohere2_moe cwm dbrx deepseek_v2 deepseek_v3 dory dots1 emu3_text_model ernie4_5 ernie4_5_moe exaone4 "
        "exaone_moe falcon_h1 flex_olmo flint fuyu gemma gemma2 gemma3_text gemma3n_text gemma4_text "
        "gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt_neox gpt_oss gptj granite granite_swa granitemoe "
        "granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax "
        "inkling2_text inkling_text jais2 jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama "
        "longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mistral4 mixtral "
        "modernbert-decoder nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe persimmon phi phi3 phimoe "
        "qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 solar_open "
        "stablelm starcoder2 vaultgemma youtu zamba2 zaya"
    ).split()
)

# Models that add the mask to scores, or terms to the mask, in code of their own, and so need eager's additive one.
ADDITIVE_MASK_MODELS = frozenset({"bigbird_pegasus", "deepseek_v4", "informer"})

# Models whose masks have the wrong length (up to 5.22; Informer's between its layers) and only work because eager
# leaves out what hides nothing; None then means that everything is seen (see attention._NOT_CAUSAL).
MAYBE_NO_MASK_MODELS = frozenset({"bridgetower", "bridgetower_text_model", "informer"})


class Pattern(NamedTuple):
    """A mask that ranges can say: distances to each side (-1: no limit), and packed documents.

    Attributes:
        left, right: how far a query sees, in keys.
        documents: int `[B, Q]`, which document each token belongs to, or None. Tokens see their own document only.
    """

    left: int = -1
    right: int = -1
    documents: torch.Tensor | None = None

    def and_(self, other: "Pattern") -> "Pattern":
        """Both of two patterns."""
        return Pattern(
            _nearer(self.left, other.left),
            _nearer(self.right, other.right),
            self.documents if other.documents is None else other.documents,
        )


CAUSAL = Pattern(right=0)
EVERYTHING = Pattern()


def flashcore_mask(**kwargs) -> torch.Tensor:
    """Answer Transformers' mask request: a KeyRange (int32) where it can say the mask, else a dense bool mask.

    Never None, but for MAYBE_NO_MASK_MODELS: to the attention function that would mean "no mask" or "causal", depending
    on who asks.

    Args: Transformers' own, by keyword (see `compat.mask_call`).

    Returns:
        int32 `[B, 1, 1, W]` or `[B, 1, Q, 2]` (see flashcore_kernels.key_range), or bool `[B, 1, Q, K]`, or for a few
        models the same in floating point, 0 and the lowest number.
    """
    pattern = recognise(kwargs) if takes_key_range(kwargs.get("config")) else None
    call = mask_call(kwargs)
    if pattern is not None and pattern.documents is not None:
        ranges = _packed_ranges(call, pattern)
        if ranges is not None:
            return ranges
    elif pattern is not None:
        make = make_step_key_range if call.num_queries == 1 else make_key_range
        return make(
            call.batch_size, call.num_keys, query_start=call.query_start, left=pattern.left, right=pattern.right,
            key_mask=call.key_mask, device=call.device,
        )  # fmt: skip
    model_type = getattr(kwargs.get("config"), "model_type", None)
    whole = {**kwargs, "allow_is_causal_skip": False}
    if model_type not in MAYBE_NO_MASK_MODELS:
        whole["allow_is_bidirectional_skip"] = False
    if model_type in ADDITIVE_MASK_MODELS or (model_type == "gemma4_audio" and _gemma4_audio_adds()):
        return masking_utils.eager_mask(**whole)
    return masking_utils.sdpa_mask(**whole)


@functools.cache
def _gemma4_audio_adds() -> bool:
    """Whether this Transformers' Gemma 4 hears with an additive mask; 5.17 still negates a bool one."""
    return "finfo(mask_4d.dtype)" in inspect.getsource(sys.modules["transformers.models.gemma4.modeling_gemma4"])


def takes_key_range(config) -> bool:
    """Whether this model hands masks on unread: it is one of Transformers' own, and of a type that we know."""
    return type(config).__module__.startswith("transformers.") and config.model_type in KEY_RANGE_MODELS


def _packed_ranges(call: MaskCall, pattern: Pattern) -> torch.Tensor | None:
    """A range for each query of packed rows, or None where Q != K (Transformers packs only without a cache)."""
    documents = pattern.documents
    if call.num_queries != call.num_keys or call.key_mask is not None:
        return None
    # Documents are numbered in order, so the first and last token of one are found by counting smaller numbers.
    documents = documents.expand(call.batch_size, -1).contiguous()
    first = torch.searchsorted(documents, documents, right=False)  # [B, Q]
    end = torch.searchsorted(documents, documents, right=True)
    slot = torch.arange(call.num_queries, device=documents.device)
    if pattern.left >= 0:
        first = torch.maximum(first, slot - pattern.left)
    if pattern.right >= 0:
        end = torch.minimum(end, slot + pattern.right + 1)
    return make_row_ranges(first, end, call.num_keys)


def recognise(kwargs: dict) -> Pattern | None:
    """The Pattern that the request's mask function amounts to, or None where it is not one that we know."""
    function = kwargs.get("mask_function", masking_utils.causal_mask_function)
    known = _known_function(function)
    if known is not None:
        return known
    if torch.compiler.is_compiling():
        return _recognise_traced(function, kwargs)
    return _recognise_parts(function)


def _known_function(function) -> Pattern | None:
    if function is masking_utils.causal_mask_function:
        return CAUSAL
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return EVERYTHING
    return None


def _recognise_parts(function) -> Pattern | None:
    """Read a mask function's closure: an intersection of known parts is known."""
    known = _known_function(function)
    if known is not None:
        return known
    cells = _closure(function)
    made_by = getattr(function, "__qualname__", "").partition(".")[0]
    if made_by == "and_masks":
        pattern = EVERYTHING
        for part in cells["mask_functions"]:
            part = _recognise_parts(part)
            if part is None:
                return None
            pattern = pattern.and_(part)
        return pattern
    if made_by == "sliding_window_overlay":
        return Pattern(left=cells["sliding_window"] - 1)
    if made_by == "sliding_window_bidirectional_overlay":
        return Pattern(left=cells["sliding_window"], right=cells["sliding_window"])
    if made_by == "packed_sequence_mask_function":
        return Pattern(documents=cells["packed_sequence_mask"])
    if made_by == "remap_positions_for_packed_sequence":
        # Within a document positions rise by one, so distances in positions are distances in slots.
        return _recognise_parts(cells["mask_function"])
    return None


def _recognise_traced(function, kwargs: dict) -> Pattern | None:
    """Under torch.compile closures cannot be read, but the request's other keywords tell a sliding window.

    Transformers says `use_vmap` where a user's function was mixed in, and packs only without a padding mask and cache.
    """
    window = getattr(kwargs.get("config"), "sliding_window", None)
    not_packed = kwargs.get("attention_mask") is not None or isinstance(kwargs.get("q_offset"), torch.Tensor)
    if (
        window is not None
        and kwargs.get("local_size") == window
        and kwargs.get("use_vmap") is False
        and not_packed
        and function.__qualname__ == "and_masks.<locals>.and_mask"
    ):
        return Pattern(left=window - 1, right=0)
    return None


def _closure(function) -> dict:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in cells))) if code and cells else {}


def _nearer(a: int, b: int) -> int:
    """The smaller of two distances, where -1 is without limit."""
    return max(a, b) if min(a, b) < 0 else min(a, b)
