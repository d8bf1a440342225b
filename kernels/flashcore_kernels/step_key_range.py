"""A KeyRange for the steps of a decoding loop, in one launch where a kernel of ours can make it."""

import torch

from .device import device_of, goes_past_dispatcher
from .key_range import FARTHEST, HEADER_WORDS, UNLIMITED, as_key_range, make_key_range, sequence_width


def make_step_key_range(
    batch_size: int,
    num_keys: int,
    *,
    query_start: int | torch.Tensor = 0,
    left: int = UNLIMITED,
    right: int = UNLIMITED,
    key_mask: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """`make_key_range` for the steps of a decoding loop: the same answer, in one launch where a kernel of ours can.

    It is some thirty launches otherwise, in every step. (A prompt does not wait for the kernel to be compiled, and
    torch.compile fuses the thirty.)
    """
    fits = key_mask is not None and key_mask.shape == (batch_size, num_keys) and min(left, right) >= UNLIMITED
    if fits and _in_one_launch(key_mask, query_start, device):
        from .portable.key_range_kernel import run_key_range  # needs Triton

        words = torch.empty(batch_size, sequence_width(num_keys), dtype=torch.int32, device=key_mask.device)
        run_key_range(words, key_mask, query_start, min(left, FARTHEST), min(right, FARTHEST), HEADER_WORDS)
        return as_key_range(words, num_keys)
    return make_key_range(
        batch_size, num_keys, query_start=query_start, left=left, right=right, key_mask=key_mask, device=device
    )


def _in_one_launch(key_mask: torch.Tensor, query_start: int | torch.Tensor, device) -> bool:
    if not key_mask.is_cuda or torch.compiler.is_compiling() or key_mask.dtype != torch.bool:
        return False
    if isinstance(query_start, torch.Tensor) and (
        query_start.device != key_mask.device or query_start.numel() not in (1, key_mask.shape[0])
    ):
        return False
    return (
        (device is None or torch.device(device) == key_mask.device)
        and goes_past_dispatcher(key_mask)
        and device_of(key_mask.device).kind == "cuda"
    )
