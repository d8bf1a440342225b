"""Padded batches to tokens behind each other, and back: FlashAttention's bert_padding."""

import torch
import torch.nn.functional as F


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """input[indices] along the first dimension: `[N, ...]`, int64 `[M]` -> `[M, ...]`."""
    return input.index_select(0, indices)


def index_put_first_axis(values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
    """Zeros `[first_axis_dim, ...]`, with values `[M, ...]` at int64 `[M]`, which must be distinct."""
    return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy(0, indices, values)


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Tokens `[total, ...]` to their places, int64 `[total]`, in `[batch, seqlen, ...]`; zeros elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """The tokens of a padded batch behind each other. Reads their number on the host, as FlashAttention's does.

    Args:
        hidden_states: `[batch, seqlen, ...]`.
        attention_mask: bool or int `[batch, seqlen]`, nonzero where a token is real.
        unused_mask: likewise, where one is taken along although it is not real.

    Returns:
        (hidden_states `[total, ...]`, indices int64 `[total]`, cu_seqlens int32 `[batch + 1]`, the longest sequence as
        an int, the real tokens of each sequence int32 `[batch]`).
    """
    taken = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = taken.sum(dim=-1, dtype=torch.int32)
    indices = taken.flatten().nonzero().flatten()
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _offsets(lengths), int(lengths.max()), used


def unpad_input_for_concatenated_sequences(
    hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """`unpad_input` of rows that hold several sequences each.

    Args:
        hidden_states: `[batch, seqlen, ...]`.
        attention_mask_in_length: int `[batch, seqlen]`: the lengths of a row's sequences, then zeros.

    Returns:
        (hidden_states `[total, ...]`, indices, cu_seqlens int32 `[sequences + 1]`, the longest sequence).
    """
    slot = torch.arange(attention_mask_in_length.shape[1], device=attention_mask_in_length.device)
    real = slot < attention_mask_in_length.sum(dim=-1, keepdim=True)
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths.nonzero().flatten()]
    indices = real.flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _offsets(lengths), int(lengths.max())


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
