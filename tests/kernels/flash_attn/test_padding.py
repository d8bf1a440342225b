"""Padded batches to tokens behind each other, and back."""

import pytest
import torch
from flashcore_kernels.flash_attn import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize("mask", [MASK, MASK.bool()], ids=["int", "bool"])
@pytest.mark.parametrize("rest", [(5,), (2, 3)], ids=str)
def test_there_and_back(mask, rest):
    states = torch.randn(3, 4, *rest)
    tokens, indices, cu_seqlens, longest, used = unpad_input(states, mask)
    assert torch.equal(tokens, torch.cat([states[0, :2], states[1, 1:]]))
    assert indices.tolist() == [0, 1, 5, 6, 7]
    assert cu_seqlens.tolist() == [0, 2, 5, 5] and cu_seqlens.dtype == torch.int32
    assert longest == 3 and isinstance(longest, int)
    assert used.tolist() == [2, 3, 0] and used.dtype == torch.int32
    padded = pad_input(tokens, indices, 3, 4)
    assert torch.equal(padded, states * MASK.view(3, 4, *[1] * len(rest)))


def test_unused_tokens_are_taken_along():
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    states = torch.randn(3, 4, 5)
    tokens, indices, cu_seqlens, longest, used = unpad_input(states, MASK, unused)
    assert indices.tolist() == [0, 1, 2, 5, 6, 7, 8] and torch.equal(tokens, states.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 3, 6, 7] and longest == 3 and used.tolist() == [2, 3, 0]


def test_several_sequences_in_a_row():
    lengths = torch.tensor([[2, 1, 0, 0], [4, 0, 0, 0], [1, 0, 0, 0]])
    states = torch.randn(3, 4, 5)
    tokens, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(states, lengths)
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7, 8] and torch.equal(tokens, states.flatten(0, 1)[indices])
    assert cu_seqlens.tolist() == [0, 2, 3, 7, 8] and longest == 4


def test_gradients():
    """Of a token that is there, its own; of one that is not, none."""
    states = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    tokens, indices, *_ = unpad_input(states, MASK)
    pad_input(tokens.square(), indices, 3, 4).sum().backward()
    assert torch.equal(states.grad, 2 * states.detach() * MASK[..., None])
    values, places = torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.tensor([3, 0])
    assert torch.autograd.gradcheck(lambda v: index_put_first_axis(v, places, 4), values)
    assert torch.autograd.gradcheck(lambda v: index_first_axis(v, torch.tensor([1, 1, 0])), values)
