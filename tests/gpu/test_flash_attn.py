"""FlashAttention's functions by compiled kernels: against its definition in float64, without a synchronisation."""

import itertools

import pytest
import torch
from flashcore_kernels import make_document_ranges, visible
from flashcore_kernels.document_ranges import document_rows
from flashcore_kernels.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

from ..kernels.flash_attn import definition
from ..kernels.flash_attn.definition import allowed, off
from ..kernels.flash_attn.test_dense import PATTERNS, arguments, tensors
from ..kernels.flash_attn.test_kvcache import Case
from ..kernels.flash_attn.test_varlen import alone, offsets

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
HEADS = (8, 2)
LARGE = {
    "window": (200, 30),
    "causal-window": (100, 100),
    "left": (150, -1),
    "right": (-1, 20),
    "window-chunk": (90, 90),
}


@pytest.fixture(autouse=True)
def no_fallback_and_no_synchronisation(monkeypatch):
    """A fallback is an error, and so is whatever waits for the GPU inside of `strictly`."""
    monkeypatch.setenv("FLASHCORE_STRICT", "1")


def strictly(function, *given, **options):
    """The call, twice: a first one may compile. In the second, waiting for the GPU is an error."""
    function(*given, **options)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return function(*given, **options)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def pattern_of(name: str) -> dict:
    """The patterns of the CPU's tests, with windows and chunks for hundreds of keys."""
    pattern = dict(PATTERNS[name])
    if "window" in pattern:
        pattern["window"] = LARGE[name]
    if "chunk" in pattern:
        pattern["chunk"] = 128
    return pattern


def test_waiting_is_an_error():
    with pytest.raises(RuntimeError, match="synchroniz"):
        strictly(lambda: torch.ones(1, device="cuda").item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_batches(pattern, head_dim, dtype):
    pattern = pattern_of(pattern)
    for lengths in ((1, 1000), (129, 129), (300, 700), (513, 200)):
        q, k, v = (t.cuda() for t in tensors(*lengths, heads=HEADS, dims=(head_dim, head_dim), dtype=DTYPES[dtype]))
        out, lse, _ = strictly(flash_attn_func, q, k, v, return_attn_probs=True, **arguments(pattern))
        want, want_lse = definition.batch(q, k, v, **pattern)
        peer = definition.batch(q, k, v, dtype=DTYPES[dtype], **pattern)[0]
        assert off(out, want) <= allowed(peer, want), lengths
        assert off(lse, want_lse) < 1e-3, lengths


def sequences(dtype, head_dim, count=24, longest=400, seed=0):
    """q, k, v, cu_q, cu_k of sequences of 0 to `longest` tokens, half of them with more keys than queries."""
    draw = torch.Generator().manual_seed(seed)
    new = torch.randint(0, longest, (count,), generator=draw)
    new[::5], new[1::7] = 0, 1
    past = torch.randint(0, longest, (count,), generator=draw) * (torch.arange(count) % 2)
    cu_q, cu_k = offsets(new.tolist()), offsets((new + past).tolist())
    shapes = (cu_q[-1], HEADS[0]), (cu_k[-1], HEADS[1]), (cu_k[-1], HEADS[1])
    made = [torch.randn(*shape, head_dim, generator=draw).to(dtype).cuda() for shape in shapes]
    return *made, cu_q, cu_k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sequences(pattern, head_dim, dtype):
    pattern, dtype = pattern_of(pattern), DTYPES[dtype]
    q, k, v, cu_q, cu_k = sequences(dtype, head_dim)
    out, lse, _ = strictly(
        flash_attn_varlen_func, q, k, v, cu_q.cuda(), cu_k.cuda(), None, None, return_attn_probs=True,
        **arguments(pattern),
    )  # fmt: skip
    want, want_lse = alone(q, k, v, cu_q, cu_k, **pattern)
    peer = alone(q, k, v, cu_q, cu_k, dtype=dtype, **pattern)[0]
    assert off(out, want) <= allowed(peer, want) and off(lse, want_lse) < 1e-3


def test_one_graph_serves_all_lengths():
    q, k, v, cu_q, cu_k = sequences(torch.bfloat16, 128)
    total = min(q.shape[0], k.shape[0])
    q, k, v = q[:total], k[:total], v[:total]
    cu = torch.tensor([0, total // 2, total], dtype=torch.int32, device="cuda")

    def call():
        return flash_attn_varlen_func(q, k, v, cu, cu, None, None, causal=True)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for middle in (1, total // 3, total - 7):
        cu.copy_(torch.tensor([0, middle, total], dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, call())
        want = alone(q, k, v, cu.cpu(), cu.cpu(), causal=True)[0]
        assert off(out, want) <= allowed(alone(q, k, v, cu.cpu(), cu.cpu(), causal=True, dtype=q.dtype)[0], want)


@pytest.mark.parametrize("pattern", [{}, {"right": 0}, {"left": 99, "right": 0}, {"chunk": 64, "right": 5}], ids=str)
@pytest.mark.parametrize("used", [False, True], ids=["", "used"])
def test_document_ranges(pattern, used):
    """The kernel's lines are the operators', and it is the kernel that makes them."""
    q, k, _, cu_q, cu_k = sequences(torch.bfloat16, 8, count=100)
    cu_q, cu_k = cu_q.cuda(), cu_k.cuda()
    pattern = {**pattern, "used_queries": (cu_q.diff() // 2).to(torch.int32) if used else None}
    got = make_document_ranges(q.shape[0], k.shape[0], cu_q, cu_k[:-1], cu_k[1:], **pattern)
    rows = document_rows(q.shape[0], cu_q, cu_k[:-1], cu_k[1:], **pattern)
    seen = visible(got, q.shape[0], k.shape[0])[0, 0]
    key = torch.arange(k.shape[0], device="cuda")
    assert torch.equal(seen, (key >= rows.first[:, None]) & (key < rows.end[:, None]))
    with torch.profiler.profile() as profile:
        make_document_ranges(q.shape[0], k.shape[0], cu_q, cu_k[:-1], cu_k[1:], **pattern)
        torch.cuda.synchronize()
    assert any("flashcore_document_ranges" in event.name for event in profile.events())


FORMS = [("own", 0), ("rows", 0), ("pages", 16), ("pages", 64), ("pages", 256)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", [1, 5, 70])
@pytest.mark.parametrize("form, page_size", FORMS, ids=str)
def test_caches(form, page_size, new, dtype):
    dtype = DTYPES[dtype]
    for pattern, leftpad in itertools.product(("causal", "causal-window"), (False, True)):
        case = Case(
            form, (300, 0, 411, 5, 128), leftpad, dtype, (128, 128), page_size or 4, capacity=512, new=new
        ).to("cuda")  # fmt: skip
        pattern = pattern_of(pattern)
        if form != "pages" and new == 5:
            case.caches = [cache.contiguous() for cache in case.caches]  # whose rows are pages too
        out, lse = strictly(
            flash_attn_with_kvcache, case.q, *case.caches, case.k, case.v, return_softmax_lse=True, **case.arguments,
            **arguments(pattern),
        )  # fmt: skip
        want, want_lse = case.expected(**pattern)
        peer = case.expected(dtype=dtype, **pattern)[0]
        assert off(out.cpu(), want) <= allowed(peer, want) and off(lse.cpu(), want_lse) < 1e-3
        for b, held in enumerate(case.held):
            assert torch.equal(case.stored(b, held + new, 0)[-new:], case.k[b])
            assert torch.equal(case.stored(b, held + new, 1)[-new:], case.v[b])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form, page_size", FORMS, ids=str)
def test_prompts_and_single_tokens_in_one_call(form, page_size, dtype):
    """Queries, and new tokens, behind each other; tokens behind a cache's end, and of no sequence, go nowhere."""
    held, new = (300, 0, 411, 5, 128), (1, 70, 1, 33, 1)
    case = Case(form, held, False, DTYPES[dtype], (128, 128), page_size or 4, capacity=512, new=70).to("cuda")
    case.caches = [cache.contiguous() for cache in case.caches]
    cu = offsets(new).cuda()
    q, k, v = (torch.cat([t[b, :n] for b, n in enumerate(new)]) for t in (case.q, case.k, case.v))
    out, lse = strictly(
        flash_attn_with_kvcache, q, *case.caches, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k_new=cu,
        return_softmax_lse=True, **case.arguments,
    )  # fmt: skip
    for b, n in enumerate(new):
        keys, values = (torch.cat([p, t[b, :n].cpu()]) for p, t in zip(case.past[b], (case.k, case.v)))
        want, want_lse = definition.attend(case.q[b, :n].cpu(), keys, values, causal=True)
        peer = definition.attend(case.q[b, :n].cpu(), keys, values, causal=True, dtype=DTYPES[dtype])[0]
        own = slice(int(cu[b]), int(cu[b + 1]))
        assert off(out[own].cpu(), want) <= allowed(peer, want) and off(lse[:, own].cpu(), want_lse) < 1e-3
        assert torch.equal(case.stored(b, held[b] + n, 0)[-n:], case.k[b, :n])
    before = [cache.clone() for cache in case.caches]
    nowhere = torch.tensor([-1, -1, 512, -1, -1], dtype=torch.int32, device="cuda")
    given = {**case.arguments, "cache_seqlens": nowhere}
    flash_attn_with_kvcache(q, *case.caches, k, v, causal=True, cu_seqlens_q=cu, cu_seqlens_k_new=cu, **given)
    assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(case.caches, before))


@pytest.mark.parametrize("form, page_size", FORMS, ids=str)
def test_one_graph_decodes(form, page_size):
    """A step captured once, replayed for lengths that grow, with a sequence that is none."""
    held = (300, 17, 411, 5)
    case, eager = (
        Case(form, held, False, torch.bfloat16, (128, 128), page_size or 4, capacity=512, new=1).to("cuda")
        for _ in range(2)
    )
    lengths = case.arguments["cache_seqlens"]

    def step(case, lengths):
        given = {**case.arguments, "cache_seqlens": lengths}
        return flash_attn_with_kvcache(case.q, *case.caches, case.k, case.v, causal=True, **given)

    step(case, lengths)  # a first call may compile
    step(eager, lengths)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(case, lengths)
    for grown in range(3):
        now = torch.tensor([n + grown for n in held], dtype=torch.int32)
        now[1] = -1
        lengths.copy_(now)
        graph.replay()
        want = step(eager, now.cuda())
        assert torch.equal(out, want) and (out[1] == 0).all() and (out[0] != 0).any()
    for ours, theirs in zip(case.caches, eager.caches):
        assert torch.equal(ours.nan_to_num(9.0), theirs.nan_to_num(9.0))


@pytest.mark.parametrize("feature", ["alibi", "sinks", "softcap", "qv", "fp8"])
def test_features(feature):
    q, k, v = (t.cuda() for t in tensors(150, 333, heads=HEADS, dims=(64, 64), dtype=torch.bfloat16))
    options = {
        "alibi": {"slopes": torch.arange(1, 9, device="cuda") / 16},
        "sinks": {"sinks": torch.linspace(-1, 2, 8, device="cuda")},
        "softcap": {"softcap": 3.0},
        "qv": {"qv": torch.randn_like(q)},
        "fp8": {},
    }[feature]
    full = q, k, v
    if feature == "fp8":
        q, k, v = (t.to(torch.float8_e4m3fn) for t in (q, k, v))
        full = tuple(t.to(torch.bfloat16) for t in (q, k, v))
    given = {"s_aux" if name == "sinks" else name: option for name, option in arguments(options).items()}
    out = strictly(flash_attn_func, q, k, v, causal=True, **given)
    options = {name: list(option) if name == "qv" else option for name, option in options.items()}
    want = definition.batch(*full, causal=True, **options)[0]
    peer = definition.batch(*full, causal=True, dtype=torch.bfloat16, **options)[0]
    assert off(out, want) <= allowed(peer, want)


@pytest.mark.parametrize("pattern", ["full", "causal", "causal-window"])
def test_gradients(pattern, monkeypatch):
    """By whatever `attention` has for them; three times a peer's error, as for all gradients."""
    pattern = pattern_of(pattern)
    q, k, v, cu_q, cu_k = sequences(torch.bfloat16, 64, count=6, longest=200)
    weights = torch.randn_like(q)

    def gradients(call, dtype):
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        (call(*leaves) * weights.to(dtype)).sum().backward()
        return [leaf.grad for leaf in leaves]

    got = gradients(
        lambda q, k, v: flash_attn_varlen_func(q, k, v, cu_q.cuda(), cu_k.cuda(), None, None, **arguments(pattern)),
        torch.bfloat16,
    )
    want = gradients(lambda q, k, v: alone(q, k, v, cu_q, cu_k, **pattern)[0], torch.float64)
    peer = gradients(lambda q, k, v: alone(q, k, v, cu_q, cu_k, dtype=torch.bfloat16, **pattern)[0], torch.bfloat16)
    for ours, exact, theirs in zip(got, want, peer):
        assert off(ours, exact) <= 3 * off(theirs, exact) + torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
