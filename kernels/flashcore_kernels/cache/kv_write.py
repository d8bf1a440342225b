"""New tokens into the slots of a cache, quantised on the way where the cache is e4m3."""

import torch

from ..device import device_of

E4M3_LARGEST = 448.0
_library = torch.library.Library("flashcore", "FRAGMENT")
_library.define(
    "write_kv(Tensor(a!) key_buffer, Tensor(b!) value_buffer, Tensor key, Tensor value, Tensor? slot, int first, "
    "Tensor? key_scale, Tensor? value_scale) -> ()"
)


def write_kv(
    key_buffer: torch.Tensor,
    value_buffer: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slot: int | torch.Tensor,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    """Write n new tokens of every sequence into slots [slot, slot + n) of the buffers, in place.

    Args:
        key_buffer, value_buffer: `[B, Hkv, capacity, D]` and `[B, Hkv, capacity, Dv]`, contiguous; in key's dtype, or
            float8_e4m3fn.
        key, value: `[B, Hkv, n, D]` and `[B, Hkv, n, Dv]`, any strides with a unit innermost one.
        slot: the first token's; an int64 `[1]` tensor is read on the device, so that a CUDA graph can advance it. Slots
            outside of the buffer are not written.
        key_scale, value_scale: float32 `[B, Hkv]`, with float8_e4m3fn: elements are divided by them, and saturate.

    Raises:
        ValueError: shapes, dtypes or slots do not fit.
    """
    fits = _fits(key_buffer, key, key_scale) and _fits(value_buffer, value, value_scale)
    if not fits or key.shape[2] != value.shape[2] or key_buffer.shape[2] != value_buffer.shape[2]:
        _refuse(("key", key_buffer, key, key_scale), ("value", value_buffer, value, value_scale))
    first = 0 if isinstance(slot, torch.Tensor) else slot
    if first < 0 or first + key.shape[2] > key_buffer.shape[2]:
        raise ValueError(f"slots [{first}, {first + key.shape[2]}) are not within the buffer's {key_buffer.shape[2]}")
    if key_scale is None and not isinstance(slot, torch.Tensor):
        # Two copies of PyTorch cost the host less than a launch of ours, and only the host's time counts here: a CUDA
        # graph has its slot in device memory.
        key_buffer.narrow(2, first, key.shape[2]).copy_(key)
        value_buffer.narrow(2, first, key.shape[2]).copy_(value)
        return
    torch.ops.flashcore.write_kv(
        key_buffer, value_buffer, key, value, slot if isinstance(slot, torch.Tensor) else None, first, key_scale,
        value_scale,
    )  # fmt: skip


def _fits(buffer: torch.Tensor, states: torch.Tensor, scale: torch.Tensor | None) -> bool:
    (b, h, _, d), (batch_size, num_kv_heads, _, dim) = buffer.shape, states.shape
    fp8 = buffer.dtype == torch.float8_e4m3fn
    return (
        b == batch_size and h == num_kv_heads and d == dim and buffer.is_contiguous()
        and (_is_scale(scale, buffer) if fp8 else scale is None and buffer.dtype == states.dtype)
    )  # fmt: skip


def _is_scale(scale: torch.Tensor | None, buffer: torch.Tensor) -> bool:
    """Whether `scale` is what the kernels read: float32 `[B, Hkv]`."""
    return (
        scale is not None and scale.shape == buffer.shape[:2] and scale.dtype == torch.float32
        and scale.is_contiguous() and scale.device == buffer.device
    )  # fmt: skip


def _refuse(*pairs) -> None:
    said = "; ".join(
        f"{name}: got {states.dtype} {list(states.shape)} {_scale_said(scale)} for a "
        f"buffer of {buffer.dtype} {list(buffer.shape)}{'' if buffer.is_contiguous() else ', not contiguous'}"
        for name, buffer, states, scale in pairs
    )
    raise ValueError(
        f"{said}. Batch, heads and head_dim must be equal, and float8_e4m3fn alone has scales, float32 [B, Hkv], "
        "contiguous and on the buffer's device"
    )


def _scale_said(scale: torch.Tensor | None) -> str:
    return "without scale" if scale is None else f"with a scale of {scale.dtype} {list(scale.shape)}"


def _write(key_buffer, value_buffer, key, value, slot, first, key_scale, value_scale) -> None:
    device = device_of(key.device)
    fp8 = key_buffer.dtype == torch.float8_e4m3fn
    if device.kind == "cuda" and not (fp8 and device.arch < 89) and key.stride(3) == value.stride(3) == 1:
        from ..portable.kv_write_kernel import run_write

        run_write(key_buffer, value_buffer, key, value, slot, first, key_scale, value_scale)
        return
    for buffer, states, scale in ((key_buffer, key, key_scale), (value_buffer, value, value_scale)):
        if fp8:
            states = states.float() / scale[:, :, None, None]
            states = states.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn)
            buffer, states = buffer.view(torch.uint8), states.view(torch.uint8)  # index_copy_ takes bytes
        if slot is None:
            buffer[:, :, first : first + states.shape[2]] = states
        else:
            _write_inside(buffer, states, slot)


def _write_inside(buffer: torch.Tensor, states: torch.Tensor, slot: torch.Tensor) -> None:
    """`states` into the slots from `slot` on that the buffer has, without reading `slot` on the host."""
    index = slot + torch.arange(states.shape[2], device=slot.device)
    inside = index < buffer.shape[2]
    # What would lie outside does once more what the first token does; or nothing, where that is outside too.
    index = torch.where(inside, index, slot.clamp(max=buffer.shape[2] - 1))
    first = torch.where(inside[:1, None], states[:, :, :1], buffer.index_select(2, index[:1]))
    buffer.index_copy_(2, index, torch.where(inside[:, None], states, first))


for _key in ("CPU", "CUDA"):
    _library.impl("write_kv", _write, _key)
torch.library.register_fake("flashcore::write_kv", lambda *arguments: None, lib=_library)
