"""How keys and values in fp8 travel from a cache to the attention function: with their scales, and unreadable else."""

import torch


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
