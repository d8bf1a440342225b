"""What a call asks beside its tensors, in FlashAttention's terms, checked."""

from typing import NamedTuple

import torch

from ..key_range import UNLIMITED

Window = tuple[int | None, int | None]


class Options(NamedTuple):
    """What a call asks beside q, k and v.

    Attributes:
        scale: factor on the scores, None for head_dim ** -0.5.
        left, right: keys to each side that a query sees, -1 for no limit; causal is right = 0.
        chunk: keys of an attention chunk, 0 for none.
        softcap: 0.0 for none.
        dropout: probability of dropping a weight.
        slopes: ALiBi's, float32 `[H]` or `[B, H]`, or None.
        sinks: `[H]` logits, or None.
        qv: like q, with v's head_dim, or None.
        descales: of q, k and v in float8_e4m3fn, float32 `[B, Hkv]` each or None.
    """

    scale: float | None
    left: int
    right: int
    chunk: int
    softcap: float
    dropout: float
    slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    qv: torch.Tensor | None
    descales: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def options_of(
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float | None,
    *,
    dropout_p: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    attention_chunk: int = 0,
    qv: torch.Tensor | None = None,
    descales: tuple = (None, None, None),
    s_aux: torch.Tensor | None = None,
    sm_margin: int = 0,
) -> Options:
    """Check the arguments that all of FlashAttention's functions share.

    Raises:
        ValueError: an argument cannot mean anything; most often FlashAttention-3's order of positional arguments.
        NotImplementedError: `sm_margin`.
    """
    for name, number in (("dropout_p", dropout_p), ("softmax_scale", softmax_scale), ("softcap", softcap)):
        if isinstance(number, (bool, torch.Tensor)) and not _is_number(number):
            raise ValueError(
                f"{name}: got {type(number).__name__}; a number is needed. Positional arguments are in "
                "FlashAttention-2's order; give those behind the tensors by keyword"
            )
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}; a probability in [0, 1) is needed")
    if not isinstance(causal, bool) and causal not in (0, 1):
        raise ValueError(f"causal: got {causal!r}; True or False is needed")
    if sm_margin:
        raise NotImplementedError(
            f"sm_margin={sm_margin}: flashcore's kernels take every multiprocessor, and cannot leave some to others. "
            "Give sm_margin=0"
        )
    if attention_chunk < 0:
        raise ValueError(f"attention_chunk: got {attention_chunk}; keys of a chunk, or 0 for none")
    left, right = _window(window_size)
    return Options(
        scale=None if softmax_scale is None else float(softmax_scale),
        left=left,
        right=0 if causal else right,
        chunk=int(attention_chunk),
        softcap=max(float(softcap or 0.0), 0.0),
        dropout=float(dropout_p),
        slopes=alibi_slopes,
        sinks=s_aux,
        qv=qv,
        descales=descales,
    )


def _is_number(value) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type == "cpu"


def _window(window_size: Window) -> tuple[int, int]:
    """(left, right), -1 for no limit: any negative number or None means that."""
    if not isinstance(window_size, (tuple, list, torch.Tensor)) or len(window_size) != 2:
        raise ValueError(f"window_size: got {window_size!r}; a pair (left, right) of keys is needed, (-1, -1) for none")
    return tuple(UNLIMITED if side is None or side < 0 else int(side) for side in window_size)
