"""Plan: which kernel serves a call, and how. With the little arithmetic that every family's choice shares."""

from typing import NamedTuple

from .problem import Problem

# Query tokens up to which a decode kernel's tiles, which hold those of a whole group of heads, are what pays.
MAX_DECODE_QUERIES = 16


class Plan(NamedTuple):
    """Which kernel runs a call, and how.

    Attributes:
        kernel: "flashcore_forward", "flashcore_decode", "flashcore_hopper", "flashcore_hopper_short",
            "flashcore_hopper_decode" or "torch".
        reason: one sentence: the rule that chose it.
        config: the family's own frozen type, None for "torch". All have `block_m` and `block_n`, the rows of a tile and
            the keys of a block, and `num_warps` and `num_stages` of the launch.
    """

    kernel: str
    reason: str
    config: tuple | None = None


def is_decode(problem: Problem) -> bool:
    """Whether a decode kernel is asked first: few queries, and no key range for each of them."""
    return problem.num_queries <= MAX_DECODE_QUERIES and problem.range_layout != "rows"


def why_not_decode(problem: Problem) -> str:
    """The rule by which a call is a prefill kernel's."""
    if problem.range_layout == "rows":
        return "a key range for each query"
    if is_decode(problem):
        return f"the portable decode kernel {'drops no weights' if problem.dropout else 'does not read fp8'}"
    return f"{problem.num_queries} query tokens, more than {MAX_DECODE_QUERIES}"


def why_decode(problem: Problem) -> str:
    """The rule by which a call is a decode kernel's."""
    return f"{problem.num_queries} query tokens, at most {MAX_DECODE_QUERIES}"


def power_of_2_from(size: int) -> int:
    """The power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def most_chunks(num_keys: int, min_chunk: int, max_chunks: int) -> int:
    """Into how many chunks a decode cuts the longest sequence within `num_keys` slots."""
    return min(-(-num_keys // min_chunk), max_chunks)
