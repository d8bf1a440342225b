"""Masks in which each query has a range of keys of its own: chunks, blocks of image tokens, prefixes, packed documents.

The range of a query is computed from what the mask function has captured, at a cost of O(Q + K) in place of O(Q K).
Whether it is one range may depend on values: images whose tokens lie apart, a prefix with padding behind it, padding
with holes. So values are checked, on the device and all at once, and the host waits for that one answer; where it is
no, the mask is dense. Nothing is checked, and nobody waits, for chunks without padding.
"""

from typing import NamedTuple

import torch
from flashcore_kernels import make_row_ranges

from .compat import MaskCall, masking_utils
from .patterns import maker_of, pattern_of

# Further than any two keys are apart.
FAR = 1 << 29


class Span(NamedTuple):
    """Keys at positions [first, end) for each query, int64 `[B or 1, Q]`; none where end is not above first."""

    first: torch.Tensor
    end: torch.Tensor


def row_ranges(kwargs: dict, call: MaskCall) -> torch.Tensor | None:
    """The KeyRange of the `rows` layout of a mask request, or None where that cannot say it.

    Waits for the device where values decide.
    """
    if isinstance(call.key_offset, torch.Tensor):
        return None  # the columns of a mask that is captured then stand for keys that the host does not know
    return _Rows(call).answer(kwargs.get("mask_function", masking_utils.causal_mask_function))


class _Rows:
    """One request.

    Attributes:
        position: int64 `[1, Q]`, of each query.
        exists: bool `[B, K]`, or None where all keys do.
        before: int64 `[B or 1, K + 1]`, how many keys exist in front of each slot.
        checks: bool tensors, all of which have to be True everywhere.
    """

    def __init__(self, call: MaskCall):
        self.call, self.exists = call, call.key_mask
        self.start, self.stop = call.key_offset, call.key_offset + call.num_keys
        slots = torch.arange(call.num_queries, device=call.device) + call.query_start
        self.position = (slots + call.key_offset)[None]
        self.before = torch.arange(call.num_keys + 1, device=call.device)[None]
        if self.exists is not None:
            self.before = torch.nn.functional.pad(self.exists.long().cumsum(-1), (1, 0))
        self.checks: list[torch.Tensor] = []

    def answer(self, function) -> torch.Tensor | None:
        span = self.span(function)
        if span is None:
            return None
        first, end = (each.expand(self.call.batch_size, -1) for each in self.slots(span))
        if self.exists is not None:
            slot = torch.arange(self.call.num_keys, device=self.call.device)
            begins = torch.where(self.exists, slot, self.call.num_keys).amin(-1, keepdim=True)
            ends = torch.where(self.exists, slot + 1, 0).amax(-1, keepdim=True)
            first, end = torch.maximum(first, begins), torch.minimum(end, ends)
            end = torch.maximum(first, end)
            self.checks.append(self.count(first, end) == end - first)  # no key between is missing
        if self.checks and not self.hold():
            return None
        return make_row_ranges(first, end, self.call.num_keys)

    def hold(self) -> bool:
        """Whether all checks hold: the one wait for the device."""
        if self.call.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # the answer would be that of the values at the time
        if self.call.device.type == "meta":
            return False  # there are no values
        return bool(torch.stack([check.all() for check in self.checks]).all())

    def slots(self, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """A span's first and end as key slots, within the keys that there are; the end is not below the first."""
        first = (span.first - self.start).clamp(0, self.call.num_keys)
        return first, torch.maximum((span.end - self.start).clamp(0, self.call.num_keys), first)

    def count(self, first: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """How many keys exist in slots [first, end)."""
        rows = max(self.before.shape[0], first.shape[0])
        before, first, end = (each.expand(rows, -1) for each in (self.before, first, end))
        return before.gather(1, end) - before.gather(1, first)

    def span(self, function) -> Span | None:
        """What a mask function lets each query see, padding aside."""
        plain = self.at_positions(function, self.position)
        if plain is not None:
            return plain
        maker, captured = maker_of(function)
        if maker in ("and_masks", "or_masks"):
            parts = [self.span(part) for part in captured["mask_functions"]]
            if not parts or None in parts:
                return None
            span = parts[0]
            for part in parts[1:]:
                span = _both(span, part) if maker == "and_masks" else self.either(span, part)
            return span
        if maker == "packed_sequence_mask_function":
            return self.documents(captured["packed_sequence_mask"])
        if maker == "remap_positions_for_packed_sequence":
            # Within a document positions rise by one, so what is seen lies as far from the query as its positions say.
            # What lies outside of the document, Transformers takes away.
            positions = captured["position_ids"]
            span = self.at_positions(captured["mask_function"], positions)
            away = self.position - positions
            return span and Span(span.first + away, span.end + away)
        if maker == "blockwise_overlay":
            return self.blocks(captured["block_sequence_ids"])
        if maker == "token_type_ids_mask_function" and "image_group_ids" in captured:  # before 5.17
            types, groups = captured["token_type_ids"], captured["image_group_ids"]
            blocks = torch.where(types == 1, groups, -1)
            missing = max(self.stop - blocks.shape[1], 0)
            return self.blocks(torch.nn.functional.pad(blocks, (0, missing), value=-1))
        return None

    def at_positions(self, function, position: torch.Tensor) -> Span | None:
        """The same for functions of positions and nothing else."""
        pattern = pattern_of(function)
        if pattern is not None:
            left = FAR if pattern.left < 0 else pattern.left
            right = FAR if pattern.right < 0 else pattern.right
            return Span(position - left, position + right + 1)
        maker, captured = maker_of(function)
        if maker == "and_masks":
            parts = [self.at_positions(part, position) for part in captured["mask_functions"]]
            if not parts or None in parts:
                return None
            span = parts[0]
            for part in parts[1:]:
                span = _both(span, part)
            return span
        if maker == "sliding_window_overlay":  # of 0 and less: Qwen2-MoE's, where it has no window
            return Span(position - captured["sliding_window"] + 1, position + FAR + 1)
        if maker in ("chunked_overlay", "_legacy_chunked_overlay"):
            size, padding = captured["chunk_size"], captured.get("left_padding")
            shift = 0 if padding is None else padding.to(position.device)[:, None]
            first = torch.div(position - shift, size, rounding_mode="floor") * size + shift
            return Span(first, first + size)
        return None

    def either(self, a: Span, b: Span) -> Span:
        """What one of two spans sees: one span, where no key exists in a gap between them."""
        (a_first, a_end), (b_first, b_end) = self.slots(a), self.slots(b)
        no_a, no_b = a_first >= a_end, b_first >= b_end
        gap, gap_end = torch.minimum(a_end, b_end), torch.maximum(a_first, b_first)
        gap, gap_end = torch.broadcast_tensors(gap, torch.maximum(gap, gap_end))
        self.checks.append(no_a | no_b | (self.count(gap, gap_end) == 0))
        first = torch.where(no_a, b_first, torch.where(no_b, a_first, torch.minimum(a_first, b_first)))
        end = torch.where(no_a, b_end, torch.where(no_b, a_end, torch.maximum(a_end, b_end)))
        return Span(first + self.start, end + self.start)

    def documents(self, numbers: torch.Tensor) -> Span | None:
        """Tokens see the document that they belong to: int `[B or 1, Q]`, in order."""
        if self.call.num_queries != self.call.num_keys or numbers.shape[1] != self.call.num_keys:
            return None
        numbers = numbers.contiguous()
        self.checks.append(numbers.diff(dim=-1) >= 0)
        first = torch.searchsorted(numbers, numbers, right=False)  # [B, Q]
        end = torch.searchsorted(numbers, numbers, right=True)
        return Span(first + self.start, end + self.start)

    def blocks(self, numbers: torch.Tensor) -> Span | None:
        """Tokens see the block that they belong to: int `[B, positions]`, a negative number for none."""
        num_keys = self.call.num_keys
        if numbers.shape[1] < self.stop or numbers.shape[0] not in (1, self.call.batch_size):
            return None
        of_key = numbers[:, self.start : self.stop].long()
        self.checks.append(of_key < num_keys)
        rows = self.call.batch_size if self.exists is not None else numbers.shape[0]
        member = of_key.expand(rows, -1) >= 0
        member = member if self.exists is None else member & self.exists
        # Whoever belongs to none is counted in a block of its own, which nobody asks for.
        block = torch.where(member, of_key.clamp(max=num_keys - 1), num_keys)
        slot = torch.arange(num_keys, device=numbers.device).expand_as(block)
        first = torch.full((rows, num_keys + 1), num_keys, device=numbers.device).scatter_reduce(1, block, slot, "amin")
        end = torch.zeros_like(first).scatter_reduce(1, block, slot + 1, "amax")
        size = torch.zeros_like(first).scatter_add(1, block, torch.ones_like(block))
        # Between the first and the last of a block no other key exists.
        inside = self.count(torch.minimum(first, end), end) == size
        self.checks.append(inside[:, :num_keys])
        of_query = (
            numbers.long().expand(rows, -1).gather(1, self.position.clamp(max=numbers.shape[1] - 1).expand(rows, -1))
        )
        asked = torch.where(of_query < 0, num_keys, of_query.clamp(max=num_keys))
        none = (of_query < 0) | (of_query >= num_keys)
        first, end = first.gather(1, asked), end.gather(1, asked)
        return Span(torch.where(none, 0, first) + self.start, torch.where(none, 0, end) + self.start)


def _both(a: Span, b: Span) -> Span:
    """What both of two spans see."""
    return Span(torch.maximum(a.first, b.first), torch.minimum(a.end, b.end))
