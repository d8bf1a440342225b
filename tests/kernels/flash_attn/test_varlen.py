"""flash_attn_varlen_func and its packed forms: every sequence as if it were alone."""

import pytest
import torch
from flashcore_kernels import path_counts
from flashcore_kernels.flash_attn import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

from . import definition
from .definition import allowed, off
from .test_dense import PATTERNS, ROUNDING, arguments

# Queries and keys of each sequence: equal, more keys, more queries, no queries, no keys, neither.
LENGTHS = [(4, 4), (3, 7), (6, 2), (0, 3), (2, 0), (0, 0), (5, 5)]


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def packed(lengths=LENGTHS, heads=(4, 2), dims=(8, 8), dtype=torch.float64, behind=0, seed=0):
    """q, k, v, cu_q, cu_k; `behind` tokens of NaN behind the last sequence."""
    generator = torch.Generator().manual_seed(seed)
    cu_q, cu_k = (offsets(each) for each in zip(*lengths))
    shapes = [(cu_q[-1], heads[0], dims[0]), (cu_k[-1], heads[1], dims[0]), (cu_k[-1], heads[1], dims[1])]
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    tensors = [torch.cat([t, torch.full((behind, *t.shape[1:]), torch.nan, dtype=dtype)]) for t in tensors]
    return *tensors, cu_q, cu_k


def alone(q, k, v, cu_q, cu_k, used=None, **options):
    """(out `[T, H, Dv]`, lse `[H, T]`) of each sequence by the definition; options may be lists, one of each."""
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2], dtype=options.get("dtype", torch.float64))
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float64)
    for b in range(len(cu_q) - 1):
        queries, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        if used is not None:
            queries, keys = slice(cu_q[b], cu_q[b] + used[0][b]), slice(cu_k[b], cu_k[b] + used[1][b])
        own = {name: o[b] if isinstance(o, list) else o for name, o in options.items()}
        out[queries], own_lse = definition.attend(q[queries], k[keys], v[keys], **own)
        lse[:, queries] = own_lse.double()
    return out, lse


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_patterns(pattern):
    q, k, v, cu_q, cu_k = packed(behind=3)
    out, lse, dmask = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 7, return_attn_probs=True, **arguments(pattern))
    want, want_lse = alone(q, k, v, cu_q, cu_k, **pattern)
    assert off(out, want) < ROUNDING and off(lse, want_lse) < ROUNDING and dmask.numel() == 0
    assert (out[-3:] == 0).all() and (lse[:, -3:] == -torch.inf).all()


def test_offsets_are_read():
    q, k, v, cu_q, cu_k = packed()
    want = alone(q, k, v, cu_q, cu_k, causal=True)[0]
    cu_k = cu_k.clone()
    cu_k[1] += 1
    assert off(flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 7, causal=True), want) > 1e-3


def test_lengths_stay_on_the_device():
    """Nothing reads a tensor's value, and the longest sequence is not needed: an int, a tensor or nothing at all."""
    q, k, v, cu_q, cu_k = packed()
    want = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 7)
    for longest in (torch.tensor(7), None, 0):
        assert torch.equal(flash_attn_varlen_func(q, k, v, cu_q, cu_k, longest, longest), want)
    meta = [t.to("meta") for t in (q, k, v, cu_q, cu_k)]
    used = torch.empty(len(LENGTHS), dtype=torch.int32, device="meta")
    out = flash_attn_varlen_func(*meta, 6, 7, causal=True, window_size=(3, 3), seqused_q=used, seqused_k=used)
    assert out.shape == want.shape and out.is_meta


@pytest.mark.parametrize("pattern", ["full", "causal", "window", "causal-chunk"])
def test_used_tokens(pattern):
    """Tokens behind those that are used hold NaN, and what is seen is aligned to the last one that is used."""
    pattern = PATTERNS[pattern]
    q, k, v, cu_q, cu_k = packed()
    used_q = torch.tensor([3, 3, 2, 0, 1, 0, 0], dtype=torch.int32)
    used_k = torch.tensor([2, 7, 0, 1, 0, 0, 4], dtype=torch.int32)
    want, want_lse = alone(q, k, v, cu_q, cu_k, (used_q, used_k), **pattern)
    for b in range(len(LENGTHS)):
        q[cu_q[b] + used_q[b] : cu_q[b + 1]] = torch.nan
        for t in (k, v):
            t[cu_k[b] + used_k[b] : cu_k[b + 1]] = torch.nan
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 6, 7, seqused_q=used_q, seqused_k=used_k, return_attn_probs=True, **arguments(pattern)
    )
    assert off(out, want) < ROUNDING and off(lse, want_lse) < ROUNDING


def test_features():
    q, k, v, cu_q, cu_k = packed(dims=(4, 8))
    slopes = torch.randint(1, 16, (len(LENGTHS), 4)) / 16  # exact in the float32 of a bias
    sinks = torch.randn(4, dtype=torch.float64)
    qv = torch.randn(q.shape[0], 4, 8, dtype=torch.float64)
    own_qv = [qv[cu_q[b] : cu_q[b + 1]] for b in range(len(LENGTHS))]
    for ours, theirs in (
        ({"alibi_slopes": slopes}, {"slopes": list(slopes)}),
        ({"alibi_slopes": slopes[0]}, {"slopes": slopes[0]}),
        ({"s_aux": sinks, "softcap": 2.0}, {"sinks": sinks, "softcap": 2.0}),
        ({"qv": qv}, {"qv": own_qv}),
    ):
        out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 6, 7, causal=True, **ours)
        assert off(out, alone(q, k, v, cu_q, cu_k, causal=True, **theirs)[0]) < ROUNDING, list(ours)


@pytest.mark.parametrize("own", [True, False], ids=["scales", "no-scales"])
def test_fp8(own):
    *tensors, cu_q, cu_k = packed(dtype=torch.float32)
    tensors = [t.to(torch.float8_e4m3fn) for t in tensors]
    scales = [torch.rand(len(LENGTHS), 2) + 0.5 if own else torch.ones(len(LENGTHS), 2) for _ in range(3)]
    full = []
    for t, scale, cu in zip(tensors, scales, (cu_q, cu_k, cu_k)):
        each = scale.repeat_interleave(t.shape[1] // 2, dim=1).repeat_interleave(cu.diff(), dim=0)
        full.append((t.float() * each[..., None]).to(torch.bfloat16))
    names = ("q_descale", "k_descale", "v_descale")
    out = flash_attn_varlen_func(*tensors, cu_q, cu_k, 6, 7, causal=True, **(dict(zip(names, scales)) if own else {}))
    assert out.dtype == torch.bfloat16
    want = alone(*full, cu_q, cu_k, causal=True)[0]
    peer = alone(*full, cu_q, cu_k, causal=True, dtype=torch.bfloat16)[0]
    assert off(out, want) < allowed(peer, want)
    flipped = dict(zip(names, [scale.flip(0) for scale in scales]))
    if own:
        out = flash_attn_varlen_func(*tensors, cu_q, cu_k, 6, 7, causal=True, **flipped)
        assert off(out, want) > allowed(peer, want)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_block_table(page_size):
    """Pages in any order, a table of -1 behind a sequence's last, and NaN wherever nothing is stored."""
    q, k, v, cu_q, cu_k = packed()
    want = alone(q, k, v, cu_q, cu_k, causal=True)[0]
    pools, table = paged([k, v], cu_k, page_size)
    out = flash_attn_varlen_func(q, *pools, cu_q, cu_k, 6, 7, causal=True, block_table=table)
    assert off(out, want) < ROUNDING
    used = cu_k.diff().to(torch.int32)
    out = flash_attn_varlen_func(q, *pools, cu_q, None, 6, 7, causal=True, block_table=table, seqused_k=used)
    assert off(out, want) < ROUNDING
    out = flash_attn_varlen_func(q, *pools, cu_q, cu_k, 6, 7, causal=True, block_table=table.roll(1, 0))
    assert not off(out, want) < 1e-3


def paged(tensors, cu, page_size: int):
    """(pools `[pages, page_size, Hkv, D]`, block_table) of tokens `[T, Hkv, D]`: NaN where there is no token."""
    blocks = [-(-int(n) // page_size) for n in cu.diff()]
    order = torch.randperm(sum(blocks) + 2, generator=torch.Generator().manual_seed(0))
    table = torch.full((len(blocks), max(blocks) + 1), -1, dtype=torch.int32)
    pools = [torch.full((len(order), page_size, *t.shape[1:]), torch.nan, dtype=t.dtype) for t in tensors]
    for b, count in enumerate(blocks):
        for block in range(count):
            page = table[b, block] = order[sum(blocks[:b]) + block]
            begin = int(cu[b]) + block * page_size
            end = min(begin + page_size, int(cu[b + 1]))
            for pool, t in zip(pools, tensors):
                pool[page, : end - begin] = t[begin:end]
    return pools, table


def test_packed_forms():
    q, k, v, cu, _ = packed([(4, 4), (3, 3), (0, 0)], heads=(4, 4))
    want = flash_attn_varlen_func(q, k, v, cu, cu, 4, 4, causal=True)
    qkv = torch.stack([q, k, v], dim=1)
    assert torch.equal(flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], cu, cu, 4, 4, causal=True), want)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(qkv, cu, 4, causal=True), want)
    with pytest.raises(ValueError, match=r"qkv: got .*\[total, 3, heads, head_dim\]"):
        flash_attn_varlen_qkvpacked_func(qkv[:, :2], cu, 4)


@pytest.mark.parametrize("pattern", ["full", "causal", "window"])
def test_gradients(pattern):
    """Of used tokens as alone; zeros for all others, although NaN lies there."""
    *tensors, cu_q, cu_k = packed(behind=2)
    pattern = PATTERNS[pattern]
    ours = [t.clone().requires_grad_() for t in tensors]
    theirs = [t.clone().requires_grad_() for t in tensors]
    weights = torch.randn(*tensors[0].shape, dtype=torch.float64)
    out = flash_attn_varlen_func(*ours, cu_q, cu_k, 6, 7, **arguments(pattern))
    (out * weights)[:-2].sum().backward()
    (alone(*theirs, cu_q, cu_k, **pattern)[0] * weights).sum().backward()
    for our, their in zip(ours, theirs):
        assert off(our.grad[:-2], their.grad[:-2]) < ROUNDING and their.grad.abs().max() > 1e-2
        assert (our.grad[-2:] == 0).all()


def test_nothing():
    q, k, v, cu_q, cu_k = packed([(0, 0), (0, 0)])
    assert flash_attn_varlen_func(q, k, v, cu_q, cu_k, 0, 0).shape == (0, 4, 8)
    q, k, v, cu_q, cu_k = packed([(2, 0), (3, 0)])
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 0, return_attn_probs=True)
    assert out.shape == (5, 4, 8) and (out == 0).all() and (lse == -torch.inf).all() and lse.shape == (4, 5)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"cu_seqlens_k": None}, "cu_seqlens_k: got None"),
        ({"cu_seqlens_q": torch.tensor([0], dtype=torch.int32)}, "cu_seqlens_q: got"),
        ({"cu_seqlens_k": torch.tensor([0, 1], dtype=torch.int32)}, "cu_seqlens_k: got"),
        ({"cu_seqlens_q": torch.zeros(8)}, "cu_seqlens_q: got torch.float32"),
        ({"seqused_k": torch.zeros(3, dtype=torch.int32)}, "seqused_k: got"),
        ({"block_table": torch.zeros(3, 2, dtype=torch.int32)}, "block_table: got"),
        ({"dropout_p": torch.zeros(7, dtype=torch.int32)}, "dropout_p: got Tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_refused(changes, said):
    """The last is FlashAttention-3's seqused_q, given by position."""
    q, k, v, cu_q, cu_k = packed()
    given = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 6, "max_seqlen_k": 7, **changes}
    with pytest.raises(ValueError, match=said):
        flash_attn_varlen_func(q, k, v, **given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", ["causal", "window"])
def test_kernels(pattern, dtype, monkeypatch):
    monkeypatch.setenv("FLASHCORE_STRICT", "1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = [(17, 17), (1, 30), (0, 5), (20, 9), (3, 0)]
    q, k, v, cu_q, cu_k = packed(lengths, dims=(16, 16), dtype=dtype, behind=5)
    want, want_lse = alone(q, k, v, cu_q, cu_k, **PATTERNS[pattern])
    peer = alone(q, k, v, cu_q, cu_k, dtype=dtype, **PATTERNS[pattern])[0]
    tensors = [t.to(device) for t in (q, k, v, cu_q, cu_k)]
    out, lse, _ = flash_attn_varlen_func(*tensors, 20, 30, return_attn_probs=True, **arguments(PATTERNS[pattern]))
    assert off(out.cpu(), want) < allowed(peer, want) and off(lse.cpu(), want_lse) < 1e-3


@pytest.mark.parametrize("page_size, paged_kernel", [(4, True), (3, False)])
def test_kernels_on_pages(page_size, paged_kernel, monkeypatch):
    """By the kernel for pages where they are a power of two, else on a copy."""
    monkeypatch.setenv("FLASHCORE_STRICT", "1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q, k, v, cu_q, cu_k = packed([(5, 17), (1, 30), (0, 5), (9, 9), (2, 1)], dims=(16, 16), dtype=torch.float32)
    want, want_lse = alone(q, k, v, cu_q, cu_k, causal=True, softcap=2.0)
    peer = alone(q, k, v, cu_q, cu_k, causal=True, softcap=2.0, dtype=torch.float32)[0]
    pools, table = paged([k, v], cu_k, page_size)
    tensors = [t.to(device) for t in (q, *pools, cu_q, cu_k)]
    before = path_counts["flashcore_paged"]
    out, lse, _ = flash_attn_varlen_func(
        *tensors, 9, 30, causal=True, softcap=2.0, block_table=table.to(device), return_attn_probs=True
    )
    assert (path_counts["flashcore_paged"] > before) == paged_kernel
    assert off(out.cpu(), want) <= allowed(peer, want) and off(lse.cpu(), want_lse) < 1e-3
