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
    scaled = states.float() / scale[:, :, None, None]
    return scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


class StoredFp8(torch.Tensor):
    """Keys or values in e4m3 on their way from a FlashCoreCache to flashcore's attention function, with their scales.

    Whatever else takes them raises: without scales their numbers mean nothing.

    Attributes:
        stored: the plain float8_e4m3fn tensor `[B, Hkv, K, D]`.
        flashcore_scale: float32 `[B, Hkv]`.
    """

    @classmethod
    def made(cls, stored: torch.Tensor, scale: torch.Tensor) -> "StoredFp8":
        states = stored.as_subclass(cls)
        states.stored, states.flashcore_scale = stored, scale
        return states

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        raise ValueError(
            f"keys and values of a FlashCoreCache in float8_e4m3fn reached {function.__name__}, and only the attention "
            "function of flashcore can read them. Either the model runs another attention implementation "
            "(model.set_attn_implementation('flashcore') changes that), or it changes keys between its cache and its "
            "attention: use FlashCoreCache without dtype, or a DynamicCache"
        )


# What may be asked of StoredFp8: shape, dtype and the like (`__get__`), which no number enters.
_QUESTIONS = {
    "__get__",
    "size",
    "dim",
    "stride",
    "numel",
    "element_size",
    "data_ptr",
    "is_contiguous",
    "__len__",
    "__repr__",
}


def dequantize(states: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse, in memory of its own."""
    return (states.to(torch.float32) * scale[:, :, None, None]).to(dtype)
