"""The portable backward on a GPU: seeded configurations against float64, bits of repeats, and of a sequence padded."""

import random

import pytest
import torch
from flashcore_kernels import attention, make_key_range
from flashcore_kernels.dropout import drop_threshold

from ..kernels.portable.gradients import Training, assert_gradients, problem_of, train
from ..kernels.reference import DTYPES, FEATURES, Call, build, together

HEAD_DIMS = (16, 40, 64, 64, 80, 96, 128, 128, 192, 256)


def seeded(seed: int) -> Training:
    """Up to three features that go together, any dtype, head_dim and lengths up to 700."""
    draw = random.Random(seed)
    features = set()
    for feature in draw.sample(FEATURES, draw.randrange(4)):
        if all(together(feature, other) for other in features):
            features.add(feature)
    num_queries = draw.randrange(1, 700)
    # What is padded or unfilled, and queries that stand before the first key, are part of it.
    num_keys = num_queries + draw.choice((0, 0, draw.randrange(300)))
    call = build(
        features, num_queries, num_keys, heads=draw.choice(((4, 4), (6, 2), (8, 1))), head_dim=draw.choice(HEAD_DIMS),
        dtype=draw.choice(list(DTYPES.values())), device="cuda", seed=seed,
    )  # fmt: skip
    return train(call, grad_lse=draw.random() < 0.5, seed=seed)


@pytest.mark.parametrize("seed", range(60))
def test_seeded(seed, poisoned_empty):
    training = seeded(seed)
    assert_gradients(training.gradients(), training)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("features", [("causal",), ("rows",), ("causal", "softcap", "sinks")], ids="+".join)
def test_repeats(features, head_dim):
    training = train(build(features, 513, 700, heads=(8, 2), head_dim=head_dim, dtype=torch.bfloat16, device="cuda"))
    first = training.gradients()
    for _ in range(100):
        again = training.gradients()
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("before", [0, 7, 77, 129])
def test_alone_and_left_padded(dtype, head_dim, before):
    """The last sequence of a left-padded batch has the gradients that it has alone; through our own forward."""
    generator = torch.Generator().manual_seed(before)
    own, length = 300, 300 + before

    def random_states(heads):
        return torch.randn(3, heads, length, head_dim, generator=generator).to(DTYPES[dtype]).cuda()

    query, key, value, grad = (random_states(heads) for heads in (4, 2, 2, 4))
    first = torch.tensor([0, 0, before], dtype=torch.int32)
    key_range = make_key_range(3, length, first=first, right=0).cuda()

    def gradients(tensors, **arguments):
        call = Call(*tensors[:3], arguments)
        output, lse = attention(*tensors[:3], **arguments, return_lse=True)
        return Training(call, problem_of(call), output, lse, tensors[3], None).gradients()

    batched = gradients((query, key, value, grad), key_range=key_range)
    alone = gradients([t[2:, :, before:].contiguous() for t in (query, key, value, grad)], is_causal=True)
    for name, grads in alone.items():
        assert torch.equal(batched[name][2:, :, before : before + own], grads), name


def test_dropout_threshold_is_an_int32():
    """What the kernels are given as `drop_below` must not be taken for an int64."""
    assert all(-(2**31) <= drop_threshold(p) < 2**31 for p in (0.0, 1e-12, 0.5, 1 - 1e-12))
