"""The kernel of `kv_write`, in a file of its own so that importing that needs no Triton."""

import torch
import triton
import triton.language as tl

from ..plan import power_of_2_from
from ..runtime.launch import launch


@triton.jit
def store_tokens(Buffer, base, states, slots, valid, offs, scale, SIZE: tl.constexpr):
    """[S, D] new tokens into their slots, divided by `scale` where the buffer is e4m3."""
    if Buffer.dtype.element_ty == tl.float8e4nv:
        # `/` may be off by an ulp on a GPU, and so store another number than PyTorch's division.
        states = tl.div_rn(states.to(tl.float32), scale)
        # Comparisons leave NaN as it is.
        states = tl.where(states > 448.0, 448.0, tl.where(states < -448.0, -448.0, states))
    at = base + slots[:, None] * SIZE + offs[None, :]
    tl.store(Buffer + at, states.to(Buffer.dtype.element_ty), mask=valid[:, None] & (offs < SIZE)[None, :])


@triton.jit(do_not_specialize=["first", "count", "capacity"])
def flashcore_write_kv(
    Key,
    Value,
    KeyBuffer,
    ValueBuffer,
    Slot,
    KeyScale,
    ValueScale,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    num_kv_heads,
    first,
    count,
    capacity,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """buffer[b, h, slot + i] = new[b, h, i], of keys and of values.

    Shapes: Key `[B, Hkv, n, D]`, KeyBuffer `[B, Hkv, capacity, D]` contiguous, Slot int64 `[1]` or None (then `first`),
    KeyScale `[B, Hkv]` or None. Grid: `(cdiv(n, BLOCK_S) * B * Hkv,)`.
    """
    tiles = tl.cdiv(count, BLOCK_S)
    pid = tl.program_id(0)
    head_unit = (pid // tiles).to(tl.int64)
    b = head_unit // num_kv_heads
    h = head_unit % num_kv_heads
    offs_s = pid % tiles * BLOCK_S + tl.arange(0, BLOCK_S)  # [S]
    start = first
    if Slot is not None:
        start = tl.load(Slot).to(tl.int32)
    slots = (start + offs_s).to(tl.int64)
    valid = (offs_s < count) & (slots >= 0) & (slots < capacity)
    key_scale = 1.0
    value_scale = 1.0
    if KeyScale is not None:
        key_scale = tl.load(KeyScale + head_unit)
        value_scale = tl.load(ValueScale + head_unit)

    offs_d = tl.arange(0, BLOCK_D)
    key_rows = Key + b * stride_kb + h * stride_kh + offs_s.to(tl.int64) * stride_ks
    key = tl.load(key_rows[:, None] + offs_d[None, :], mask=valid[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    store_tokens(KeyBuffer, head_unit * capacity * HEAD_DIM, key, slots, valid, offs_d, key_scale, HEAD_DIM)
    offs_v = tl.arange(0, BLOCK_DV)
    value_rows = Value + b * stride_vb + h * stride_vh + offs_s.to(tl.int64) * stride_vs
    value = tl.load(
        value_rows[:, None] + offs_v[None, :], mask=valid[:, None] & (offs_v < VALUE_DIM)[None, :], other=0.0
    )
    store_tokens(ValueBuffer, head_unit * capacity * VALUE_DIM, value, slots, valid, offs_v, value_scale, VALUE_DIM)


# A few tokens a program: a decode step has one, and a prompt fills the GPU either way.
BLOCK_TOKENS = 16


def run_write(
    key_buffer: torch.Tensor,
    value_buffer: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slot: torch.Tensor | None,
    first: int,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
) -> None:
    """Launch `flashcore_write_kv` on the current stream of key's device."""
    batch_size, num_kv_heads, count, head_dim = key.shape
    value_dim = value.shape[3]
    block = 1 if count == 1 else BLOCK_TOKENS
    arguments = (
        flashcore_write_kv,
        triton.cdiv(count, block) * batch_size * num_kv_heads,
        (
            key, value, key_buffer, value_buffer, slot, key_scale, value_scale, *key.stride()[:3],
            *value.stride()[:3], num_kv_heads,
        ),
        (first, count, key_buffer.shape[2]),
        (head_dim, value_dim, power_of_2_from(head_dim), power_of_2_from(value_dim), block),
    )  # fmt: skip
    if key.is_cuda and key.device.index != torch.cuda.current_device():
        with torch.cuda.device(key.device):
            launch(*arguments)
    else:
        launch(*arguments)
