"""What bench_masks.py times: shapes, and the masks and biases over them."""

from typing import NamedTuple

import torch

GROUPS = ("short", "full", "long", "bias", "blocks", "wide")


class Case(NamedTuple):
    """One call, as many queries as keys.

    Attributes:
        mask: what `mask_of` makes; "full" is no mask, and where it is padded a KeyRange for us.
        padded: keys behind each sequence's length are hidden as well: with `mask` bool it is in the mask, beside a bias
            it is a KeyRange for us, and for SDPA in the bias.
    """

    batch: int
    length: int
    heads: int
    head_dim: int
    mask: str
    padded: bool = False
    kv_heads: int | None = None

    def __str__(self):
        heads = f"H{self.heads}" + (f":{self.kv_heads}" if self.kv_heads else "")
        padded = " padded" if self.padded else ""
        return f"{self.mask}{padded} B{self.batch} S{self.length} {heads} D{self.head_dim}"


def cases(groups: list[str], tiny: bool) -> list[Case]:
    if tiny:
        kinds = ("bool", "row", "bias", "causal bool", "tree", "full")
        return [Case(2, 24, 1, 16, kind, padded) for kind in kinds for padded in (False, True)]
    of = {
        "short": [
            Case(64, 512, 12, 64, "bool"), Case(64, 512, 12, 64, "bool", True), Case(64, 512, 12, 64, "row", True),
            Case(256, 128, 12, 64, "bool", True),
        ],
        "full": [
            Case(round(32768 / length), length, heads, 64, "full", padded)
            for heads in (12, 16) for length in (64, 128, 197, 256, 384, 512) for padded in (False, True)
        ],
        "long": [
            Case(4, 4096, 12, 64, "bool"), Case(4, 4096, 12, 64, "bool", True), Case(4, 4096, 32, 128, "bool", True, 8),
            Case(2, 4096, 32, 128, "causal bool", True, 8),
        ],
        "bias": [
            Case(16, 512, 16, 64, "bias"), Case(16, 512, 16, 64, "bias", True), Case(16, 512, 16, 64, "bias fp32"),
            Case(4, 2048, 16, 64, "bias"), Case(4, 2048, 16, 128, "bias"), Case(4, 197, 12, 64, "bias"),
            Case(32, 577, 12, 64, "bias"), Case(8, 512, 16, 64, "bias a sequence"),
        ],
        "blocks": [Case(2, 8192, 16, 128, "tree"), Case(2, 8192, 16, 128, "documents")],
        "wide": [Case(2, 2048, 8, 512, "none"), Case(2, 2048, 8, 512, "bool", True)],
    }  # fmt: skip
    return [case for group in groups for case in of[group]]


def lengths_of(case: Case, device: str) -> torch.Tensor:
    """From half of the keys to all."""
    steps = torch.arange(case.batch, device=device)
    return case.length - steps * (case.length // 2) // max(case.batch - 1, 1)


def mask_of(case: Case, dtype: torch.dtype, device: str) -> torch.Tensor | None:
    """The mask of a case, that of SDPA: bool, or a bias with padding in it."""
    n = case.length
    place = torch.arange(n, device=device)
    real = (place < lengths_of(case, device)[:, None])[:, None, None] if case.padded else None  # [B, 1, 1, K]
    if case.mask.startswith("bias"):
        bias = position_bias(case, dtype, device)
        return bias if real is None else bias.masked_fill(~real, -torch.inf)
    if case.mask == "none" or case.mask == "full" and not case.padded:
        return None
    if case.mask in ("row", "full"):
        return real if real is not None else torch.ones(case.batch, 1, 1, n, dtype=torch.bool, device=device)
    if case.mask == "bool":
        keep = torch.ones(case.batch, 1, n, n, dtype=torch.bool, device=device)
    elif case.mask == "causal bool":
        keep = (place[:, None] >= place).expand(case.batch, 1, n, n)
    elif case.mask == "tree":
        # Branches of a sixteenth each: they see a common trunk, the first sixteenth, and causally themselves.
        branch = place // max(n // 16, 1)
        keep = (place[:, None] >= place) & ((branch[:, None] == branch) | (branch == 0))
        keep = keep[None, None]
    else:
        # Documents of one or two twentieths each.
        ends = torch.tensor([1, 3, 4, 6, 7, 8, 10, 11, 12, 14, 15, 17, 18, 20], device=device) * n // 20
        number = torch.searchsorted(ends, place, right=True)
        keep = (number[:, None] == number)[None, None]
    return (keep if real is None else keep & real).contiguous()


def position_bias(case: Case, dtype: torch.dtype, device: str) -> torch.Tensor:
    batch = case.batch if case.mask == "bias a sequence" else 1
    bias = torch.randn(batch, case.heads, case.length, case.length, device=device)
    return bias.to(torch.float32 if case.mask == "bias fp32" else dtype)


def make(case: Case, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    heads = (case.heads, case.kv_heads or case.heads, case.kv_heads or case.heads)
    shape = (case.batch, case.length)
    return tuple(
        torch.randn(*shape, of, case.head_dim, dtype=dtype, device=device).transpose(1, 2) for of in heads
    )  # fmt: skip


def inputs_of(case: Case, dtype: torch.dtype, device: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(the mask that we are given, SDPA's): they differ where padding is a KeyRange for us."""
    mask = mask_of(case, dtype, device)
    if case.padded and case.mask.startswith("bias"):
        given = position_bias(case, dtype, device)
        real = (torch.arange(case.length, device=device) < lengths_of(case, device)[:, None])[:, None, None]
        return given, given.masked_fill(~real, -torch.inf)
    return mask, mask


def visible_blocks(mask: torch.Tensor, size: int = 128) -> float:
    """The part of the blocks that have anything to see."""
    size = min(size, mask.shape[-1])
    blocks = mask.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return round(blocks.any(-1).any(-2).float().mean().item(), 3)
