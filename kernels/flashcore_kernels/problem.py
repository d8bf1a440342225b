"""Problem: what one attention call asks, checked. Every ValueError about arguments is raised here, before a launch."""

import math
from typing import NamedTuple

import torch

from .key_range import FARTHEST, UNLIMITED, layout_of

Window = int | tuple[int, int] | None

LOG2_E = 1.4426950408889634


class Inputs(NamedTuple):
    """The tensors of one attention call: the one record in which they travel.

    Attributes:
        query: `[B, H, Q, D]`.
        key, value: `[B, Hkv, K, D]` and `[B, Hkv, K, Dv]`.
        key_range: a KeyRange (see key_range.py), or None.
        mask: bool or floating point, broadcastable to `[B, H, Q, K]`, or None.
        sinks: logits `[H]`, or None.
        key_scale, value_scale: float32 `[B, Hkv]` for key and value in float8_e4m3fn, else None.
        philox: int64 `[2]`, seed and offset of the numbers by which weights are dropped, where the call has dropout.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_range: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    philox: torch.Tensor | None = None


def split_arguments(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments) -> tuple[Inputs, dict]:
    """(tensors, options) of a call with the keywords of `flashcore_kernels.attention`."""
    tensors = {name: arguments.pop(name) for name in Inputs._fields if name in arguments}
    return Inputs(query, key, value, **tensors), arguments


class Problem(NamedTuple):
    """What one call asks, as plain values: enough to choose a kernel, and nothing that needs a GPU.

    Attributes:
        batch_size, num_heads, num_kv_heads, num_queries, num_keys: B, H, Hkv, Q, K.
        head_dim, value_dim: D of query and key, Dv of value and output.
        dtype, device_type: of query, key and value (in fp8 the dtype of query alone).
        range_layout: None, "sequence" or "rows" (see key_range.py).
        mask_kind: None, "bool" or "float".
        scale: factor on the scores before softcap and softmax.
        softcap: c in c * tanh(score / c), 0.0 for none.
        left, right: visible distance in keys to each side of where a query stands, -1 for no limit.
        query_start: key slot at which query 0 stands (K - Q: the queries are the last tokens).
        has_sinks: whether each head has a sink logit in its softmax's denominator.
        aligned: whether the rows of query, key and value all start at multiples of 16 bytes. Addresses exist only once
            a call runs, so `check_problem` leaves it False, and `with_alignment` looks.
        fp8: whether key and value are float8_e4m3fn, with a scale for each sequence and KV head.
        dropout: the probability with which a weight is dropped after the softmax; those that stay are divided by
            1 - dropout.
        mask_bits: of an element of the mask, 0 without one.
        mask_rows: whether the mask differs from query to query.
    """

    batch_size: int
    num_heads: int
    num_kv_heads: int
    num_queries: int
    num_keys: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device_type: str
    range_layout: str | None
    mask_kind: str | None
    scale: float
    softcap: float
    left: int
    right: int
    query_start: int
    has_sinks: bool
    aligned: bool = False
    fp8: bool = False
    dropout: float = 0.0
    mask_bits: int = 0
    mask_rows: bool = False

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def score_factors(self) -> tuple[float, float, float]:
        """(score_scale, cap_scale, one) for the kernels: factors that leave the scores in units of log2."""
        if self.softcap:
            return self.scale / self.softcap, self.softcap * LOG2_E, 1.0
        return self.scale * LOG2_E, 0.0, 1.0


def _fail(what: str, got, accepted: str):
    raise ValueError(f"{what}: got {got}; {accepted}")


def check_problem(
    inputs: Inputs,
    is_causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Problem:
    """Check the arguments of an attention call and say in a Problem what they ask.

    Args: as `flashcore_kernels.attention`.

    Raises:
        ValueError: names the argument, what it was, and what is accepted.
    """
    query, key, value, key_range, mask, sinks, key_scale, value_scale, _ = inputs
    batch_size, num_heads, num_queries, head_dim = _check_shapes(query, key, value)
    num_kv_heads, num_keys = key.shape[1], key.shape[2]
    fp8 = key_scale is not None or value_scale is not None or torch.float8_e4m3fn in (key.dtype, value.dtype)
    if fp8:
        _check_fp8(query, key, value, key_scale, value_scale)
    else:
        _check_same("dtype", query.dtype, key.dtype, value.dtype)
    _check_same("device", query.device, key.device, value.device)
    if not query.dtype.is_floating_point:
        _fail("query dtype", query.dtype, "a floating-point dtype is needed")

    left, right = _check_window(window, is_causal)
    range_layout = None
    if key_range is not None:
        if is_causal or window is not None:
            _fail(
                "key_range with is_causal or window",
                f"is_causal={is_causal}, window={window}",
                "a KeyRange already says what each query sees: give one or the other",
            )
        _check_device("key_range", key_range, query)
        range_layout = layout_of(key_range, batch_size, num_queries, num_keys)
        if key_range.stride(3) != 1:
            _fail("stride of key_range's words", key_range.stride(3), "1 is needed, call .contiguous()")
    mask_kind = None
    if mask is not None:
        mask_kind = _check_mask(mask, query, (batch_size, num_heads, num_queries, num_keys))
    if sinks is not None:
        _check_device("sinks", sinks, query)
        if tuple(sinks.shape) != (num_heads,) or not sinks.dtype.is_floating_point:
            _fail("sinks", f"{sinks.dtype} {list(sinks.shape)}", f"one floating-point logit a head, [{num_heads}]")
        if not sinks.is_contiguous():
            _fail("stride of sinks", sinks.stride(0), "1 is needed, call .contiguous()")
    return Problem(
        batch_size,
        num_heads,
        num_kv_heads,
        num_queries,
        num_keys,
        head_dim,
        value.shape[3],
        query.dtype,
        query.device.type,
        range_layout,
        mask_kind,
        _check_scale(scale, head_dim),
        _check_softcap(softcap),
        left,
        right,
        num_keys - num_queries,
        sinks is not None,
        fp8=fp8,
        dropout=_check_dropout(dropout),
        mask_bits=0 if mask is None else 8 * mask.element_size(),
        mask_rows=mask is not None and _has_rows(mask),
    )


def check_options(
    head_dim: int, is_causal: bool, window: Window, scale: float | None, softcap: float | None
) -> tuple[int, int, float, float]:
    """(left, right, scale, softcap) of a call, checked, as a Problem says them.

    Raises:
        ValueError: names the argument, what it was, and what is accepted.
    """
    return *_check_window(window, is_causal), _check_scale(scale, head_dim), _check_softcap(softcap)


def distinct(mask: torch.Tensor) -> torch.Tensor:
    """The mask, with a size of 1 wherever it is broadcast: `expand` leaves other sizes."""
    for dim in range(4):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def with_mask_in_rows(inputs: Inputs) -> Inputs:
    """`inputs`, with a mask copied whose keys lie apart: into rows, without what `expand` made of it.

    T5's bias for distances comes out of an embedding with the heads of an element side by side, and each kernel of a
    backward reads it.
    """
    mask = inputs.mask
    if mask is None or mask.stride(3) <= 1 or mask.shape[3] == 1:
        return inputs
    # Of a mask that wants a gradient each element has its own, also of those that share memory.
    wants_gradient = mask.requires_grad and torch.is_grad_enabled()
    return inputs._replace(mask=(mask if wants_gradient else distinct(mask)).contiguous())


def empty_like_heads(tensor: torch.Tensor) -> torch.Tensor:
    """`[B, H, S, D]` with the heads inside the sequence in memory, as the projection before it wants its gradient."""
    batch_size, heads, length, head_dim = tensor.shape
    return tensor.new_empty(batch_size, length, heads, head_dim).transpose(1, 2)


def _has_rows(mask: torch.Tensor) -> bool:
    """Whether a mask differs from query to query: not where it is broadcast or expanded over them."""
    return mask.shape[2] > 1 and mask.stride(2) != 0


def problem_of_numbers(
    inputs: Inputs, left: int, right: int, scale: float, softcap: float, dropout: float = 0.0
) -> Problem:
    """What a call asks whose options were checked before: as operators, whose schemas hold numbers, are given them."""
    return check_problem(inputs, scale=scale, softcap=softcap, dropout=dropout)._replace(left=left, right=right)


def with_alignment(problem: Problem, inputs: Inputs) -> Problem:
    """`problem`, its `aligned` filled in from query, key and value, which must not be fakes."""
    return problem._replace(aligned=all(map(_is_aligned, inputs[:3])))


def _is_aligned(tensor: torch.Tensor) -> bool:
    unit = 16 // tensor.element_size()
    # Strides of dimensions of size 1 are never used.
    return tensor.data_ptr() % 16 == 0 and all(
        size == 1 or stride % unit == 0 for size, stride in zip(tensor.shape[:3], tensor.stride()[:3])
    )


def any_requires_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether one of these tensors wants a gradient."""
    for tensor in tensors:  # quicker than any() of a generator
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def _check_shapes(query, key, value) -> tuple[int, int, int, int]:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            _fail(f"{name} shape", list(tensor.shape), "four dimensions are needed, [batch, heads, seq, head_dim]")
        if 0 in tensor.shape:
            _fail(f"{name} shape", list(tensor.shape), "every dimension must be at least 1 (head_dim and seq too)")
    batch_size, num_heads, num_queries, head_dim = query.shape
    if key.shape[0] != batch_size or value.shape[0] != batch_size:
        _fail("batch size of query, key, value", [t.shape[0] for t in (query, key, value)], "they must be equal")
    if key.shape[3] != head_dim:
        _fail("head_dim of query and key", [head_dim, key.shape[3]], "they must be equal (only value's may differ)")
    if key.shape[1:3] != value.shape[1:3]:
        _fail("[heads, seq] of key and value", [list(key.shape[1:3]), list(value.shape[1:3])], "they must be equal")
    if num_heads % key.shape[1] != 0:
        _fail(
            "heads of query and key",
            [num_heads, key.shape[1]],
            "the number of query heads must be a multiple of the number of KV heads",
        )
    return batch_size, num_heads, num_queries, head_dim


def _check_same(what: str, query, key, value) -> None:
    if query != key or query != value:
        _fail(f"{what} of query, key, value", [str(query), str(key), str(value)], "they must be the same")


def _check_fp8(query, key, value, key_scale, value_scale) -> None:
    if (key.dtype, value.dtype) != (torch.float8_e4m3fn, torch.float8_e4m3fn):
        _fail("dtype of key and value with scales", [str(key.dtype), str(value.dtype)], "both must be float8_e4m3fn")
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        wanted = tuple(key.shape[:2])
        if scale is None or tuple(scale.shape) != wanted or scale.dtype != torch.float32 or not scale.is_contiguous():
            got = None if scale is None else f"{scale.dtype} {list(scale.shape)}"
            _fail(name, got, f"key and value in float8_e4m3fn need float32 {list(wanted)}, contiguous: one a KV head")
        _check_device(name, scale, query)


def _check_device(name: str, tensor: torch.Tensor, query: torch.Tensor) -> None:
    if tensor.device != query.device:
        _fail(f"{name} device", str(tensor.device), f"it must be on query's device, {query.device}")


def _check_window(window: Window, is_causal: bool) -> tuple[int, int]:
    """(left, right) distances; causal attention has right = 0."""
    right = 0 if is_causal else UNLIMITED
    if window is None:
        return UNLIMITED, right
    if isinstance(window, int) and not isinstance(window, bool):
        if window < 1:
            _fail("window", window, "at least 1 (a query sees itself), or None for no window")
        side = min(window - 1, FARTHEST)
        return side, (0 if is_causal else side)
    if not (isinstance(window, tuple) and len(window) == 2 and all(isinstance(side, int) for side in window)):
        _fail("window", window, "an int >= 1, a pair (left, right) of ints >= -1, or None")
    left, window_right = window
    if left < UNLIMITED or window_right < UNLIMITED:
        _fail("window", window, "left and right count keys from 0, or are -1 for no limit")
    return min(left, FARTHEST), (0 if is_causal else min(window_right, FARTHEST))


def _check_mask(mask: torch.Tensor, query: torch.Tensor, full: tuple[int, int, int, int]) -> str:
    _check_device("mask", mask, query)
    if mask.dim() != 4 or any(size not in (1, want) for size, want in zip(mask.shape, full)):
        _fail("mask shape", list(mask.shape), f"it must broadcast to [B, H, Q, K] = {list(full)}")
    if mask.dtype == torch.bool:
        return "bool"
    if mask.dtype.is_floating_point:
        return "float"
    _fail("mask dtype", mask.dtype, "bool (True: may attend) or floating point (added to the scores)")


def number(name: str, given: float | torch.Tensor) -> float:
    """A number as one: it may stand in a tensor of one element, which is not differentiated."""
    if isinstance(given, torch.Tensor) and given.requires_grad and torch.is_grad_enabled():
        _fail(name, "a tensor that requires a gradient", "it gets none: multiply query, or give a number")
    return float(given)


def _check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    scale = number("scale", scale)
    if not math.isfinite(scale):
        _fail("scale", scale, "a finite number, or None for head_dim ** -0.5")
    return scale


def _check_softcap(softcap: float | None) -> float:
    if softcap is None:
        return 0.0
    softcap = number("softcap", softcap)
    if not math.isfinite(softcap) or softcap < 0.0:
        _fail("softcap", softcap, "a finite number > 0, or None (or 0) for none")
    return softcap


def _check_dropout(dropout: float) -> float:
    if not 0.0 <= dropout < 1.0:
        _fail("dropout", dropout, "a probability of dropping a weight, at least 0 and below 1")
    return float(dropout)
