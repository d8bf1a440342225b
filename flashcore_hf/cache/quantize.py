"""FP8 keys and values: e4m3 with one scale for each sequence and KV head.

e4m3 is a floating-point format: a value's relative error is the same at any scale, so long as it neither overflows nor
falls into the subnormals. So the scale of a head is fixed from the first tokens of its sequence, as a power of two that
leaves room for later values seven times as large (beyond that they saturate) and keeps eleven binades of full precision
below. As a power of two it changes no mantissa: what a token is rounded to does not depend on its neighbours or on
padding. A kernel folds one number a head into its scores and outputs; a scale for each token would have to be read with
the keys, and would gain nothing.
"""

import torch

LARGEST = 448.0  # of e4m3fn
# The largest of the first tokens' values is put into (32, 64].
ROOM_BELOW = 6


def head_scales(states: torch.Tensor) -> torch.Tensor:
    """Scales from the first tokens: `[B, Hkv, n, D]` -> float32 `[B, Hkv]`, powers of two."""
    largest = states.float().abs().nan_to_num(nan=0.0, posinf=0.0).amax(dim=(2, 3))
    exponent = torch.frexp(largest).exponent - ROOM_BELOW  # largest <= 2 ** (exponent + ROOM_BELOW)
    # A head of zeros says nothing about what comes: 1 in the middle of the range. Bounds keep the inverse finite.
    exponent = torch.where(largest > 0, exponent, 0).clamp(-100, 100)
    return torch.ldexp(torch.ones_like(largest), exponent)


def quantize(states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`[B, Hkv, n, D]` divided by `[B, Hkv]`, saturating at e4m3's largest. NaN stays NaN."""
    scaled = states.float() * scale.reciprocal()[:, :, None, None]
    return scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def dequantize(states: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse, in memory of its own."""
    return (states.to(torch.float32) * scale[:, :, None, None]).to(dtype)
