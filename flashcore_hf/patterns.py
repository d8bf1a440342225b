"""What Transformers' mask functions amount to, read from what they are made of.

A mask function of (batch, head, query, key) is a closure of a few known makers. Which one made it, and what it has
captured, says what it computes; a function of somebody else's, whatever its name, is unknown.
"""

import sys
from typing import NamedTuple

import torch

from .compat import masking_utils


class Pattern(NamedTuple):
    """A mask by distance alone: how far a query sees to each side, in keys (-1: no limit). It sees itself always."""

    left: int = -1
    right: int = -1

    def and_(self, other: "Pattern") -> "Pattern":
        """What both of two patterns see."""
        return Pattern(_nearer(self.left, other.left), _nearer(self.right, other.right))

    def or_(self, other: "Pattern") -> "Pattern":
        """What either of two patterns sees: both see the query itself, so no key between is missing."""
        return Pattern(_farther(self.left, other.left), _farther(self.right, other.right))


CAUSAL = Pattern(right=0)
EVERYTHING = Pattern()


def recognise(kwargs: dict) -> Pattern | None:
    """The Pattern that the request's mask function amounts to, or None where it is not one that we know."""
    function = kwargs.get("mask_function", masking_utils.causal_mask_function)
    known = _known_function(function)
    if known is not None:
        return known
    if torch.compiler.is_compiling():
        return _recognise_traced(function, kwargs)
    return pattern_of(function)


def maker_of(function) -> tuple[str, dict]:
    """(name of the function of Transformers that made this one, or "", and what it has captured by name)."""
    module = sys.modules.get(getattr(function, "__module__", ""))
    # functools.wraps copies names, and not what a function's own globals are.
    own = module is not None and getattr(function, "__globals__", None) is vars(module)
    if not own or not module.__name__.startswith("transformers.") or hasattr(function, "__wrapped__"):
        return "", {}
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    captured = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells))) if code and cells else {}
    return getattr(function, "__qualname__", "").partition(".")[0], captured


def pattern_of(function) -> Pattern | None:
    """`recognise` of a function, outside of torch.compile: unions and intersections of known parts are known."""
    known = _known_function(function)
    if known is not None:
        return known
    maker, captured = maker_of(function)
    if maker in ("and_masks", "or_masks"):
        parts = [pattern_of(part) for part in captured["mask_functions"]]
        if not parts or None in parts:
            return None
        pattern = parts[0]
        for part in parts[1:]:
            pattern = pattern.and_(part) if maker == "and_masks" else pattern.or_(part)
        return pattern
    if maker in ("sliding_window_overlay", "_bidirectional_window_overlay"):  # the latter of Gemma 3 as an embedder
        left = captured["sliding_window"] - 1
        if left < 0:
            return None  # not even the query itself, which no distance says (see row_ranges)
        return Pattern(left=left, right=-1 if maker == "sliding_window_overlay" else left)
    if maker == "sliding_window_bidirectional_overlay" and captured["sliding_window"] >= 0:
        return Pattern(left=captured["sliding_window"], right=captured["sliding_window"])
    if maker == "Gemma3TextModel" and function.__qualname__ == "Gemma3TextModel.forward.<locals>.<lambda>":
        return EVERYTHING if not captured else None  # the same: its full layers
    return None


def _known_function(function) -> Pattern | None:
    if function is masking_utils.causal_mask_function:
        return CAUSAL
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return EVERYTHING
    return None


def _recognise_traced(function, kwargs: dict) -> Pattern | None:
    """Under torch.compile closures cannot be read, but the request's other keywords tell a sliding window.

    Transformers says `use_vmap` where a user's function was mixed in, and packs only without a padding mask and cache.
    """
    window = getattr(kwargs.get("config"), "sliding_window", None)
    not_packed = kwargs.get("attention_mask") is not None or isinstance(kwargs.get("q_offset"), torch.Tensor)
    if (
        window is not None
        and window > 0
        and kwargs.get("local_size") == window != getattr(kwargs["config"], "attention_chunk_size", None)
        and kwargs.get("use_vmap") is False
        and not_packed
        and function.__qualname__ == "and_masks.<locals>.and_mask"
    ):
        # What is bidirectional, a decoder whose config says is_causal=False too, is asked for with this keyword.
        both_ways = "allow_is_bidirectional_skip" in kwargs
        return Pattern(left=window, right=window) if both_ways else Pattern(left=window - 1, right=0)
    return None


def _nearer(a: int, b: int) -> int:
    """The smaller of two distances, where -1 is without limit."""
    return max(a, b) if min(a, b) < 0 else min(a, b)


def _farther(a: int, b: int) -> int:
    """The larger of two distances, where -1 is without limit."""
    return -1 if min(a, b) < 0 else max(a, b)
