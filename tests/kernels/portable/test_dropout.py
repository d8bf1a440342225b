"""Dropout in the kernels, forward and backward: against an explicit mask by a small kernel with the same helper."""

import pytest
import torch
import triton
import triton.language as tl
from flashcore_kernels import attention, naive_attention, op, path_counts
from flashcore_kernels.dropout import drop_threshold, dropout_keep, dropout_keys
from flashcore_kernels.key_range import FIRST
from flashcore_kernels.naive import hide_unseen, visible_mask
from torch.utils.checkpoint import checkpoint

from ..reference import DTYPES, build
from .gradients import Training, assert_errors, problem_of

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@triton.jit
def _keep_kernel(Philox, Out, Keys, head, first_row, first_key, drop_below, size, M: tl.constexpr, N: tl.constexpr):
    rows = tl.program_id(0) * M + tl.arange(0, M)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    drop_0, drop_1 = dropout_keys(Philox, head, first_row + rows)
    tl.store(Keys + rows * 2, drop_0.to(tl.int32, bitcast=True))
    tl.store(Keys + rows * 2 + 1, drop_1.to(tl.int32, bitcast=True))
    keep = dropout_keep(drop_0[:, None], drop_1[:, None], (first_key + columns)[None, :], drop_below)
    tl.store(Out + rows[:, None] * size + columns[None, :], keep.to(tl.int8))


def kept(philox, head, dropout, shape=(16, 64), row=0, key=0) -> torch.Tensor:
    """bool `shape`, from query `row` and key `key` on."""
    return kept_and_keys(philox, head, dropout, shape, row, key)[0]


def kept_and_keys(philox, head, dropout, shape, row, key) -> tuple[torch.Tensor, torch.Tensor]:
    """`kept`, and what `dropout_keys` says of each row, int32 `[rows, 2]`."""
    out = torch.zeros(shape, dtype=torch.int8, device=philox.device)
    keys = torch.zeros(shape[0], 2, dtype=torch.int32, device=philox.device)
    tile = min(shape[0], 128), min(shape[1], 128)
    grid = shape[0] // tile[0], shape[1] // tile[1]
    _keep_kernel[grid](philox, out, keys, head, row, key, drop_threshold(dropout), shape[1], *tile)
    return out.bool(), keys


def words(seed: int, offset: int, device) -> torch.Tensor:
    return torch.tensor([seed, offset], dtype=torch.int64, device=device)


def explicit_mask(problem, key_range, philox, dropout) -> torch.Tensor:
    """bool `[B, H, Q, K]`; keys count from their sequence's first."""
    shape = (triton.next_power_of_2(problem.num_queries), max(triton.next_power_of_2(problem.num_keys), 16))
    out = torch.ones(problem.batch_size, problem.num_heads, problem.num_queries, problem.num_keys, dtype=torch.bool)
    for b in range(problem.batch_size):
        first = key_range[b, 0, 0, FIRST].item() if problem.range_layout == "sequence" else 0
        for h in range(problem.num_heads):
            own = kept(philox, b * problem.num_heads + h, dropout, shape)[: problem.num_queries]
            out[b, h, :, first:] = own[:, : problem.num_keys - first]
    return out.to(philox.device)


def scores_of(call, query, key, mask):
    """(scores, their lse) over what is seen; `key` of each query head."""
    scores = query @ key.mT * problem_of(call).scale
    scores = scores if mask is None else scores + mask
    seen = visible_mask(problem_of(call), query.device, call.arguments.get("key_range"), call.arguments.get("mask"))
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores, torch.logsumexp(scores, -1)


def trained(call, keep, dropout):
    """A Training of the explicit mask, its gradients by autograd in float64, and those of the peer.

    SDPA cannot be given a mask to drop by, so the peer is what fused kernels do, in fp32 with their roundings: of the
    output, the weights and their gradients.
    """
    problem, dtype = problem_of(call), call.query.dtype
    mask = call.arguments.get("mask") if problem.mask_kind == "float" else None
    seen = visible_mask(problem, call.query.device, call.arguments.get("key_range"), call.arguments.get("mask"))
    tensors = call.query, *hide_unseen(problem, call.key, call.value, seen), mask
    factor = keep / (1.0 - dropout)

    leaves = [t if t is None else t.double().requires_grad_() for t in tensors]
    key, value = (t.repeat_interleave(problem.group, 1) for t in leaves[1:3])
    scores, lse = scores_of(call, leaves[0], key, leaves[3])
    output = (torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]) * factor) @ value
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(call.query)
    (output * grad_output).sum().backward()
    want = {name: t.grad for name, t in zip(("dq", "dk", "dv", "dmask"), leaves) if t is not None}
    output = output.detach().to(dtype)

    query, key, value = (t.float() for t in tensors[:3])
    key, value = (t.repeat_interleave(problem.group, 1) for t in (key, value))
    scores, lse = scores_of(call, query, key, mask)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    grad = grad_output.float()
    delta = (grad * output.float()).sum(-1, keepdim=True)
    of_scores = (weights * (grad @ value.mT * factor - delta)).to(dtype).float()
    heads = problem.num_kv_heads, problem.group
    own = {
        "dq": of_scores @ key * problem.scale,
        "dk": (of_scores.mT @ query * problem.scale).unflatten(1, heads).sum(2),
        "dv": ((weights * factor).to(dtype).float().mT @ grad).unflatten(1, heads).sum(2),
    }
    own = {name: t.to(dtype) for name, t in own.items()} | ({} if mask is None else {"dmask": of_scores})
    return Training(call, problem, output, lse, grad_output, None), want, own


@pytest.mark.parametrize(
    "features",
    [(), ("causal", "left-padding"), ("rows",), ("holes",), ("float-mask", "left-padding")],
    ids="+".join,
)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_gradients(features, dtype, device):
    call = build(features, 19, 45, head_dim=16, heads=(2, 1), dtype=DTYPES[dtype], device=device)
    philox, dropout = words(1234567890123, 4, device), 0.3
    keep = explicit_mask(problem_of(call), call.arguments.get("key_range"), philox, dropout)
    training, want, own = trained(call, keep, dropout)
    got = training.gradients(dropout=dropout, philox=philox)
    assert_errors(got, want, own, call.query.dtype)


@pytest.mark.parametrize(
    "features",
    [(), ("causal", "left-padding"), ("rows",), ("holes",), ("sinks", "softcap"), ("float-mask", "left-padding")],
    ids="+".join,
)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("num_queries", [3, 19])
def test_forward(features, dtype, num_queries, device, monkeypatch):
    """`attention` itself, whose output is that of the weights which the mask leaves, and whose lse is all weights'."""
    call = build(features, num_queries, 45, head_dim=16, heads=(2, 1), dtype=DTYPES[dtype], device=device)
    philox, dropout = words(1234567890123, 4, device), 0.3
    problem = problem_of(call)
    arguments = {name: a for name, a in call.arguments.items() if name != "return_lse"}
    keep = explicit_mask(problem, arguments.get("key_range"), philox, dropout)

    seen = visible_mask(problem, call.query.device, arguments.get("key_range"), arguments.get("mask"))
    value = hide_unseen(problem, call.key, call.value, seen)[1].repeat_interleave(problem.group, 1)

    def dropped_by(keep, dtype):
        """The output with weights and their products in `dtype`."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        _, weights = naive_attention(*call[:3], **arguments, dtype=exact, return_weights=True)
        return (weights * keep / (1.0 - dropout)).to(dtype) @ value.to(dtype)

    monkeypatch.setattr(op, "draw_philox", lambda device: philox)
    path_counts.clear()
    output, lse = attention(*call[:3], **arguments, dropout=dropout, return_lse=True)
    assert set(path_counts) == {"flashcore_forward"}
    dtype = call.query.dtype

    def check(keep):
        want, peer = dropped_by(keep, torch.float64), dropped_by(keep, dtype)
        assert_errors({"output": output}, {"output": want}, {"output": peer}, dtype)

    check(keep)
    _, want_lse = naive_attention(*call[:3], **arguments, dtype=torch.float64)
    torch.testing.assert_close(lse.double(), want_lse, rtol=2e-3, atol=2e-3)
    # The control: that the other weights stay would show.
    with pytest.raises(AssertionError):
        check(~keep)


def test_drawn_from_torchs_generator(device):
    """A seed repeats, another differs; checkpointing draws the same again, so its gradients are the same."""
    call = build(("causal",), 19, 45, head_dim=16, heads=(2, 1), device=device)

    def gradient(seed, way):
        torch.manual_seed(seed)
        query = call.query.clone().requires_grad_()
        layer = lambda query: attention(query, *call[1:3], is_causal=True, dropout=0.3)  # noqa: E731
        output = layer(query) if way is None else checkpoint(layer, query, use_reentrant=way)
        output.float().square().sum().backward()
        return query.grad

    wanted = gradient(1, None)
    for way in (None, False, True):
        assert torch.equal(gradient(1, way), wanted)
    assert not torch.equal(gradient(2, None), wanted)


def test_another_mask_would_show(device):
    """Negative control: gradients with another seed, another offset, and without dropout."""
    call = build(("causal",), 19, 45, head_dim=16, heads=(2, 1), device=device)
    philox, dropout = words(1234567890123, 4, device), 0.3
    keep = explicit_mask(problem_of(call), None, philox, dropout)
    training, want, own = trained(call, keep, dropout)
    for other in (words(1234567890124, 4, device), words(1234567890123, 5, device)):
        with pytest.raises(AssertionError, match="dq"):
            assert_errors(training.gradients(dropout=dropout, philox=other), want, own, call.query.dtype)
    with pytest.raises(AssertionError, match="dq"):
        assert_errors(training.gradients(), want, own, call.query.dtype)


def test_hashes_are_as_written_down(device):
    """The same steps in plain Python, from the known answer of Philox for key 0 and counter 0 (Random123)."""
    head_0, head_1, word = 0x5F6FB709, 0x0D893F64, 0xFFFFFFFF
    keep, keys = kept_and_keys(words(0, 0, device), 0, 0.37, (16, 64), 3, 9)
    for row, row_keys, row_keep in zip(range(3, 19), keys.tolist(), keep.tolist(), strict=True):
        x = row * -1640531535 & word ^ head_0
        x = (x ^ x >> 16) * 0x7FEB352D & word
        x = ((x ^ x >> 15) + head_1) * 0x846CA68B & word
        x ^= x >> 16
        assert [key & word for key in row_keys] == [x, x * 0xC2B2AE35 & word ^ head_1]
        for key, stays in zip(range(9, 73), row_keep, strict=True):
            y = (key * -1640531535 & word ^ x) * 0x7FEB352D & word
            y = (y ^ y >> 15) * 0x846CA68B + (x * 0xC2B2AE35 ^ head_1) & word
            assert stays == (y - (y >> 31 << 32) >= drop_threshold(0.37))


def test_neighbours_do_not_go_together(device):
    """Along keys, along queries and across heads, any distance: what stays here says nothing of what stays there."""
    philox, count = words(17, 0, device), 128 * 512
    keep = torch.stack([kept(philox, head, 0.3, (128, 512)).double() for head in range(2)]) - 0.7
    spread = 0.21 / count**0.5
    shifted = [keep[0].roll(d, 1) for d in (1, 2, 3, 4, 8, 16, 32, 64, 128)]
    shifted += [keep[0].roll(d, 0) for d in (1, 2, 8, 64)] + [keep[0].roll((1, 1), (0, 1)), keep[1]]
    for other in shifted:
        assert abs((keep[0] * other).mean().item()) < 4.5 * spread
    # Rows and columns each have their share, as independent draws would: chi-squared of their sums.
    for sums, size in ((keep[0].sum(1), 512), (keep[0].sum(0), 128)):
        ratio = (sums.square() / (0.21 * size)).mean().item()
        assert abs(ratio - 1) < 5 * (2 / len(sums)) ** 0.5


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.5, 0.9])
def test_rate(dropout, device):
    keep = kept(words(11, 0, device), 0, dropout, (128, 128)).double()
    spread = (dropout * (1 - dropout) / keep.numel()) ** 0.5
    assert abs(keep.mean().item() - (1 - dropout)) <= 4 * spread


def test_no_two_places_share_their_numbers(device):
    """Neighbours, heads, sequences, seeds and offsets (their upper halves too) all differ."""
    philox = words(11, 0, device)
    keep = kept(philox, 0, 0.5, (64, 64))
    for rows in (keep, keep.T):
        assert len({tuple(row) for row in rows.tolist()}) == 64
    others = [kept(philox, head, 0.5, (64, 64)) for head in (1, 2, 1 << 20)]
    others += [
        kept(words(*pair, device), 0, 0.5, (64, 64)) for pair in ((12, 0), (11 + (1 << 32), 0), (11, 1), (11, 1 << 32))
    ]
    others += [kept(philox, 0, 0.5, (64, 64), row=64), kept(philox, 0, 0.5, (64, 64), key=64)]
    for other in others:
        assert 0.4 < (other == keep).double().mean().item() < 0.6


def test_tiles_do_not_matter(device):
    """Parts of a tile are what smaller tiles say."""
    philox = words(3, 3, device)
    whole = kept(philox, 5, 0.3, (32, 64), row=8, key=16)
    assert torch.equal(whole[16:, 32:], kept(philox, 5, 0.3, (16, 32), row=24, key=48))
