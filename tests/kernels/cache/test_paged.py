"""Attention on pages: the answers of attention over each sequence's own keys, wherever they lie, and the same bits."""

import itertools
from typing import NamedTuple

import pytest
import torch
from flashcore_kernels import Pages, attention, paged_attention, path_counts, write_pages
from flashcore_kernels.cache import paged
from flashcore_kernels.device import Device, device_of
from flashcore_kernels.paged_problem import PagedProblem
from flashcore_kernels.portable.paged.choose import choose_paged, shares

from ..reference import Call, assert_right

pytestmark = pytest.mark.usefixtures("poisoned_empty")

HEADS, KV_HEADS = 4, 2
# Prompts from nothing and behind past keys, single tokens, an empty sequence, one without keys, more queries than keys.
MIXED = ((5, 5), (1, 130), (0, 0), (70, 100), (1, 1), (1, -1), (3, 90), (4, 2))
SINGLE = ((1, 77), (1, 1), (0, 0), (1, -1), (1, 200))


class Batch(NamedTuple):
    """Queries of several sequences, their pages, and what each has: `[n, H, D]`, `[L, Hkv, D]`, `[L, Hkv, Dv]`."""

    query: torch.Tensor
    pages: Pages
    own: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    new_key: torch.Tensor
    new_value: torch.Tensor

    def run(self, **arguments):
        return paged_attention(self.query, self.pages, **arguments)


def build(
    lengths=MIXED, *, page_size=16, ring=0, dtype=torch.float16, head_dim=32, value_dim=None, heads=(HEADS, KV_HEADS),
    padding=3, device="cpu", seed=0, filled=True, cumulative=False,
) -> Batch:  # fmt: skip
    """`lengths`: (queries, keys) of each sequence. Whatever no sequence has is NaN, in pages and among the tokens.

    filled: the pages hold the queries' own keys too.
    """
    generator = torch.Generator().manual_seed(seed)
    value_dim = value_dim or head_dim
    slots = [min(max(keys, 0), ring or keys) for _, keys in lengths]
    width = max(-(-max(*slots, ring) // page_size), 1)
    order = torch.randperm(len(lengths) * width + 2, generator=torch.Generator().manual_seed(1))
    table = torch.full((len(lengths), width + 1), -1, dtype=torch.int32)
    nan = float("nan")
    # Strides as in Transformers' pools: keys and values of a page behind each other, and other layers between pages.
    pool = torch.full((len(order), 3, page_size, heads[1], max(head_dim, value_dim)), nan, dtype=dtype)
    key_pages, value_pages = pool[:, 0, ..., :head_dim], pool[:, 1, ..., :value_dim]
    total = sum(n for n, _ in lengths) + padding
    query = torch.full((total, heads[0], head_dim), nan, dtype=dtype)
    new_key = torch.full((total, heads[1], head_dim), nan, dtype=dtype)
    new_value = torch.full((total, heads[1], value_dim), nan, dtype=dtype)
    own, at = [], 0
    for s, (n, keys) in enumerate(lengths):
        keys = max(keys, 0)
        q = torch.randn(n, heads[0], head_dim, generator=generator).to(dtype)
        k = torch.randn(keys, heads[1], head_dim, generator=generator).to(dtype)
        v = torch.randn(keys, heads[1], value_dim, generator=generator).to(dtype)
        own.append((q, k, v))
        query[at : at + n] = q
        fresh = min(n, keys)
        if fresh:
            new_key[at + n - fresh : at + n], new_value[at + n - fresh : at + n] = k[-fresh:], v[-fresh:]
        pages = -(-slots[s] // page_size)
        table[s, :pages] = order[s * width : s * width + pages]
        stored = keys if filled else keys - fresh
        for place in range(max(stored - ring, 0) if ring else 0, stored):
            slot = place % ring if ring else place
            key_pages[table[s, slot // page_size], slot % page_size] = k[place]
            value_pages[table[s, slot // page_size], slot % page_size] = v[place]
        at += n
    bounds = torch.tensor([0, *itertools.accumulate(n for n, _ in lengths)], dtype=torch.int32)
    counts = torch.tensor([keys for _, keys in lengths], dtype=torch.int32)
    if cumulative:
        counts = torch.tensor([0, *itertools.accumulate(max(keys, 0) for _, keys in lengths)], dtype=torch.int32)
    key_pages, value_pages = (pool.to(device)[:, i, ..., :d] for i, d in ((0, head_dim), (1, value_dim)))
    tensors = (t.to(device) for t in (table, bounds, counts))
    return Batch(
        query.to(device), Pages(key_pages, value_pages, *tensors, ring),
        [tuple(t.to(device) for t in each) for each in own], new_key.to(device), new_value.to(device),
    )  # fmt: skip


def sequence_call(own, arguments) -> Call:
    """What a sequence asks, as a call on its own keys."""
    q, k, v = (t.transpose(0, 1)[None] for t in own)
    return Call(q, k, v, {"is_causal": True, **arguments})


def assert_all_right(batch: Batch, output, lse=None, **arguments) -> None:
    bounds = batch.pages.cu_seqlens_q.tolist()
    for s, own in enumerate(batch.own):
        got = output[bounds[s] : bounds[s + 1]]
        if len(own[0]) and len(own[1]):
            of_lse = None if lse is None else lse[:, bounds[s] : bounds[s + 1]][None]
            assert_right(got.transpose(0, 1)[None], sequence_call(own, arguments), of_lse)
        else:
            assert not got.any(), f"sequence {s} has no keys, and an answer"
            if lse is not None and "sinks" not in arguments:
                assert (lse[:, bounds[s] : bounds[s + 1]] == -torch.inf).all()
    assert not output[bounds[-1] :].any(), "padding is not 0"


@pytest.mark.parametrize("arch", [0, 90], ids=["chunks-from-the-first-key", "chunks-from-a-page"])
@pytest.mark.parametrize(
    "layout", [{"page_size": 16}, {"page_size": 64}, {"page_size": 256}, {"page_size": 64, "cumulative": True}], ids=str
)
@pytest.mark.parametrize("arguments", [{}, {"window": 20}, {"softcap": 3.0}, {"is_causal": False}], ids=str)
def test_right(arch, layout, arguments, device, paged_on):
    paged_on(arch)
    batch = build(device=device, **layout)
    output, lse = batch.run(return_lse=True, **arguments)
    assert_all_right(batch, output, lse, **arguments)


@pytest.fixture
def paged_on(monkeypatch):
    """paged_on(arch): choose as for that compute capability, where the interpreter runs the kernels."""

    def choose_as(arch: int) -> None:
        if not torch.cuda.is_available():
            monkeypatch.setattr(paged, "device_of", lambda _: Device("interpreter", arch))

    return choose_as


@pytest.mark.parametrize("ring, window", [(32, 20), (64, 64), (24, 21), (24, 1)])
@pytest.mark.parametrize("arch", [0, 90])
def test_ring_and_new_keys(ring, window, arch, device, paged_on):
    """Layers with a window: past keys in a ring, which the new ones have not yet entered."""
    paged_on(arch)
    batch = build(device=device, ring=ring, filled=False)
    output = batch.run(new_key=batch.new_key, new_value=batch.new_value, window=window)
    assert_all_right(batch, output, window=window)


@pytest.mark.parametrize("ring, window", [(32, 20), (64, 64), (24, 21)])
def test_single_tokens_in_a_ring(ring, window, device, paged_on):
    """What a single token overwrites is just out of its window: write first, then attend."""
    paged_on(90)
    batch = build(SINGLE, device=device, ring=ring, filled=False, padding=0)
    write_pages(batch.pages, batch.new_key, batch.new_value)
    assert_all_right(batch, batch.run(max_queries=1, window=window), window=window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [(4, 2), (7, 1), (3, 3)])
def test_dtypes_and_groups(dtype, heads, device):
    batch = build(device=device, dtype=dtype, heads=heads, page_size=32)
    sinks = torch.randn(heads[0], generator=torch.Generator().manual_seed(3)).to(device)
    output, lse = batch.run(sinks=sinks, return_lse=True)
    assert_all_right(batch, output, lse, sinks=sinks)


def test_other_head_dims(device):
    batch = build(device=device, head_dim=40, value_dim=24)
    assert_all_right(batch, batch.run())


@pytest.mark.parametrize("arch", [0, 90])
def test_single_tokens(arch, device, paged_on):
    """No programs for prompts; the padding is written nonetheless, by those of empty sequences."""
    paged_on(arch)
    batch = build(SINGLE, device=device, padding=1)
    assert_all_right(batch, batch.run(max_queries=1))


@pytest.mark.parametrize("arch", [0, 90])
@pytest.mark.parametrize("page_size", [16, 128])
def test_bits_are_those_of_a_sequence_alone(arch, page_size, device, paged_on):
    """Whatever it is batched with, and whatever the size of a page."""
    paged_on(arch)
    batch = build(device=device, page_size=page_size)
    output, bounds = batch.run(), batch.pages.cu_seqlens_q.tolist()
    for s, own in enumerate(batch.own):
        if not len(own[0]):
            continue
        pages = batch.pages
        one = Pages(
            pages.key, pages.value, pages.block_table[s : s + 1],
            torch.tensor([0, len(own[0])], dtype=torch.int32, device=device), pages.key_lengths[s : s + 1],
        )  # fmt: skip
        alone = paged_attention(own[0], one, max_queries=len(own[0]))
        assert torch.equal(alone, output[bounds[s] : bounds[s + 1]]), f"sequence {s}"
    other = build(device=device, page_size=64)
    assert torch.equal(other.query.nan_to_num(), batch.query.nan_to_num()) and torch.equal(other.run(), output)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on Hopper other kernels serve what has no pages")
@pytest.mark.parametrize("window", [None, 20])
def test_bits_are_those_without_pages(window, device, products_row_by_row, paths=path_counts):
    batch = build(device=device, page_size=16)
    output, bounds = batch.run(window=window), batch.pages.cu_seqlens_q.tolist()
    for s, own in enumerate(batch.own):
        if len(own[0]) and len(own[1]) and len(own[0]) in (1, 70):
            paths.clear()
            q, k, v = (t.transpose(0, 1)[None] for t in own)
            whole = attention(q, k, v, is_causal=True, window=window)[0].transpose(0, 1)
            assert set(paths) == {"flashcore_decode" if len(own[0]) == 1 else "flashcore_forward"}
            assert torch.equal(output[bounds[s] : bounds[s + 1]], whole), f"sequence {s}"


class TestControls:
    """What must show."""

    @staticmethod
    def wrong(batch: Batch, pages: Pages, **arguments) -> None:
        with pytest.raises(AssertionError):
            assert_all_right(batch, paged_attention(batch.query, pages, **arguments))

    def test_pages_swapped(self, device):
        batch = build(device=device)
        table = batch.pages.block_table.clone()
        table[3, :2] = table[3, :2].flip(0)
        self.wrong(batch, batch.pages._replace(block_table=table))

    def test_lengths_off_by_one(self, device):
        batch = build(device=device)
        self.wrong(batch, batch.pages._replace(key_lengths=batch.pages.key_lengths - 1))

    def test_window_ignored(self, device):
        batch = build(device=device)
        self.wrong(batch, batch.pages, window=20)

    def test_new_keys_ignored(self, device):
        batch = build(device=device, ring=32, filled=False)
        with pytest.raises(AssertionError):
            assert_all_right(batch, batch.run(window=20), window=20)


class TestWrite:
    @pytest.mark.parametrize("ring", [0, 24, 64])
    @pytest.mark.parametrize("lengths", [MIXED, SINGLE], ids=["mixed", "single"])
    def test_what_is_written(self, lengths, ring, device):
        """The pages are then those of a batch that was built with all keys, and nothing else in the pool changed."""
        before, after = (build(lengths, device=device, ring=ring, filled=filled) for filled in (False, True))
        write_pages(before.pages, before.new_key, before.new_value)
        for got, want in zip(before.pages[:2], after.pages[:2]):
            if not ring:
                assert torch.equal(got.isnan(), want.isnan())
            # A ring keeps older keys where a filled one, which never held them, has NaN.
            assert torch.equal(got[~want.isnan()], want[~want.isnan()])

    @pytest.mark.parametrize("ring", [0, 24])
    def test_the_kernel_writes_what_pytorch_writes(self, ring, device):
        write = pytest.importorskip("flashcore_kernels.portable.paged.write")
        batches = [build(device=device, ring=ring, filled=False, head_dim=40, value_dim=24) for _ in range(2)]
        # Entries of -1, and tokens for which there is none, are left out.
        for batch in batches:
            batch.pages.block_table[3, 1] = -1
        by_kernel, by_torch = batches
        pages = by_kernel.pages
        write.run_write_pages(pages.key, pages.value, by_kernel.new_key, by_kernel.new_value, *pages[2:6], None, None)
        pages = by_torch.pages
        token, page, inside = paged._slots(pages, by_torch.new_key.shape[0])
        pages.key[page, inside], pages.value[page, inside] = by_torch.new_key[token], by_torch.new_value[token]
        assert len(token) > 70 or ring
        for got, want in zip(by_kernel.pages[:2], by_torch.pages[:2]):
            assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))

    def test_e4m3(self, device):
        """Stored divided by a head's scale, and read multiplied with it."""
        if device.type == "cuda" and device_of(device).arch < 89:
            pytest.skip("no e4m3")
        batch = build(device=device, filled=False, lengths=((5, 5), (33, 33)))
        scales = torch.tensor([0.03, 0.07], device=device)
        stored = [torch.zeros_like(pool, dtype=torch.float8_e4m3fn) for pool in batch.pages[:2]]
        pages = batch.pages._replace(key=stored[0], value=stored[1], key_scale=scales, value_scale=scales)
        write_pages(pages, batch.new_key, batch.new_value)
        output = paged_attention(batch.query, pages)
        for (begin, end), (q, k, v) in zip(((0, 5), (5, 38)), batch.own):
            rounded = [
                ((t.float() / scales[:, None]).to(torch.float8_e4m3fn).float() * scales[:, None]).half() for t in (k, v)
            ]
            call = sequence_call((q, *rounded), {})
            whole = call.run()[0].transpose(0, 1)
            assert (output[begin:end] - whole).abs().max() < 5e-3


@pytest.mark.filterwarnings("ignore::flashcore_kernels.FlashcoreFallbackWarning")
@pytest.mark.parametrize("ring", [0, 32])
def test_through_pytorch(ring, device):
    """Where no kernel can run: the same answers, and log-sum-exps."""
    batch = build(device=device, ring=ring, filled=not ring, dtype=torch.float64)
    new = {"new_key": batch.new_key, "new_value": batch.new_value} if ring else {}
    output, lse = batch.run(window=20, return_lse=True, **new)
    assert_all_right(batch, output, lse, window=20)


def test_compiled(device):
    """torch.compile keeps both operators whole."""
    batch = build(device=device, filled=False)
    plain = batch.pages._replace(key=batch.pages.key.clone(), value=batch.pages.value.clone())

    def layer(query, pages, key, value):
        write_pages(pages, key, value)
        return paged_attention(query, pages)

    want = layer(batch.query, plain, batch.new_key, batch.new_value)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(batch.query, batch.pages, batch.new_key, batch.new_value), want)


class TestRefusals:
    @pytest.mark.parametrize(
        "change, says",
        [
            (lambda p: {"block_table": p.block_table.long()}, "block_table.*int64"),
            (lambda p: {"cu_seqlens_q": p.cu_seqlens_q[1:]}, "cu_seqlens_q"),
            (lambda p: {"key_lengths": p.key_lengths[2:]}, "key_lengths"),
            (lambda p: {"value": p.value[:, :, :1]}, "shapes of the pages"),
            (lambda p: {"key": p.key[:, :12], "value": p.value[:, :12]}, "power of two"),
            (lambda p: {"key": p.key.bfloat16()}, "dtypes"),
            (lambda p: {"ring": 4096}, "ring"),
            (lambda p: {"ring": 32}, "window of no keys"),
            (lambda p: {"key_scale": torch.ones(2)}, "float8_e4m3fn alone"),
        ],
    )
    def test_pages(self, change, says, device):
        batch = build(device=device)
        with pytest.raises(ValueError, match=says):
            paged_attention(batch.query, batch.pages._replace(**change(batch.pages)))

    def test_tokens(self, device):
        batch = build(device=device)
        with pytest.raises(ValueError, match="multiple of the 2 heads"):
            paged_attention(batch.query[:, :3], batch.pages)
        with pytest.raises(ValueError, match="give both"):
            paged_attention(batch.query, batch.pages, new_key=batch.new_key)
        with pytest.raises(ValueError, match="new_value"):
            write_pages(batch.pages, batch.new_key, batch.new_value[:, :1])


class TestChoice:
    PROBLEM = PagedProblem(
        num_tokens=8, num_sequences=8, num_heads=32, num_kv_heads=8, head_dim=128, value_dim=128, page_size=256,
        num_pages=1000, table_width=64, dtype=torch.bfloat16, ring=0, new_keys=False, cumulative=True, max_queries=1,
        scale=1.0, softcap=0.0, left=-1, right=0, has_sinks=False, fp8=False,
    )  # fmt: skip

    def test_depends_on_no_batch(self):
        """A sequence is computed the same way in every batch; only who computes it differs."""
        device = Device("cuda", 90)
        large = self.PROBLEM._replace(num_tokens=8192, num_sequences=512, max_queries=8192)
        assert choose_paged(self.PROBLEM, device) == choose_paged(large, device)
        assert shares(self.PROBLEM, choose_paged(self.PROBLEM, device), device) == 8
        assert shares(large, choose_paged(large, device), device) == 1

    def test_windows_need_few_programs(self):
        config = choose_paged(self.PROBLEM, Device("cuda", 90))
        assert shares(self.PROBLEM._replace(left=511), config, Device("cuda", 90)) == 2
