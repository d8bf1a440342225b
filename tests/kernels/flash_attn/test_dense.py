"""flash_attn_func and its packed forms against FlashAttention's definition."""

import inspect

import pytest
import torch
from flashcore_kernels import flash_attn, note_fallback
from flashcore_kernels.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from flashcore_kernels.flash_attn.engine import LARGEST_BIAS

from . import definition
from .definition import allowed, off

PATTERNS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "left": {"window": (2, -1)},
    "right": {"window": (-1, 1)},
    "causal-window": {"causal": True, "window": (4, 4)},
    "chunk": {"chunk": 4},
    "causal-chunk": {"causal": True, "chunk": 3},
    "window-chunk": {"window": (2, 3), "chunk": 5},
}
NAMES = {"window": "window_size", "chunk": "attention_chunk", "scale": "softmax_scale", "slopes": "alibi_slopes"}


def arguments(options: dict) -> dict:
    """Options of the definition as FlashAttention names them."""
    return {NAMES.get(name, name): option for name, option in options.items()}


def tensors(num_queries=5, num_keys=9, heads=(4, 2), dims=(8, 8), batch_size=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_queries, heads[0], dims[0]), (num_keys, heads[1], dims[0]), (num_keys, heads[1], dims[1])]
    return [torch.randn(batch_size, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


ROUNDING = 1e-12  # of float64, many times over


@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (1, 7), (7, 7)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_patterns(pattern, lengths):
    q, k, v = tensors(*lengths)
    out, lse, dmask = flash_attn_func(q, k, v, return_attn_probs=True, **arguments(pattern))
    want, want_lse = definition.batch(q, k, v, **pattern)
    assert off(out, want) < ROUNDING and off(lse, want_lse) < ROUNDING and dmask.numel() == 0
    assert out.is_contiguous()
    if not definition.seen(*lengths, **pattern).all():
        assert off(out, definition.batch(q, k, v)[0]) > 1e-3


def test_causal_is_aligned_to_the_last_key():
    q, k, v = tensors(3, 6)
    v_one = torch.zeros_like(v)
    v_one[:, 4] = 1.0
    out = flash_attn_func(q, k, v_one, causal=True)
    assert (out[:, 0] == 0).all() and (out[:, 1:] > 0).all()


def test_queries_without_keys():
    q, k, v = tensors(7, 3)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :4] == 0).all() and (lse[..., :4] == -torch.inf).all()
    assert (out[:, 4:] != 0).all() and torch.isfinite(lse[..., 4:]).all()


@pytest.mark.parametrize(
    "options",
    [{"scale": 0.3}, {"scale": 0.0}, {"scale": -0.5}, {"softcap": 2.0}, {"softcap": 2.0, "causal": True, "scale": 3.0}],
    ids=str,
)
def test_scale_and_softcap(options):
    q, k, v = tensors()
    want = definition.batch(q, k, v, **options)[0]
    assert off(flash_attn_func(q, k, v, **arguments(options)), want) < ROUNDING
    assert off(flash_attn_func(q, k, v), want) > 1e-3


def test_softcap_of_zero_and_less_is_none():
    q, k, v = tensors()
    want = flash_attn_func(q, k, v)
    assert torch.equal(flash_attn_func(q, k, v, softcap=-1.0), want)
    assert torch.equal(flash_attn_func(q, k, v, softcap=None), want)


@pytest.mark.parametrize("heads", [(4, 4), (6, 3), (7, 1)], ids=str)
def test_groups_of_heads(heads):
    q, k, v = tensors(heads=heads, dims=(8, 4))
    assert off(flash_attn_func(q, k, v, causal=True), definition.batch(q, k, v, causal=True)[0]) < ROUNDING


@pytest.mark.parametrize("window", [None, (None, None), (-1, -1), (-7, -2), torch.tensor([-1, -1])], ids=str)
def test_no_window(window):
    q, k, v = tensors()
    if window is None:
        with pytest.raises(ValueError, match="window_size"):
            flash_attn_func(q, k, v, window_size=window)
    else:
        assert torch.equal(flash_attn_func(q, k, v, window_size=window), flash_attn_func(q, k, v))


@pytest.mark.parametrize("lengths", [(5, 9), (9, 5)], ids=str)
@pytest.mark.parametrize("pattern", ["full", "causal", "window"])
def test_alibi(pattern, lengths):
    q, k, v = tensors(*lengths)
    pattern = PATTERNS[pattern]
    slopes = torch.tensor([0.5, 0.25, 0.125, 1.0])
    out, lse, _ = flash_attn_func(q, k, v, alibi_slopes=slopes, return_attn_probs=True, **arguments(pattern))
    want, want_lse = definition.batch(q, k, v, slopes=slopes, **pattern)
    assert off(out, want) < ROUNDING and off(lse, want_lse) < ROUNDING
    assert off(out, definition.batch(q, k, v, slopes=slopes.flip(0), **pattern)[0]) > 1e-3

    each = torch.stack([slopes, slopes.flip(0)])
    out = flash_attn_func(q, k, v, alibi_slopes=each, **arguments(pattern))
    assert off(out, definition.batch(q, k, v, slopes=list(each), **pattern)[0]) < ROUNDING


def test_alibi_of_a_long_text_is_refused():
    q = torch.empty(1, 1 << 15, 1, 8, device="meta")
    with pytest.raises(NotImplementedError, match="alibi_slopes.*FlashAttention-2"):
        flash_attn_func(q, q, q, alibi_slopes=torch.ones(1, device="meta"))
    assert (1 << 30) > LARGEST_BIAS
    with pytest.raises(ValueError, match="alibi_slopes: got"):
        flash_attn_func(*tensors(), alibi_slopes=torch.ones(3))


def test_qv():
    """Both products, the scale of both head_dims (FlashAttention-3's form of MLA)."""
    q, k, v = tensors(dims=(4, 8))
    qv = torch.randn(2, 5, 4, 8, dtype=torch.float64)
    want = definition.batch(q, k, v, qv=list(qv), causal=True)[0]
    assert off(flash_attn_func(q, k, v, qv=qv, causal=True), want) < ROUNDING
    assert off(flash_attn_func(q, k, v, causal=True), want) > 1e-3
    with pytest.raises(ValueError, match="qv: got"):
        flash_attn_func(q, k, v, qv=qv[..., :4])


def test_sinks():
    q, k, v = tensors()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    out, lse, _ = flash_attn_func(q, k, v, s_aux=sinks, causal=True, return_attn_probs=True)
    want, want_lse = definition.batch(q, k, v, sinks=sinks, causal=True)
    assert off(out, want) < ROUNDING and off(lse, want_lse) < ROUNDING
    # Queries without a key have them alone, whether there are keys or none.
    for num_keys in (0, 3):
        q, k, v = tensors(5, num_keys)
        out, lse, _ = flash_attn_func(q, k, v, s_aux=sinks, causal=True, return_attn_probs=True)
        assert torch.equal(lse[:, :, 0], sinks.expand(2, 4)) and (out[:, 0] == 0).all()


def test_fp8():
    q, k, v = (t.to(torch.float8_e4m3fn) for t in tensors(dtype=torch.float32))
    scales = [torch.rand(2, 2) + 0.5 for _ in range(3)]
    out = flash_attn_func(q, k, v, causal=True, q_descale=scales[0], k_descale=scales[1], v_descale=scales[2])
    assert out.dtype == torch.bfloat16
    full = [t.double() * s.double().repeat_interleave(t.shape[2] // 2, 1)[:, None, :, None]
            for t, s in zip((q, k, v), scales)]  # fmt: skip
    want = definition.batch(*full, causal=True)[0]
    coarse = want.abs().max().item() * 2.0**-7  # two roundings to bfloat16
    assert off(out, want) < coarse
    without = flash_attn_func(q, k, v, causal=True)
    assert off(without, want) > 4 * coarse
    ones = torch.ones(1, 1).expand(2, 2)
    assert torch.equal(flash_attn_func(q, k, v, causal=True, q_descale=ones, k_descale=ones, v_descale=ones), without)


@pytest.mark.parametrize("empty", ["queries", "keys", "batch", "heads"])
def test_nothing(empty):
    shapes = {"queries": (2, 0, 5, 4, 2), "keys": (2, 3, 0, 4, 2), "batch": (0, 3, 5, 4, 2), "heads": (2, 3, 5, 0, 0)}
    batch_size, num_queries, num_keys, num_heads, num_kv_heads = shapes[empty]
    q = torch.randn(batch_size, num_queries, num_heads, 8, requires_grad=True)
    k, v = (torch.randn(batch_size, num_keys, num_kv_heads, 8, requires_grad=True) for _ in range(2))
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.shape == q.shape and lse.shape == (batch_size, num_heads, num_queries)
    assert (out == 0).all() and (lse == -torch.inf).all()
    out.sum().backward()
    for tensor in (q, k, v):
        assert tensor.grad.shape == tensor.shape and (tensor.grad == 0).all()


def test_nan_meets_nothing():
    """Queries without keys hold whatever they hold."""
    q = torch.full((1, 2, 1, 8), torch.nan, requires_grad=True)
    out = flash_attn_func(q, q[:, :0], q[:, :0])
    out.sum().backward()
    assert (out == 0).all() and (q.grad == 0).all()


@pytest.mark.parametrize("pattern", ["full", "causal", "window", "causal-chunk"])
def test_gradients(pattern):
    pattern = PATTERNS[pattern]
    ours = [t.requires_grad_() for t in tensors(9, 5)]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    weights = torch.randn(2, 9, 4, 8, dtype=torch.float64)
    (flash_attn_func(*ours, **arguments(pattern)) * weights).sum().backward()
    (definition.batch(*theirs, **pattern)[0] * weights).sum().backward()
    for our, their in zip(ours, theirs):
        assert off(our.grad, their.grad) < ROUNDING and their.grad.abs().max() > 1e-2


@pytest.mark.parametrize("packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("pattern", ["causal", "window"])
def test_gradients_in_float32(pattern, packed):
    """By kernels where there are such: at most three times a peer's error, as for all gradients."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    q, k, v = tensors(21, 33, dims=(16, 16), dtype=torch.float32)
    weights = torch.randn(2, 21, 4, 16, generator=torch.Generator().manual_seed(1))
    pattern = PATTERNS[pattern]

    def gradients(call, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        out = call(*leaves)
        (out * weights.to(out)).sum().backward()
        return [leaf.grad for leaf in leaves]

    def ours(q, k, v):
        q, k, v = (t.to(device) for t in (q, k, v))
        if not packed:
            return flash_attn_func(q, k, v, **arguments(pattern))
        cu_q, cu_k = (torch.tensor([0, n, 2 * n], dtype=torch.int32, device=device) for n in (21, 33))
        rows = (t.flatten(0, 1) for t in (q, k, v))
        return flash_attn_varlen_func(*rows, cu_q, cu_k, 21, 33, **arguments(pattern)).view(q.shape)

    got = gradients(ours, torch.float32)
    want = gradients(lambda *leaves: definition.batch(*leaves, **pattern)[0], torch.float64)
    peer = gradients(lambda *leaves: definition.batch(*leaves, dtype=torch.float32, **pattern)[0], torch.float32)
    for our, exact, their in zip(got, want, peer):
        assert off(our, exact) <= 3 * off(their, exact) + torch.finfo(torch.float32).eps * exact.abs().max().item()


def test_dropout():
    """Dropped weights are zeros, the others grow: the mean stays, and the log-sum-exp has no part in it."""
    q, k, v = tensors(64, 64, batch_size=8)
    torch.manual_seed(0)
    draws = torch.stack([flash_attn_func(q, k, v, dropout_p=0.25) for _ in range(50)])
    want = flash_attn_func(q, k, v)
    assert off(draws[0], want) > 1e-2
    assert ((draws.mean(0) - want) / draws.std(0) * 50**0.5).abs().mean() < 1.0
    with pytest.raises(NotImplementedError, match="S_dmask"):
        flash_attn_func(q, k, v, dropout_p=0.25, return_attn_probs=True)


def test_packed_forms():
    q, k, v = tensors(6, 6, heads=(4, 4))
    want = flash_attn_func(q, k, v, causal=True, window_size=(3, 0))
    kv, qkv = torch.stack([k, v], dim=2), torch.stack([q, k, v], dim=2)
    assert torch.equal(flash_attn_kvpacked_func(q, kv, causal=True, window_size=(3, 0)), want)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, causal=True, window_size=(3, 0)), want)
    grouped = tensors(6, 6)
    out = flash_attn_qkvpacked_func(torch.cat(grouped, dim=2), num_heads_q=4)
    assert torch.equal(out, flash_attn_func(*grouped))
    qkv = qkv.requires_grad_()
    flash_attn_qkvpacked_func(qkv, causal=True).square().sum().backward()
    assert (qkv.grad.abs().amax(dim=(0, 1, 3, 4)) > 0).all()
    for bad in (lambda: flash_attn_kvpacked_func(q, qkv), lambda: flash_attn_qkvpacked_func(qkv, num_heads_q=3)):
        with pytest.raises(ValueError, match="kv: got"):
            bad()


def test_strides():
    q, k, v = tensors(6, 6, heads=(4, 4))
    wide = torch.stack([q, k, v], dim=-1)
    assert torch.equal(flash_attn_func(*wide.unbind(-1), causal=True), flash_attn_func(q, k, v, causal=True))


@pytest.mark.parametrize(
    "options, error, said",
    [
        ({"sm_margin": 2}, NotImplementedError, "sm_margin=2"),
        ({"dropout_p": True}, ValueError, "dropout_p: got bool"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0"),
        ({"softmax_scale": True}, ValueError, "FlashAttention-2's order"),
        ({"causal": (-1, -1)}, ValueError, "causal: got"),
        ({"window_size": 4}, ValueError, "window_size: got 4"),
        ({"attention_chunk": -1}, ValueError, "attention_chunk: got -1"),
    ],
    ids=str,
)
def test_refused(options, error, said):
    with pytest.raises(error, match=said):
        flash_attn_func(*tensors(), **options)


def test_wrong_shapes():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="q: got .*batch, seqlen, heads, head_dim"):
        flash_attn_func(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="multiple of the number of KV heads"):
        flash_attn_func(q[:, :, :3], k, v)


def test_every_parameter_can_be_seen():
    """Transformers passes on what it finds in a signature: **kwargs would hide what there is."""
    for name in flash_attn.__all__:
        for parameter in inspect.signature(getattr(flash_attn, name)).parameters.values():
            assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL), name
    assert list(inspect.signature(flash_attn_func).parameters)[:11] == [
        "q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes",
        "deterministic", "return_attn_probs",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", ["causal", "window", "causal-chunk", "alibi", "sinks"])
def test_kernels(pattern, dtype, monkeypatch):
    """The same by the kernels themselves, in Triton's interpreter or on the GPU: PyTorch's error twice, at most."""
    monkeypatch.setenv("FLASHCORE_STRICT", "1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    others = {
        "alibi": {"slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])},
        "sinks": {"sinks": torch.tensor([0.5, -1, 2, 0])},
    }
    options = others.get(pattern) or PATTERNS[pattern]
    q, k, v = tensors(35, 41, dims=(16, 16), dtype=dtype)
    want, want_lse = definition.batch(q, k, v, **options)
    there = {"s_aux" if name == "sinks" else name: o for name, o in arguments(options).items()}
    there = {name: o.to(device) if isinstance(o, torch.Tensor) else o for name, o in there.items()}
    out, lse, _ = flash_attn_func(*(t.to(device) for t in (q, k, v)), return_attn_probs=True, **there)
    peer = definition.batch(q, k, v, dtype=dtype, **options)[0]
    assert off(out.cpu(), want) < allowed(peer, want) and off(lse.cpu(), want_lse) < 1e-3
    assert out.dtype == dtype


def test_strictness_bites(monkeypatch):
    monkeypatch.setenv("FLASHCORE_STRICT", "1")
    with pytest.raises(NotImplementedError, match="FLASHCORE_STRICT"):
        note_fallback("a test asks")
    with pytest.raises(NotImplementedError, match="float64"):
        flash_attn_func(*tensors())
