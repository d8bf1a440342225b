"""Masks that are made in a layer: of a 2-D padding mask, packed rows, biases, and chosen keys."""

import torch
from flashcore_kernels import layout_of, make_document_ranges, make_key_range

from .arguments import describe


def padding_range(
    padding: torch.Tensor, query: torch.Tensor, key: torch.Tensor, causal: bool, window: int | None
) -> torch.Tensor:
    """A KeyRange from a 2-D padding mask `[B, L]`, which some models hand to whatever has "flash" in its name.

    The queries are the last of the L tokens; key slots beyond L (of a static cache) are unfilled.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    length = padding.shape[1]
    if not num_queries <= length <= num_keys and causal:
        raise ValueError(
            f"attention_mask {list(padding.shape)} does not fit {num_queries} queries on {num_keys} keys: "
            "a 2-D mask has a column for each token so far"
        )
    left = -1 if window is None else window - 1
    return make_key_range(
        query.shape[0], num_keys, query_start=length - num_queries, left=left, right=0 if causal else left,
        key_mask=torch.nn.functional.pad(padding.to(torch.bool), (0, num_keys - length)),
    )  # fmt: skip


def fit_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A user's own mask `[B, H, Q, K]` (or what broadcasts to it), cut to the keys: it may be longer, as eager allows.

    Raises:
        ValueError: it is what remains of a KeyRange with which the model computed.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    if mask.dim() != 4 or (mask.shape[2] in (1, num_queries) and mask.shape[3] in (1, num_keys)):
        return mask
    if _was_key_range(mask.shape, query.shape[0], num_queries, num_keys):
        raise ValueError(
            f"attention_mask is {describe(mask)}, which is what remains of a KeyRange (a few int32 words for each "
            "sequence) after this model computed with it. This model type is known to hand its mask on unread, and "
            "here something adds to it or changes it: code of your own, perhaps. Load it with "
            "attn_implementation='eager' or 'sdpa'."
        )
    return mask[..., :num_keys]


def _was_key_range(shape: torch.Size, batch_size: int, num_queries: int, num_keys: int) -> bool:
    words = torch.empty(batch_size, 1, *shape[2:], dtype=torch.int32, device="meta")
    try:
        layout_of(words, batch_size, num_queries, num_keys)
    except ValueError:
        return False
    return True


def add_bias(bias: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """One additive mask from a position bias and what there is of a mask."""
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def keep(chosen: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """What there is of a mask (or of a bias), and the chosen keys alone."""
    if mask is None:
        return chosen
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, -torch.inf)


def chosen_keys(indices: torch.Tensor, num_keys: int) -> torch.Tensor:
    """bool `[B, 1, Q, K]` from the chosen keys of each query, `[B, Q, N]`."""
    chosen = torch.zeros(*indices.shape[:2], num_keys, dtype=torch.bool, device=indices.device)
    return chosen.scatter(-1, indices.long(), True)[:, None]


def chosen_blocks(indices: torch.Tensor, block_size: int, num_heads: int, num_keys: int) -> torch.Tensor:
    """bool `[B, H, Q, K]` from the chosen blocks of each query and group of heads, `[B, I, Q, N]`."""
    num_blocks = -(-num_keys // block_size)
    # Slots that hold -1 fall into a column of their own, which is cut off.
    chosen = torch.zeros(*indices.shape[:3], num_blocks + 1, dtype=torch.bool, device=indices.device)
    chosen = chosen.scatter(-1, indices.long().masked_fill(indices < 0, num_blocks), True)[..., :num_blocks]
    chosen = chosen.repeat_interleave(block_size, dim=-1)[..., :num_keys]
    return chosen.repeat_interleave(num_heads // indices.shape[1], dim=1)


def document_ranges(
    num_queries: int, num_keys: int, cu_q: torch.Tensor, cu_k: torch.Tensor, causal: bool, window: int | None
) -> torch.Tensor:
    """A range for each query of one packed row; the queries of a document are its last tokens."""
    side = -1 if window is None else window - 1
    return make_document_ranges(
        num_queries, num_keys, cu_q, cu_k[:-1], cu_k[1:], left=side, right=0 if causal else side
    )
