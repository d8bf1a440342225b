"""FlashAttention's definition, one sequence at a time, in float64: what its functions are held against.

Written from its docstrings (flash_attn/flash_attn_interface.py, hopper/flash_attn_interface.py), without any of ours.
"""

import torch


def seen(num_queries: int, num_keys: int, causal: bool = False, window=(-1, -1), chunk: int = 0) -> torch.Tensor:
    """bool `[Sq, Sk]`: query i stands at key Sk - Sq + i, and sees what these leave."""
    at = torch.arange(num_queries)[:, None] + num_keys - num_queries
    key = torch.arange(num_keys)
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if causal:
        mask &= key <= at
    if window[0] >= 0:
        mask &= key >= at - window[0]
    if window[1] >= 0:
        mask &= key <= at + window[1]
    if chunk:
        mask &= torch.div(key, chunk, rounding_mode="floor") == torch.div(at, chunk, rounding_mode="floor")
    return mask


def attend(q, k, v, *, scale=None, softcap=0.0, slopes=None, qv=None, sinks=None, dtype=torch.float64, **pattern):
    """(out `[Sq, H, Dv]`, lse `[H, Sq]`) of q `[Sq, H, D]`, k `[Sk, Hkv, D]`, v `[Sk, Hkv, Dv]`; slopes, sinks `[H]`.

    In float64; or in float32 with weights rounded to `dtype`, as a peer whose error is the yardstick.
    """
    (num_queries, num_heads, head_dim), num_keys = q.shape, k.shape[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    k, v = (t.repeat_interleave(num_heads // t.shape[1], dim=1) for t in (k, v))
    if scale is None:
        scale = (head_dim + (0 if qv is None else qv.shape[2])) ** -0.5
    scores = torch.einsum("ihd,jhd->hij", q, k)
    if qv is not None:
        scores = scores + torch.einsum("ihd,jhd->hij", qv.to(wide), v)
    scores = scores * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        at = torch.arange(num_queries)[:, None] + num_keys - num_queries
        distance = (at - torch.arange(num_keys)).abs().to(q.device)
        scores = scores - slopes.to(wide)[:, None, None] * distance
    scores = scores.masked_fill(~seen(num_queries, num_keys, **pattern).to(q.device), -torch.inf)
    if sinks is None:
        lse = torch.logsumexp(scores, dim=-1)
    else:
        lse = torch.logsumexp(torch.cat([scores, sinks.to(wide)[:, None, None].expand(-1, num_queries, 1)], -1), -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.einsum("hij,jhd->ihd", weights.to(dtype).to(wide), v).to(dtype), lse


def batch(q, k, v, **options):
    """(out `[B, Sq, H, Dv]`, lse `[B, H, Sq]`); slopes and qv may be a list, one of each sequence."""
    each = [
        attend(*tensors, **{name: o[b] if isinstance(o, list) else o for name, o in options.items()})
        for b, tensors in enumerate(zip(q, k, v))
    ]
    return torch.stack([out for out, _ in each]), torch.stack([lse for _, lse in each])


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, equal infinities aside."""
    assert got.shape == want.shape
    return torch.where(got.double() == want, 0.0, (got.double() - want).abs()).max().item()


def allowed(peer: torch.Tensor, want: torch.Tensor) -> float:
    """The largest error of an output: twice the peer's, and two roundings."""
    return 2 * off(peer, want) + torch.finfo(peer.dtype).eps * want.abs().max().item()


def rotated(x, cos, sin, positions, interleaved: bool):
    """x `[S, H, D]` turned by the angles of int `[S]`, pair by pair."""
    x = x.clone()
    half = cos.shape[1]
    for pair in range(half):
        one, other = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        c, s = cos[positions, pair][:, None], sin[positions, pair][:, None]
        a, b = x[..., one].clone(), x[..., other].clone()
        x[..., one], x[..., other] = a * c - b * s, a * s + b * c
    return x
