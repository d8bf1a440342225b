"""Rotary position embedding, as FlashAttention's caches apply it to new tokens."""

import torch


def rotate(
    states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Turn pairs of the first R dimensions by each token's angles, in float32; the dimensions behind them stay.

    Args:
        states: `[..., heads, D]`.
        cos, sin: `[positions, R / 2]`.
        positions: int, broadcastable to `[...]`; those below 0 are of tokens that nobody uses.
        interleaved: pairs are dimensions (0, 1), (2, 3), ...; else (0, R / 2), (1, R / 2 + 1), ...

    Returns:
        like `states`, a new tensor.
    """
    positions = positions.clamp(min=0)
    cos, sin = (table[positions].float()[..., None, :] for table in (cos, sin))  # [..., 1, R / 2]
    size = 2 * cos.shape[-1]
    turned = states[..., :size].float()
    if interleaved:
        one, other = turned[..., 0::2], turned[..., 1::2]
    else:
        one, other = turned.chunk(2, dim=-1)
    pairs = one * cos - other * sin, one * sin + other * cos
    turned = torch.stack(pairs, dim=-1).flatten(-2) if interleaved else torch.cat(pairs, dim=-1)
    return torch.cat([turned.to(states.dtype), states[..., size:]], dim=-1)


def check_rotary(cos: torch.Tensor | None, sin: torch.Tensor | None, k: torch.Tensor | None, head_dim: int) -> None:
    """Raise a ValueError unless the tables fit each other and the heads, and there are new keys to turn."""
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        raise ValueError("rotary_cos and rotary_sin: one is None; both are needed")
    if k is None:
        raise ValueError("rotary_cos and rotary_sin turn new keys and their queries: k and v are needed with them")
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > head_dim:
        raise ValueError(
            f"rotary_cos, rotary_sin: got {list(cos.shape)} and {list(sin.shape)}; both must be [positions, R / 2], "
            f"and R at most head_dim, {head_dim}"
        )
