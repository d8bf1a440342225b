"""flash_attn_with_kvcache: every sequence as if its tokens lay in one tensor, wherever its cache has them."""

import itertools

import pytest
import torch
from flashcore_kernels import path_counts
from flashcore_kernels.flash_attn import flash_attn_with_kvcache
from flashcore_kernels.flash_attn.paged import rows_as_pages

from . import definition
from .definition import allowed, off
from .test_dense import PATTERNS, ROUNDING, arguments
from .test_varlen import offsets

HELD = (7, 0, 11, 4)  # tokens that each sequence has
NEW = 3
CAPACITY = 18
HEADS, DIMS = (4, 2), (8, 8)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Case:
    """Sequences with tokens in a cache and new ones, and the cache in one of its forms; NaN where nothing is stored.

    Attributes:
        past: k and v of each sequence's tokens, `[held, Hkv, D]`.
        q, k, v: new tokens `[B, new, heads, D]`.
        caches: `[rows, S, Hkv, D]` or pages.
        arguments: what says where each sequence lies.
    """

    def __init__(
        self,
        form: str,
        held=HELD,
        leftpad=False,
        dtype=torch.float64,
        dims=DIMS,
        page_size=4,
        capacity=CAPACITY,
        new=NEW,
    ):
        generator = torch.Generator().manual_seed(1)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        batch_size = len(held)
        self.pad = [2 if leftpad and n > 2 else 0 for n in held]
        self.held, self.form = held, form
        self.past = [[normal(n - pad, HEADS[1], d) for d in dims] for n, pad in zip(held, self.pad)]
        self.q = normal(batch_size, new, HEADS[0], dims[0])
        self.k, self.v = (normal(batch_size, new, HEADS[1], d) for d in dims)
        self.arguments = {"cache_seqlens": torch.tensor(held, dtype=torch.int32)}
        if leftpad:
            self.arguments["cache_leftpad"] = torch.tensor(self.pad, dtype=torch.int32)
        rows = batch_size + 2 if form == "rows" else batch_size
        order = torch.randperm(rows, generator=generator)[:batch_size]
        if form == "pages":
            blocks = -(-capacity // page_size)
            pages = torch.randperm(batch_size * blocks + 3, generator=generator)
            self.table = pages[: batch_size * blocks].view(batch_size, blocks).to(torch.int32)
            for b, n in enumerate(held):  # blocks that no token needs, now or with the new ones, have no page
                self.table[b, -(-max(n + new, 1) // page_size) :] = -1
            self.arguments["block_table"] = self.table
            shape = len(pages), page_size
        else:
            self.row = order if form == "rows" else torch.arange(batch_size)
            if form == "rows":
                self.arguments["cache_batch_idx"] = order.to(torch.int32)
            shape = rows, capacity
        # A layer of several in one piece of memory: a cache has any strides.
        self.caches = [torch.full((shape[0], 2, shape[1], HEADS[1], d), torch.nan, dtype=dtype)[:, 1] for d in dims]
        for b, tokens in enumerate(self.past):
            for cache, states in zip(self.caches, tokens):
                for at, state in enumerate(states):
                    cache[self.place(b, self.pad[b] + at)] = state

    def place(self, b: int, slot: int) -> tuple[int, int]:
        if self.form == "pages":
            size = self.caches[0].shape[1]
            return int(self.table[b, slot // size]), slot % size
        return int(self.row[b]), slot

    def stored(self, b: int, count: int, which: int) -> torch.Tensor:
        """Tokens [pad, count) of sequence b, as the cache has them now."""
        return torch.stack([self.caches[which][self.place(b, slot)] for slot in range(self.pad[b], count)])

    def to(self, device):
        self.caches = [
            torch.empty_strided(c.shape, c.stride(), dtype=c.dtype, device=device).copy_(c) for c in self.caches
        ]
        self.q, self.k, self.v = (t.to(device) for t in (self.q, self.k, self.v))
        self.arguments = {name: t.to(device) for name, t in self.arguments.items()}
        return self

    def expected(self, new: bool = True, **options):
        """(out, lse) by the definition, of the tokens that are there and, with `new`, those that come."""
        keys, values = ([
            torch.cat([tokens[which], fresh[b]]) if new else tokens[which] for b, tokens in enumerate(self.past)
        ] for which, fresh in ((0, self.k.cpu()), (1, self.v.cpu())))  # fmt: skip
        return definition.batch(self.q.cpu(), keys, values, **options)


FORMS = ("own", "rows", "pages")


@pytest.mark.parametrize("leftpad", [False, True], ids=["", "leftpad"])
@pytest.mark.parametrize("pattern", ["full", "causal", "window", "causal-chunk"])
@pytest.mark.parametrize("form", FORMS)
def test_new_tokens(form, pattern, leftpad):
    """They lie behind the others afterwards, nothing else has changed, and they are seen."""
    case = Case(form, leftpad=leftpad)
    before = [cache.clone() for cache in case.caches]
    want, want_lse = case.expected(**PATTERNS[pattern])
    out, lse = flash_attn_with_kvcache(
        case.q, *case.caches, case.k, case.v, return_softmax_lse=True, **case.arguments, **arguments(PATTERNS[pattern])
    )
    assert off(out, want) < ROUNDING and off(lse, want_lse) < ROUNDING
    written = 0
    for b, n in enumerate(HELD):
        for which, fresh in enumerate((case.k, case.v)):
            assert torch.equal(case.stored(b, n + NEW, which)[-NEW:], fresh[b])
            for slot in range(n, n + NEW):
                before[which][case.place(b, slot)] = case.caches[which][case.place(b, slot)]
                written += 1
    assert written == 2 * len(HELD) * NEW
    for cache, was in zip(case.caches, before):
        assert torch.equal(cache.nan_to_num(9.0), was.nan_to_num(9.0))


@pytest.mark.parametrize("form", FORMS)
def test_tokens_that_are_there(form):
    """Without new ones, the queries are the last of those that are there."""
    case = Case(form, held=(7, 3, 11, 4))
    before = [cache.clone() for cache in case.caches]
    out, lse = flash_attn_with_kvcache(case.q, *case.caches, causal=True, return_softmax_lse=True, **case.arguments)
    want, want_lse = case.expected(new=False, causal=True)
    assert off(out, want) < ROUNDING and off(lse, want_lse) < ROUNDING
    assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(case.caches, before))


@pytest.mark.parametrize("form", FORMS)
def test_the_controls_bite(form):
    """Rows or pages exchanged, a length that is off by one, a window that is not heeded."""
    case = Case(form)
    want = case.expected(causal=True, window=(3, 0))[0]

    def error(window=(3, 0), **changes):
        again = Case(form)
        given = {**again.arguments, **changes}
        out = flash_attn_with_kvcache(
            again.q, *again.caches, again.k, again.v, causal=True, window_size=window, **given
        )
        return off(out, want)

    assert error() < ROUNDING
    assert not error(window=(-1, -1)) < 1e-3
    assert not error(cache_seqlens=case.arguments["cache_seqlens"] - torch.tensor([1, 0, 0, 0])) < 1e-3
    where = {"rows": "cache_batch_idx", "pages": "block_table"}.get(form)
    if where is not None:
        assert not error(**{where: case.arguments[where].flip(0)}) < 1e-3


def test_lengths_as_one_int():
    case = Case("own", held=(6, 6))
    want = case.expected(causal=True)[0]
    arguments = {**case.arguments, "cache_seqlens": 6}
    assert off(flash_attn_with_kvcache(case.q, *case.caches, case.k, case.v, causal=True, **arguments), want) < ROUNDING
    out = flash_attn_with_kvcache(case.q, *case.caches, causal=True, cache_seqlens=9)
    assert off(out, want) < ROUNDING
    full = [torch.stack([case.stored(b, 9, which) for b in range(2)]) for which in range(2)]
    assert off(flash_attn_with_kvcache(case.q, *full, causal=True), want) < ROUNDING


@pytest.mark.parametrize("capacity", [20, 32])
def test_a_sequence_beyond_its_room_sees_no_other(capacity, monkeypatch):
    """On a GPU lengths are not read, so that more new tokens may come than there is room for: they are left out."""
    monkeypatch.setattr("flashcore_kernels.flash_attn.kvcache._check_room", lambda *arguments: None)
    offsets = torch.tensor([0, 5, 6], dtype=torch.int32, device=DEVICE)
    held = torch.tensor([capacity - 2, 3], dtype=torch.int32, device=DEVICE)

    def run(added):
        generator = torch.Generator().manual_seed(1)
        shapes = (2, capacity, 1, 16), (2, capacity, 1, 16), (6, 1, 16), (6, 1, 16), (6, 1, 16)
        k_cache, v_cache, q, k, v = (torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes)
        v_cache[1, :4] += added
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=held, causal=True, cu_seqlens_q=offsets, cu_seqlens_k_new=offsets
        )

    one, other = run(0.0), run(100.0)
    assert torch.equal(one[:5], other[:5])
    assert not torch.equal(one[5:], other[5:])


@pytest.mark.parametrize("form", FORMS)
def test_sequences_that_are_none(form):
    """A batch is padded with sequences of -1 tokens, whose blocks are -1: no place is written, and zeros come out."""
    case = Case(form)
    want = case.expected(causal=True)[0]
    case.arguments["cache_seqlens"][1] = -1
    if form == "pages":
        case.table[1] = -1
    before = [cache.clone() for cache in case.caches]
    out, lse = flash_attn_with_kvcache(
        case.q, *case.caches, case.k, case.v, causal=True, return_softmax_lse=True, **case.arguments
    )
    others = [0, 2, 3]
    assert off(out[others], want[others]) < ROUNDING
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()
    for b in others:
        for slot, which in itertools.product(range(HELD[b], HELD[b] + NEW), range(2)):
            before[which][case.place(b, slot)] = case.caches[which][case.place(b, slot)]
    assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(case.caches, before))

    before = [cache.clone() for cache in case.caches]
    for none in (torch.full_like(case.arguments["cache_seqlens"], -1), -1):
        case.arguments["cache_seqlens"] = none
        out = flash_attn_with_kvcache(case.q, *case.caches, case.k, case.v, causal=True, **case.arguments)
        assert (out == 0).all()
    assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(case.caches, before))


@pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "halves"])
@pytest.mark.parametrize("pattern", ["full", "causal", "window"])
@pytest.mark.parametrize("own_positions", [False, True], ids=["", "rotary_seqlens"])
def test_rotary(pattern, interleaved, own_positions):
    """New keys at their places; queries too where the pattern has places, else all at the first."""
    case = Case("pages")
    angle = torch.rand(40, 3, dtype=torch.float64) * 6
    cos, sin = angle.cos().float(), angle.sin().float()
    given = {"rotary_seqlens": torch.tensor([1, 5, 0, 20], dtype=torch.int32)} if own_positions else {}
    start = given.get("rotary_seqlens", case.arguments["cache_seqlens"])
    turned = Case("pages")
    for b in range(len(HELD)):
        places = int(start[b]) + torch.arange(NEW)
        turned.k[b] = definition.rotated(case.k[b], cos.double(), sin.double(), places, interleaved)
        places = places if pattern != "full" else places[:1].expand(NEW)
        turned.q[b] = definition.rotated(case.q[b], cos.double(), sin.double(), places, interleaved)
    want = turned.expected(**PATTERNS[pattern])[0]
    out = flash_attn_with_kvcache(
        case.q, *case.caches, case.k, case.v, cos, sin, rotary_interleaved=interleaved, **given, **case.arguments,
        **arguments(PATTERNS[pattern]),
    )  # fmt: skip
    coarse = 1e-5  # turning is float32's
    assert off(out, want) < coarse and off(case.stored(2, 14, 0)[-NEW:], turned.k[2]) < coarse
    assert off(out, case.expected(**PATTERNS[pattern])[0]) > 1e-2
    assert torch.equal(case.stored(2, 14, 1)[-NEW:], case.v[2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pattern", ["causal", "window"])
def test_prompts_and_single_tokens_in_one_call(form, pattern):
    """q, and new keys, of different lengths behind each other."""
    queries, new = (3, 1, 0, 2), (3, 2, 0, 1)
    case = Case(form, leftpad=True)
    q = torch.cat([case.q[b, :n] for b, n in enumerate(queries)])
    fresh = [torch.cat([t[b, :n] for b, n in enumerate(new)]) for t in (case.k, case.v)]
    fresh = [torch.cat([t, torch.full((2, *t.shape[1:]), torch.nan, dtype=t.dtype)]) for t in fresh]  # behind the last
    before = [cache.clone() for cache in case.caches]
    out, lse = flash_attn_with_kvcache(
        q, *case.caches, *fresh, cu_seqlens_q=offsets(queries), cu_seqlens_k_new=offsets(new), max_seqlen_q=3,
        return_softmax_lse=True, **case.arguments, **arguments(PATTERNS[pattern]),
    )  # fmt: skip
    cu = offsets(queries)
    for b in range(len(HELD)):
        k, v = (torch.cat([past, t[b, : new[b]]]) for past, t in zip(case.past[b], (case.k, case.v)))
        want, want_lse = definition.attend(case.q[b, : queries[b]], k, v, **PATTERNS[pattern])
        own = slice(cu[b], cu[b + 1])
        if queries[b]:
            assert off(out[own], want) < ROUNDING and off(lse[:, own], want_lse) < ROUNDING
        for slot, which in itertools.product(range(HELD[b], HELD[b] + new[b]), range(2)):
            before[which][case.place(b, slot)] = case.caches[which][case.place(b, slot)]
    assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(case.caches, before))


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_features(packed):
    case = Case("pages", dims=(4, 8))
    slopes = torch.randint(1, 16, (len(HELD), 4)) / 16
    sinks = torch.randn(4, dtype=torch.float64)
    qv = torch.randn(len(HELD), NEW, 4, 8, dtype=torch.float64)
    for ours, theirs in (
        ({"alibi_slopes": slopes}, {"slopes": list(slopes)}),
        ({"s_aux": sinks, "softcap": 2.0}, {"sinks": sinks, "softcap": 2.0}),
        ({"qv": qv.flatten(0, 1) if packed else qv}, {"qv": list(qv)}),
    ):
        case = Case("pages", dims=(4, 8))
        more = {"cu_seqlens_q": offsets([NEW] * len(HELD))} if packed else {}
        q = case.q.flatten(0, 1) if packed else case.q
        out = flash_attn_with_kvcache(q, *case.caches, case.k, case.v, causal=True, **ours, **more, **case.arguments)
        want = case.expected(causal=True, **theirs)[0]
        assert off(out.view(want.shape), want) < ROUNDING, list(ours)


@pytest.mark.parametrize("form", FORMS)
def test_fp8(form):
    """A cache in e4m3 with a scale for each sequence and head; new tokens come in e4m3."""
    case = Case(form, dtype=torch.float32)
    case.caches = [c.to(torch.float8_e4m3fn) for c in case.caches]
    case.k, case.v = (t.to(torch.float8_e4m3fn) for t in (case.k, case.v))
    scales = [torch.rand(len(HELD), 2) + 0.5 for _ in range(2)]
    case.past = [
        [t.to(torch.float8_e4m3fn).float() * s[b][:, None] for t, s in zip(tokens, scales)]
        for b, tokens in enumerate(case.past)
    ]
    given = {"k_descale": scales[0], "v_descale": scales[1]}
    q = case.q.to(torch.bfloat16)
    out = flash_attn_with_kvcache(q, *case.caches, case.k, case.v, causal=True, **given, **case.arguments)
    case.q = q
    case.k, case.v = (t.float() * s[:, None, :, None] for t, s in zip((case.k, case.v), scales))
    want = case.expected(causal=True)[0]
    assert off(out, want) < allowed(case.expected(causal=True, dtype=torch.bfloat16)[0], want)


def test_no_gradients():
    case = Case("own")
    out = flash_attn_with_kvcache(case.q.requires_grad_(), *case.caches, **case.arguments)
    assert not out.requires_grad


def test_nothing_is_read_on_the_host():
    case = Case("pages")
    meta = {name: t.to("meta") for name, t in case.arguments.items()}
    caches = [c.to("meta") for c in case.caches]
    out = flash_attn_with_kvcache(
        case.q.to("meta"), *caches, case.k.to("meta"), case.v.to("meta"), causal=True, window_size=(4, 4), **meta
    )
    assert out.is_meta and out.shape == case.q.shape


ONE = torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"v": None}, "k and v: one is None"),
        ({"cache_seqlens": None}, "cache_seqlens: it says where"),
        ({"cache_seqlens": 16}, "k and v: a sequence would hold 19 tokens.*room for 18. Nothing was written"),
        ({"cache_seqlens": torch.tensor([7, 0, 16, 4], dtype=torch.int32)}, "would hold 19 tokens"),
        ({"cache_seqlens": ONE}, "cache_seqlens: got"),
        ({"cache_leftpad": ONE}, "cache_leftpad: got"),
        ({"cache_batch_idx": ONE}, "cache_batch_idx: got"),
        ({"block_table": ONE[None], "page_table": ONE[None]}, "two names"),
        ({"block_table": ONE[None]}, "block_table: got 1 rows for 4 sequences"),
        ({"cu_seqlens_k_new": ONE}, "k: got"),
        ({"rotary_cos": torch.ones(40, 4)}, "rotary_cos and rotary_sin: one is None"),
        ({"rotary_cos": torch.ones(40, 5), "rotary_sin": torch.ones(40, 5)}, "at most head_dim"),
        ({"k": torch.zeros(4, 3, 2, 8)}, "k: got torch.float32"),
        ({"q": torch.zeros(4, 3, 3, 8, dtype=torch.float64)}, "q and k_cache: got"),
        ({"q": torch.zeros(4, 3, 4, 8)}, "q and k_cache: got"),
    ],
    ids=str,
)
def test_refused(changes, said):
    """Before anything is written."""
    case = Case("own")
    before = [cache.clone() for cache in case.caches]
    given = {"q": case.q, "k": case.k, "v": case.v, **case.arguments, **changes}
    with pytest.raises(ValueError, match=said):
        flash_attn_with_kvcache(given.pop("q"), *case.caches, **given)
    assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(case.caches, before))


def test_rotary_needs_new_keys():
    case = Case("own")
    with pytest.raises(ValueError, match="k and v are needed"):
        flash_attn_with_kvcache(case.q, *case.caches, rotary_cos=torch.ones(9, 4), rotary_sin=torch.ones(9, 4))


KERNELS = [
    # form, capacity, packed, leftpad -> whether the kernel for pages serves it
    ("own", 18, False, True, False), ("rows", 18, False, False, False), ("pages", 18, False, True, False),
    ("pages", 18, False, False, True), ("pages", 18, True, False, True), ("rows", 48, False, False, True),
    ("rows", 48, True, False, True), ("own", 48, True, False, True), ("own", 48, False, False, False),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form, capacity, packed, leftpad, paged", KERNELS)
def test_kernels(form, capacity, packed, leftpad, paged, dtype, monkeypatch):
    """By kernels alone, those for pages where they can: with a sequence that is none, a window and sinks."""
    monkeypatch.setenv("FLASHCORE_STRICT", "1")
    case = Case(form, leftpad=leftpad, dtype=dtype, dims=(16, 16), capacity=capacity).to(DEVICE)
    case.caches = [c.contiguous() for c in case.caches] if form != "pages" else case.caches
    case.arguments["cache_seqlens"][1] = -1
    q, k, v = (t.flatten(0, 1) if packed else t for t in (case.q, case.k, case.v))
    cu = offsets([NEW] * len(HELD)).to(DEVICE)
    more = {"cu_seqlens_q": cu, "cu_seqlens_k_new": cu} if packed else {}
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)
    before = path_counts["flashcore_paged"]
    out, lse = flash_attn_with_kvcache(
        q, *case.caches, k, v, causal=True, window_size=(5, 0), s_aux=sinks, return_softmax_lse=True, **more,
        **case.arguments,
    )  # fmt: skip
    assert (path_counts["flashcore_paged"] > before) == paged
    options = {"causal": True, "window": (5, 0), "sinks": sinks.cpu()}
    want, want_lse = case.expected(**options)
    peer = case.expected(dtype=dtype, **options)[0]
    out, others = out.cpu().view(want.shape), [0, 2, 3]
    lse = lse.cpu().view(4, len(HELD), NEW).transpose(0, 1) if packed else lse.cpu()
    assert off(out[others], want[others]) <= allowed(peer, want) and off(lse[others], want_lse[others]) < 1e-3
    assert (out[1] == 0).all()
    for b in others:
        assert torch.equal(case.stored(b, HELD[b] + NEW, 1)[-NEW:], case.v[b])


@pytest.mark.parametrize("length, page_size", [(48, 16), (1024, 1024), (4096, 1024), (24, None), (33, None)])
def test_rows_as_pages(length, page_size):
    cache = torch.randn(3, length, 2, 4)
    pages = rows_as_pages(cache)
    if page_size is None:
        assert pages is None
        return
    assert pages.shape == (3 * length // page_size, page_size, 2, 4) and pages.data_ptr() == cache.data_ptr()
    assert torch.equal(pages.reshape(cache.shape), cache)
    layer = torch.randn(3, length, 2, 2, 4)[:, :, 1]  # one of several in a piece of memory
    assert torch.equal(rows_as_pages(layer).reshape(layer.shape), layer)
    assert rows_as_pages(torch.randn(3, length + 1, 2, 4)[:, :length]) is None
