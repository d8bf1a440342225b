"""The function that Transformers calls once a forward: what may attend to what, as a KeyRange where that can say it.

Models that are known to hand their mask on unread get the KeyRange itself. All others get a RangeMask, which is held as
one and turns dense where the model reads it.

Transformers describes a mask by a function of (batch, head, query, key) made of a few known parts. `patterns` tells
what they amount to where that is two distances, and `row_ranges` where it is a range for each query. Anything else
becomes the dense bool mask that `sdpa` would get, always right.
"""

import torch
from flashcore_kernels import device_of, make_key_range, make_step_key_range

from .compat import MaskCall, mask_call, masking_utils
from .models import takes_key_range, takes_no_mask, wants_additive_mask
from .pages import in_batch
from .patterns import EVERYTHING, Pattern, recognise
from .range_mask import RangeMask, can_be_made
from .row_ranges import row_ranges


def flashcore_mask(**kwargs) -> torch.Tensor | None:
    """Answer Transformers' mask request: a KeyRange (int32) or RangeMask where that can say it, else a dense bool mask.

    None where one query sees every key that there is (and for models.MAYBE_NO_MASK_MODELS): causal or not is the same
    there, and layers whose caches kept different numbers of tokens are each served all of theirs, as `sdpa` does. With
    more queries None would mean "no mask" or "causal", depending on who asks.

    Args: Transformers' own, by keyword (see `compat.mask_call`).

    Returns:
        an int32 KeyRange (see flashcore_kernels.key_range), or bool `[B, 1, Q, K]` (a RangeMask, or dense), or for a
        few models the same in floating point, 0 and the lowest number; or None.
    """
    if not torch.compiler.is_compiling() and in_batch.get():
        return None  # pages are read by lengths (Transformers 5.24 no longer asks)
    call = mask_call(kwargs)
    mask = _answer(kwargs, call)
    # The last token sees all tokens, causal or not.
    causal_may_be_left_out = call.num_queries > 1 and kwargs.get("allow_is_causal_skip", True)
    if mask is not None and causal_may_be_left_out and not torch.compiler.is_compiling():
        _keep_request(mask, kwargs)
    return mask


def _answer(kwargs: dict, call: MaskCall) -> torch.Tensor | None:
    handed_on = takes_key_range(kwargs.get("config"))
    may_serve = _range_mask_may_serve(kwargs)
    by_torch = may_serve and _torch_computes(call)
    # What a RangeMask may stand for is read from closures, which torch.compile cannot.
    at_once = may_serve and can_be_made()
    pattern = recognise(kwargs) if handed_on or at_once else None
    if by_torch and pattern is not None:
        return _answer_as_sdpa(kwargs, call, pattern, handed_on)
    key_range = None
    if pattern is not None:
        if _sees_every_key(call, pattern, kwargs.get("allow_is_causal_skip", True)):
            return None if handed_on else _everything(call)
        if not handed_on and pattern == EVERYTHING and call.key_mask is None:
            return _everything(call)
        key_range = _key_range(call, pattern, handed_on)
    elif (at_once or handed_on and _values_can_be_read()) and not by_torch:
        key_range = _of_one_query(kwargs, call) if call.num_queries == 1 else row_ranges(kwargs, call)
    if key_range is not None:
        return key_range if handed_on else RangeMask(key_range, call.num_queries, call.num_keys)
    if wants_additive_mask(kwargs.get("config")):
        return masking_utils.eager_mask(**_whole(kwargs))
    return masking_utils.sdpa_mask(**_whole(kwargs))


def _values_can_be_read() -> bool:
    """Whether operators run on numbers: under a mode that only listens too, but under no tracer and no transform."""
    modes, keys = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack()
        or any(modes(key) for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))
    )


def _whole(kwargs: dict) -> dict:
    """The request that is never answered by None, but for the models that need that."""
    whole = {**kwargs, "allow_is_causal_skip": False}
    return whole if takes_no_mask(kwargs.get("config")) else {**whole, "allow_is_bidirectional_skip": False}


def _of_one_query(kwargs: dict, call: MaskCall) -> torch.Tensor:
    """The KeyRange of one query, whatever the mask function: its line of the mask is a set of keys."""
    line = masking_utils.sdpa_mask(**_whole(kwargs)).expand(call.batch_size, 1, 1, call.num_keys)
    return make_step_key_range(call.batch_size, call.num_keys, key_mask=line[:, 0, 0].contiguous(), device=call.device)


def _everything(call: MaskCall) -> RangeMask:
    return RangeMask.of_everything(call.batch_size, call.num_queries, call.num_keys, call.device)


def _torch_computes(call: MaskCall) -> bool:
    """Whether these masks are for a CPU that no kernel runs on, operator by operator: their values cost no wait."""
    return call.device.type == "cpu" and can_be_made() and device_of(call.device).kind == "torch"


# How many queries and keys a mask was for that `sdpa` leaves out, and whether what it leaves out is causal.
_LEFT_OUT_FOR = "_flashcore_left_out_for"


def _answer_as_sdpa(kwargs: dict, call: MaskCall, pattern: Pattern, handed_on: bool) -> torch.Tensor | None:
    """The dense mask that `sdpa` gets; where it gets none, the same mask as ever, with a note that says so.

    None alone would not do: layers would take it for causal or for everything, as they are themselves.
    """
    mask = masking_utils.sdpa_mask(**kwargs)
    if mask is not None:
        return mask
    if handed_on and _sees_every_key(call, pattern, kwargs.get("allow_is_causal_skip", True)):
        return None
    mask = _key_range(call, pattern, handed_on) if handed_on else None
    if mask is None:
        mask = masking_utils.sdpa_mask(
            **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        )
    setattr(mask, _LEFT_OUT_FOR, (call.num_queries, call.num_keys, pattern.right == 0, _writes(mask)))
    return mask


def is_left_out(mask: torch.Tensor, num_queries: int, num_keys: int) -> tuple[bool, bool]:
    """(whether `sdpa` gets no mask in place of this one, whether query i then sees the first i + 1 keys, or all).

    Never where it was made for others than Q queries and K keys, or was written in since.
    """
    *made_for, causal, writes = getattr(mask, _LEFT_OUT_FOR, (0, 0, False, 0))
    return made_for == [num_queries, num_keys] and writes == _writes(mask) >= 0, causal


def _writes(mask: torch.Tensor) -> int:
    """How often a mask was written in place; -1 where nobody counts. Nobody writes in a KeyRange."""
    if mask.dtype == torch.int32:
        return 0
    return -1 if mask.is_inference() else mask._version


def _range_mask_may_serve(kwargs: dict) -> bool:
    """Whether a model that may read its mask can do so: not one that wants another length or dtype (see models)."""
    config = kwargs.get("config")
    return not (takes_no_mask(config) or wants_additive_mask(config))


def _key_range(call: MaskCall, pattern: Pattern, handed_on: bool) -> torch.Tensor:
    # A prompt must not wait until its kernel is compiled. Whoever trains or encodes makes many such masks.
    once = call.num_queries > 1 and handed_on and not torch.is_grad_enabled()
    make = make_key_range if once else make_step_key_range
    return make(
        call.batch_size, call.num_keys, query_start=call.query_start, left=pattern.left, right=pattern.right,
        key_mask=call.key_mask, device=call.device,
    )  # fmt: skip


# Where a mask keeps what was asked for, until a layer that is not causal wants to know what `sdpa` would have made.
_REQUEST = "_flashcore_request"


def _keep_request(mask: torch.Tensor, kwargs: dict) -> None:
    if isinstance(kwargs.get("q_offset"), torch.Tensor):
        # The cache's own counter, perhaps, which this forward advances.
        kwargs = {**kwargs, "q_offset": kwargs["q_offset"].clone()}
    setattr(mask, _REQUEST, kwargs)


def sdpa_would_leave_out(mask: torch.Tensor) -> bool:
    """Whether `sdpa` had been given no mask in place of this one, and would ask the layer whether it is causal.

    It leaves a causal mask out where nothing is padded, which it looks for in the padding mask's values: on a GPU this
    waits for them, as `sdpa` does. Here that is only for layers which are not causal under a causal mask.
    """
    asked = getattr(mask, _REQUEST, None)
    if isinstance(asked, dict):
        asked = masking_utils.sdpa_mask(**asked) is None
        setattr(mask, _REQUEST, asked)
    return bool(asked)


def _sees_every_key(call: MaskCall, pattern: Pattern, every_slot_filled: bool) -> bool:
    """Whether this is one query, the last of keys that all exist, as the host can tell.

    Args:
        every_slot_filled: what Transformers knows of the cache: False for a static one, say.
    """
    if call.num_queries != 1 or not every_slot_filled:
        return False
    if call.key_mask is not None and not (_torch_computes(call) and call.key_mask.all()):
        return False
    # A cache that counts on the device (a static one, one in a CUDA graph) may have slots that are not filled.
    if isinstance(call.query_start, torch.Tensor) or call.query_start != call.num_keys - 1:
        return False
    return pattern.left < 0 or call.num_keys <= pattern.left + 1
