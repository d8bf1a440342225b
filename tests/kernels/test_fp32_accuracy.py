"""fp32 where scores are large, against float64 by the error rule, in calls with rows enough for it to mean something.

Queries and keys of deviation 3 or 8 leave nearly all weight on one key, and the error is that of the few rows in which
two keys compete. In a dozen rows the largest one is chance: with the columns of head_dim in another order, which is
another rounding and no more, PyTorch breaks the rule beside itself in one call of four.
"""

import pytest
import torch

from .reference import Call, assert_right


def large_scores(head_dim, num_keys, deviation, device, *, batch_size=2, heads=(64, 4), num_queries=1) -> Call:
    """A call whose queries and keys are normal with this deviation."""
    generator = torch.Generator(device=device).manual_seed(0)
    query, key, value = (
        torch.randn(batch_size, count, length, head_dim, generator=generator, device=device)
        for count, length in ((heads[0], num_queries), (heads[1], num_keys), (heads[1], num_keys))
    )
    return Call(query * deviation, key * deviation, value, {})


def in_sums_of(call: Call, length: int) -> torch.Tensor:
    """The output, exact but for its scores, which are fp32 sums of `length` products after each other."""
    query = call.query.double()
    key, value = (t.double().repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (call.key, call.value))
    scores = torch.zeros(*query.shape[:3], key.shape[2], device=query.device)
    for begin in range(0, query.shape[3], length):
        part = torch.zeros_like(scores)
        for d in range(begin, begin + length):
            part = (query[..., d, None] * key[:, :, None, :, d] + part.double()).float()  # a fused multiply-add
        scores += part
    return (torch.softmax(scores.double() * query.shape[3] ** -0.5, dim=-1) @ value).float()


@pytest.mark.parametrize("deviation", [1, 3])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_decode(head_dim, deviation, device):
    call = large_scores(head_dim, 127, deviation, device)
    assert_right(call.run(), call)


@pytest.mark.parametrize("head_dim", [32, 128])
def test_prefill(head_dim, device):
    call = large_scores(head_dim, 127, 3, device, batch_size=1, heads=(4, 2), num_queries=32)
    assert_right(call.run(), call)


def test_negative_control_one_long_sum(device):
    """What `blocks.short_sums` is for: without it the same calls break the rule."""
    call = large_scores(128, 127, 3, device)
    assert_right(in_sums_of(call, 16), call)
    with pytest.raises(AssertionError, match="RMS error|largest error"):
        assert_right(in_sums_of(call, 128), call)
