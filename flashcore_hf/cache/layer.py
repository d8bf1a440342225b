"""One layer of FlashCoreCache: buffers that double when they are full, and drop what a sliding window has passed."""

import torch
from flashcore_kernels import write_kv

from ..compat import crop_takes_length, require_cache_layers
from ..stored_fp8 import StoredFp8
from .assign import assign
from .quantize import dequantize, head_scales, quantize

require_cache_layers()

from transformers.cache_utils import CacheLayerMixin  # noqa: E402

CROP_TAKES_LENGTH = crop_takes_length()

FIRST_CAPACITY = 256
# Tokens that a sliding layer keeps beyond its window, so that assisted decoding can take candidates back.
MARGIN = 64


class DevicePosition:
    """Where the next token goes, in device memory: what a CUDA graph reads in place of a layer's Python ints.

    Attributes:
        length: int64 `[]`, tokens that the sequence holds; shared by all layers.
        base: int64 `[]`, position of the token in slot 0; shared by the layers of one window.
        slot: int64 `[1]`, `length - base`, for the step that runs.
    """

    def __init__(self, length: torch.Tensor):
        self.length = length
        self.base = torch.zeros_like(length)
        self.slot = torch.zeros_like(length)[None]


class FlashCoreLayer(CacheLayerMixin):
    """Keys and values of one layer. The token at position p lies in slot `p - base`.

    Attributes:
        key_buffer, value_buffer: `[B, Hkv, capacity, D]` and `[B, Hkv, capacity, Dv]`; slots from `length - base` on
            are unfilled, and may hold anything.
        length: tokens seen so far.
        base: position of the token in slot 0; 0 but for a sliding layer that has dropped tokens.
        sliding_window: tokens that a query sees, itself included; None: all.
        key_scale, value_scale: fp8 only: float32 `[B, Hkv]`, what stored values are multiplied with.
        device_position: while a CUDA graph is recorded, where the next token goes; else None.
    """

    is_compileable = False
    is_croppable = True

    def __init__(
        self, sliding_window: int | None = None, *, max_length: int | None = None, dtype: torch.dtype | None = None
    ):
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.max_length = max_length
        self.fp8 = dtype is not None
        self.is_initialized = False
        self.record_past = False
        self.key_buffer = self.value_buffer = self.key_scale = self.value_scale = self.device_position = None
        self.reset()

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        self.length = self.base = self._recorded_from = 0
        self._scaled = False  # fp8: whether the scales were chosen
        self._assigned: dict[str, torch.Tensor] = {}  # keys that wait for values of as many tokens, or the reverse

    def __getstate__(self) -> dict:
        """With e4m3 as bytes, which PyTorch can pickle; and without what belongs to a CUDA graph."""
        state = {**vars(self), "device_position": None}
        if self.fp8 and self.is_initialized:
            state |= {name: _bytes(state[name]) for name in ("key_buffer", "value_buffer")}
        return state

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self.fp8 and self.is_initialized:
            self.key_buffer = self.key_buffer.view(torch.float8_e4m3fn)
            self.value_buffer = self.value_buffer.view(torch.float8_e4m3fn)

    @property
    def capacity(self) -> int:
        """Slots that are allocated."""
        return self.key_buffer.shape[2] if self.is_initialized else 0

    @property
    def keys(self) -> torch.Tensor | None:
        """What a DynamicCache's layer would hold: `[B, Hkv, tokens that later queries may see, D]`, a view (fp8: e4m3).

        Keys and then values may be assigned, `[B, Hkv, n, D]` and `[B, Hkv, n, Dv]`: the tokens that an eviction keeps,
        say. They are copied, and the next token follows them. In fp8 they are in the model's dtype, or in e4m3 with the
        scales that the layer has. A sliding layer takes as many tokens as it shows, no other number.
        """
        return self._assigned.get("keys", self._shown(self.key_buffer))

    @keys.setter
    def keys(self, states: torch.Tensor) -> None:
        assign(self, "keys", states)

    @property
    def values(self) -> torch.Tensor | None:
        """As `keys`, `[B, Hkv, tokens, Dv]`."""
        return self._assigned.get("values", self._shown(self.value_buffer))

    @values.setter
    def values(self, states: torch.Tensor) -> None:
        assign(self, "values", states)

    def _shown(self, buffer: torch.Tensor | None) -> torch.Tensor | None:
        return self._view(buffer, self._visible(), self.length) if self.is_initialized else None

    def _visible(self) -> int:
        """The first position that the next query may see."""
        return 0 if self.sliding_window is None else max(self.length - self.sliding_window + 1, 0)

    def _view(self, buffer: torch.Tensor, first: int, end: int) -> torch.Tensor:
        return buffer.narrow(2, first - self.base, end - first)  # a slice costs the host more

    def _handed_on(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What attention gets."""
        if self.fp8:
            return StoredFp8.made(keys, self.key_scale), StoredFp8.made(values, self.value_scale)
        return keys, values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Allocate buffers for sequences like these; `[B, Hkv, any, D]` and `[B, Hkv, any, Dv]`."""
        value_states = key_states if value_states is None else value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        self._shapes = [(*states.shape[:2], states.shape[3]) for states in (key_states, value_states)]
        slots = key_states.shape[2]
        self._allocate(self._capacity_for(min(slots, self._largest()) if self.is_sliding else slots))
        self.is_initialized = True

    def _capacity_for(self, slots: int) -> int:
        """Slots to allocate for `slots` that are needed now: a power of two, or what limits say."""
        capacity = max(1 << max(slots - 1, 0).bit_length(), FIRST_CAPACITY)
        if self.is_sliding:
            capacity = min(capacity, self._largest(), self.max_length or capacity)
        elif self.max_length is not None:
            capacity = self.max_length
        return max(capacity, slots)

    def _allocate(self, capacity: int) -> None:
        # Not inference tensors, even under inference_mode: later calls may write to them outside of it.
        with torch.inference_mode(False):
            (*batch_heads, head_dim), (*_, value_dim) = self._shapes
            dtype = torch.float8_e4m3fn if self.fp8 else self.dtype
            self.key_buffer = torch.empty(*batch_heads, capacity, head_dim, dtype=dtype, device=self.device)
            self.value_buffer = torch.empty(*batch_heads, capacity, value_dim, dtype=dtype, device=self.device)
            if self.fp8 and (self.key_scale is None or list(self.key_scale.shape) != batch_heads):
                self.key_scale = torch.ones(*batch_heads, dtype=torch.float32, device=self.device)
                self.value_scale = torch.ones_like(self.key_scale)

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Raise before anything is written where the new tokens do not fit."""
        count = key_states.shape[2]
        if self.max_length is not None and self.length + count > self.max_length:
            raise ValueError(
                f"FlashCoreCache would overflow: it holds {self.length} tokens and has max_length={self.max_length}, "
                f"and {count} more were given. Nothing was written. Give a larger max_length, or reset() it"
            )
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ValueError(
                "FlashCoreCache writes in place, which gradients cannot pass. Run under torch.no_grad(), "
                "or train with use_cache=False or a DynamicCache"
            )
        if self.is_initialized and key_states.dtype == self.dtype and key_states.device == self.device:
            (b, h, _, d), (batch_size, heads, _, head_dim) = self.key_buffer.shape, key_states.shape
            if b == batch_size and h == heads and d == head_dim and value_states.shape[3] == self.value_buffer.shape[3]:
                return
        if self.is_initialized and self.length > 0:
            raise ValueError(
                f"key {list(key_states.shape)} and value {list(value_states.shape)} in {key_states.dtype} on "
                f"{key_states.device} do not continue what this FlashCoreCache holds: {self._shapes} (B, Hkv, D) in "
                f"{self.dtype} on {self.device} (another batch or model?). reset() empties it"
            )
        self.key_scale = None
        self.lazy_initialization(key_states, value_states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens, and return all that their queries may see.

        Args:
            key_states, value_states: `[B, Hkv, n, D]` and `[B, Hkv, n, Dv]`.

        Returns:
            keys and values `[B, Hkv, seen + n, D or Dv]`: views of the buffers (for the first tokens of a sequence, the
            arguments themselves). In fp8 they are StoredFp8, which flashcore's attention function alone can read.

        Raises:
            ValueError: max_length would be exceeded, or the tokens are of another shape; nothing was written.
        """
        if self.device_position is not None:
            return self._update_in_graph(key_states, value_states)
        self._check(key_states, value_states)
        count, first, start = key_states.shape[2], self._visible(), self.length
        if self.fp8 and not self._scaled:
            # In place: a graph may know the scales by their addresses.
            self.key_scale.copy_(head_scales(key_states))
            self.value_scale.copy_(head_scales(value_states))
            self._scaled = True
        if self._too_long_to_keep(start - first + count):
            stored = self._stored(key_states, value_states)
            past = (self.keys, self.values)
            whole = stored if start == 0 else [self._joined(*pair) for pair in zip(past, stored)]
            self._keep_end(whole, count)
            return (key_states, value_states) if start == 0 else self._handed_on(*whole)
        self.reserve(count)
        self._write(key_states, value_states, start - self.base)
        self.length += count
        if start == 0:
            return key_states, value_states
        return self._handed_on(
            self._view(self.key_buffer, first, self.length), self._view(self.value_buffer, first, self.length)
        )

    def _write(self, key_states: torch.Tensor, value_states: torch.Tensor, slot: int | torch.Tensor) -> None:
        write_kv(
            self.key_buffer, self.value_buffer, key_states, value_states, slot, self.key_scale, self.value_scale
        )  # fmt: skip

    def _stored(self, key_states: torch.Tensor, value_states: torch.Tensor) -> list[torch.Tensor]:
        """The new tokens as the buffers hold them."""
        if not self.fp8:
            return [key_states, value_states]
        return [quantize(key_states, self.key_scale), quantize(value_states, self.value_scale)]

    def _update_in_graph(self, key_states: torch.Tensor, value_states: torch.Tensor):
        """Write from the slot on that the device knows; return the whole buffers: a mask knows what is filled."""
        self._write(key_states, value_states, self.device_position.slot)
        end = self.base + self.capacity
        return self._handed_on(
            self._view(self.key_buffer, self.base, end), self._view(self.value_buffer, self.base, end)
        )

    def _kept(self) -> int:
        """Position of the oldest token that a sliding layer must keep."""
        oldest = self.length - (self.sliding_window - 1) - MARGIN
        if self.record_past:
            oldest = min(oldest, self._recorded_from - (self.sliding_window - 1))
        return max(oldest, self.base)

    def _largest(self) -> int:
        """Slots of a sliding layer at most, but for past recording: dropping old tokens then costs one copy a token."""
        return 2 * (self.sliding_window - 1 + MARGIN)

    def _too_long_to_keep(self, slots: int) -> bool:
        """Whether a prompt on a sliding layer is so long that only its end is worth a slot."""
        return self.is_sliding and not self.record_past and slots > self._largest()

    def _joined(self, past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """What a long prompt's continuation sees on a sliding layer. Once a chunk, not once a token."""
        whole = past.new_empty(*past.shape[:2], past.shape[2] + new.shape[2], past.shape[3])
        whole[:, :, : past.shape[2]] = past
        whole[:, :, past.shape[2] :] = new
        return whole

    def _keep_end(self, whole: list[torch.Tensor], count: int) -> None:
        """Store the last tokens of `whole` (keys, values), `count` of which are new."""
        self.length += count
        kept = min(whole[0].shape[2], self.sliding_window - 1 + MARGIN)
        if kept > self.capacity:
            self._allocate(self._capacity_for(kept))
        self.base = self.length - kept
        self.key_buffer[:, :, :kept] = whole[0][:, :, -kept:]
        self.value_buffer[:, :, :kept] = whole[1][:, :, -kept:]

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens: drop what a sliding layer no longer needs, or double the buffers.

        Raises:
            ValueError: max_length would be exceeded, or keys were assigned and no values; nothing has changed.
        """
        if self._assigned:
            counts = {name: states.shape[2] for name, states in self._assigned.items()}
            raise ValueError(
                f"{counts} tokens were assigned to a layer of a FlashCoreCache that holds {self.length}: assign keys "
                "and values of as many tokens"
            )
        if self.max_length is not None and self.length + count > self.max_length:
            raise ValueError(
                f"FlashCoreCache would overflow: it holds {self.length} tokens and has max_length={self.max_length}, "
                f"and {count} more were asked for. Nothing was written. Give a larger max_length, or reset() it"
            )
        if self.length - self.base + count <= self.capacity:
            return
        first = self._kept() if self.is_sliding else 0
        slots = self.length - first + count
        old = self.key_buffer, self.value_buffer
        if slots > self.capacity or (self.is_sliding and 2 * slots > self.capacity < self._largest()):
            self._allocate(self._capacity_for(max(slots, 2 * self.capacity)))
        filled = slice(first - self.base, self.length - self.base)
        for new, buffer in zip((self.key_buffer, self.value_buffer), old):
            kept = buffer[:, :, filled]
            # In place the two ranges may overlap.
            new[:, :, : self.length - first] = kept.clone() if new is buffer else kept
        self.base = first

    def get_seq_length(self) -> int | torch.Tensor:
        """Tokens seen so far; in a CUDA graph a tensor that the graph itself advances."""
        return self.length if self.device_position is None else self.device_position.length

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int | torch.Tensor]:
        """(number of keys that `update` will return, position of the first). Up to 5.0 it gets a cache_position."""
        if self.device_position is not None:
            return self.capacity, self.device_position.base if self.is_sliding else 0
        count = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.length - self._visible() + count, self._visible()

    def get_max_length(self) -> int:
        """Tokens at most; -1: no limit."""
        return -1 if self.max_length is None else self.max_length

    get_max_cache_shape = get_max_length  # its name up to 5.4

    def activate_past_recording(self) -> None:
        """Keep every token from here on until `crop`, so that all of them can be taken back."""
        self.record_past = True
        self._recorded_from = self.length

    def crop(self, tokens: int) -> None:
        """Take tokens back: the last -`tokens` where negative, else (Transformers up to 5.4) all but `tokens`.

        Raises:
            ValueError: a sliding layer has dropped tokens that the next query would see again; nothing has changed.
        """
        tokens = int(tokens)  # assisted decoding gives a tensor, and a length must stay an int
        length = self.length + tokens if tokens < 0 or not CROP_TAKES_LENGTH else tokens
        if tokens > 0 and not CROP_TAKES_LENGTH:
            raise ValueError(f"crop({tokens}): give a negative number, the tokens to remove")
        length = min(max(length, 0), self.length)
        if self.is_sliding and max(length - self.sliding_window + 1, 0) < self.base:
            raise ValueError(
                f"crop to {length} of {self.length} tokens: this sliding layer (window {self.sliding_window}) has "
                f"dropped the tokens before {self.base}. Call activate_past_recording() on the cache first"
            )
        self.length = self._recorded_from = length

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequence b continues sequence beam_idx[b]. In place: the addresses stay."""
        if self.length > 0:
            filled = slice(0, self.length - self.base)
            for buffer in (self.key_buffer, self.value_buffer):
                part = _bytes(buffer)[:, :, filled]
                part.copy_(part.index_select(0, beam_idx.to(buffer.device)))
            self._pick_scales(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times in a row."""
        if self.is_initialized:
            index = torch.arange(self.key_buffer.shape[0], device=self.device)
            self.batch_select_indices(index.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only the sequences `indices` (int positions, or a bool mask)."""
        if self.is_initialized:
            indices = torch.as_tensor(indices, device=self.device)
            indices = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
            old, filled = (self.key_buffer, self.value_buffer), slice(0, self.length - self.base)
            self._shapes = [(len(indices), *shape[1:]) for shape in self._shapes]
            scales = self.key_scale, self.value_scale
            self._allocate(self.capacity)
            for new, buffer in zip((self.key_buffer, self.value_buffer), old):
                _bytes(new)[:, :, filled] = _bytes(buffer)[:, :, filled].index_select(0, indices)
            if self.fp8:
                self.key_scale, self.value_scale = (scale.index_select(0, indices) for scale in scales)

    def _pick_scales(self, indices: torch.Tensor) -> None:
        if self.fp8:
            for scale in (self.key_scale, self.value_scale):
                scale.copy_(scale.index_select(0, indices.to(scale.device)))

    def offload(self) -> None:
        """Not supported."""
        raise NotImplementedError("FlashCoreCache stays on its device; use DynamicCache(offloading=True) to offload")

    def load(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Take over the tokens that a DynamicCache's layer holds, the last of `length` seen."""
        self._check(keys[:, :, :0], values[:, :, :0])
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"the cache holds {length} tokens, more than max_length={self.max_length}")
        self.length = self.base = length - keys.shape[2]
        if self.fp8:
            self.key_scale.copy_(head_scales(keys))
            self.value_scale.copy_(head_scales(values))
            self._scaled = True
        self.reserve(keys.shape[2])
        self._write(keys, values, self.length - self.base)
        self.length = self._recorded_from = length

    def copied(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`keys` and `values` in memory of their own, in the model's dtype."""
        if not self.fp8:
            return self.keys.clone(), self.values.clone()
        return (
            dequantize(self.keys, self.key_scale, self.dtype),
            dequantize(self.values, self.value_scale, self.dtype),
        )


def _bytes(buffer: torch.Tensor) -> torch.Tensor:
    """fp8 as uint8, which every operator takes."""
    return buffer.view(torch.uint8) if buffer.dtype == torch.float8_e4m3fn else buffer
