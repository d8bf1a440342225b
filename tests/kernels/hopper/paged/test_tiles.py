"""Which tiles the Hopper kernel for pages makes and what it fetches for them, its device code run as plain Python.

The scheduler, the producer and the consumers' limits run as they are, on torch's numbers; the copy engine is a stand-in
that knows swizzled panels. What they say is then attended to in fp64, and has to be attention.
"""

from types import SimpleNamespace

import pytest
import torch
from flashcore_kernels.device import Device
from flashcore_kernels.paged_problem import PagedProblem

from ...cache.test_paged import build

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from flashcore_kernels.hopper import packed  # noqa: E402
from flashcore_kernels.hopper.paged import producer  # noqa: E402
from flashcore_kernels.hopper.paged.choose import choose_hopper_prompts  # noqa: E402
from flashcore_kernels.hopper.paged.launch import (  # noqa: E402
    kernel_constants,
    pool_descriptor,
    query_descriptor,
)
from flashcore_kernels.hopper.paged.records import Descriptors, Table  # noqa: E402

H200 = Device("cuda", 90, triton=(3, 6))
# Prompts alone, behind other keys and with more queries than keys; single tokens; sequences without queries or keys.
LENGTHS = ((5, 5), (1, 130), (0, 0), (70, 300), (1, 1), (1, -1), (3, 290), (4, 2), (200, 200), (33, -1), (129, 700))


class Memory:
    """A tensor's address, or what lies behind one."""

    def __init__(self, words, at=0):
        self.words, self.at = words.flatten(), at

    def __add__(self, offset):
        return Memory(self.words, self.at + offset)


class Warp:
    """What these functions need of Gluon."""

    constexpr = None
    int32, int64 = torch.int32, torch.int64
    BlockedLayout = SliceLayout = NVMMADistributedLayout = staticmethod(lambda *_: None)
    static_range = staticmethod(range)
    program_id = staticmethod(lambda _: torch.tensor(0))
    arange = staticmethod(lambda start, end, _: torch.arange(start, end))
    where = staticmethod(lambda condition, a, b: torch.where(condition, torch.as_tensor(a), torch.as_tensor(b)))
    minimum = staticmethod(lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)))
    maximum = staticmethod(lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)))
    sum = staticmethod(lambda x, axis: x.sum(axis))
    max = staticmethod(lambda x, axis: x.amax(axis))
    associative_scan = staticmethod(lambda x, axis, _: x.cumsum(axis))

    @staticmethod
    def load(address, mask=None, other=None):
        at = torch.as_tensor(address.at)
        mask = torch.as_tensor(True if mask is None else mask)
        inside = torch.where(mask, at, 0)
        assert ((inside >= 0) & (inside < len(address.words))).all(), "read outside of the tensor"
        return torch.where(mask, address.words[inside], torch.as_tensor(0 if other is None else other))


class Anything:
    """Barriers, and whatever is done with them."""

    def __getattr__(self, _):
        return self

    def __call__(self, *_, **__):
        return self


class Panels:
    """A tile in shared memory: the first 64 columns of all rows, then the next."""

    dtype = None

    def __init__(self, memory, rows):
        self.memory, self.rows = memory, rows

    @classmethod
    def of(cls, rows, columns):
        return cls(torch.full((rows * columns,), torch.nan, dtype=torch.float64), rows)

    def _reinterpret(self, _, shape, __):
        return Boxes(Panels(part, shape[3]) for part in self.memory.view(shape[0], -1))

    reinterpret = _reinterpret

    def reshape(self, _):
        return self

    def write(self, tile):
        self.memory.copy_(torch.cat([part.reshape(-1) for part in tile.reshape(self.rows, -1).split(64, dim=1)]))

    def read(self):
        return torch.cat(list(self.memory.view(-1, self.rows, 64)), dim=1)


class Boxes(list):
    """What `_reinterpret` makes: an array of tiles."""

    def index(self, number):
        return self[number]


def fetch(descriptor, coordinates, _, smem):
    """The copy engine: zeros outside of the tensor."""
    view = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
    tile = torch.zeros(descriptor.block_shape, dtype=torch.float64)
    there, here = [], []
    for first, size, length in zip(map(int, coordinates), view.shape, descriptor.block_shape):
        low, high = min(max(first, 0), size), min(max(first + length, 0), size)
        there.append(slice(low, max(high, low)))
        here.append(slice(low - first, max(high, low) - first))
    tile[tuple(here)] = view[tuple(there)].double()
    smem.write(tile)


class Emulated:
    """The kernel for one batch: `output` [T, H, D] as the programs would write it."""

    def __init__(self, batch, monkeypatch, window=None):
        query, pages = batch.query, batch.pages
        heads, kv_heads = query.shape[1], pages.key.shape[2]
        self.problem = PagedProblem(
            num_tokens=len(query), num_sequences=len(pages.block_table), num_heads=heads, num_kv_heads=kv_heads,
            head_dim=query.shape[2], value_dim=query.shape[2], page_size=pages.key.shape[1],
            num_pages=len(pages.key), table_width=pages.block_table.shape[1], dtype=query.dtype, ring=0,
            new_keys=False, cumulative=len(pages.key_lengths) > len(pages.block_table), max_queries=len(query),
            scale=1.0, softcap=0.0, left=-1 if window is None else window - 1, right=0, has_sinks=False, fp8=False,
        )  # fmt: skip
        config = choose_hopper_prompts(self.problem, H200, True)
        self.C = C = kernel_constants(self.problem, config, False)
        self.batch = batch
        units = heads // C.pack
        number = torch.tensor
        self.packed = packed.Packed(
            cu_queries=Memory(pages.cu_seqlens_q), lengths=Memory(pages.key_lengths),
            num_sequences=number(self.problem.num_sequences), num_tokens=number(len(query)), units=number(units),
            window_left=number(self.problem.left), window_right=number(0),
        )  # fmt: skip
        self.plain(monkeypatch)
        _, tiles = packed._position_of(number(0), self.packed, C)
        self.positions = [packed._position_of(number(i), self.packed, C)[0] for i in range(int(tiles) + 1)]
        assert self.positions[-1].tile == -1 and all(p.tile >= 0 for p in self.positions[:-1])
        table = Table(
            entries=Memory(pages.block_table), stride=pages.block_table.stride(0), width=self.problem.table_width,
            num_pages=self.problem.num_pages, units_each=self.problem.group // C.pack,
        )  # fmt: skip
        descriptors = Descriptors(
            q=query_descriptor(query, C), k=pool_descriptor(pages.key, C.d0, C),
            v=pool_descriptor(pages.value, C.dv0, C),
        )  # fmt: skip
        self.queries, self.keys, self.values = [], [], []
        buffers = Anything()
        buffers.q0, buffers.k0, buffers.v0 = (
            Kept(kept, rows, C.d0)
            for kept, rows in ((self.queries, C.rows), (self.keys, C.block_n), (self.values, C.block_n))
        )
        call = Anything()
        call.visibility, call.table, call.descriptors, call.buffers = self.packed, table, descriptors, buffers
        producer.produce(call, C)

    def plain(self, monkeypatch):
        for module in (packed, producer):
            for name, value in list(vars(module).items()):
                if hasattr(value, "fn"):
                    monkeypatch.setattr(module, name, value.fn)
                elif type(value).__name__ == "constexpr":
                    monkeypatch.setattr(module, name, value.value)
            for name in ("mbarrier", "barrier", "fence_async_shared"):
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, Anything())
            monkeypatch.setattr(module, "gl", Warp)
        for name in ("packed_blocks", "window"):
            monkeypatch.setattr(producer, name, getattr(packed, name))
        monkeypatch.setattr(producer, "tma_load", fetch)
        monkeypatch.setattr(producer, "told_position", lambda _, told, __: self.positions[told])
        monkeypatch.setattr(producer, "scrub", scrub)

    def output(self) -> torch.Tensor:
        C, pack = self.C, self.C.pack
        query = self.batch.query
        output = torch.full(query.shape, torch.nan, dtype=torch.float64)
        blocks = zip(self.keys, self.values)
        queries = iter(self.queries)
        for position in self.positions[:-1]:
            # Both consumers take the same blocks.
            tiles = [
                packed.packed_tile_of(position, SimpleNamespace(visibility=self.packed), consumer, C)
                for consumer in (0, 1)
            ]
            fetched = [next(blocks) for _ in range(int(tiles[0].blocks))]
            for tile in tiles:
                q = next(queries).read() * query.shape[2] ** -0.5
                scores = []
                for j, (key, _) in enumerate(fetched[: int(tile.own_blocks)]):
                    s = q @ key.read().T
                    if j < tile.left_edge or j >= tile.right_edge:
                        keys = tile.begin + j * C.block_n + torch.arange(C.block_n)
                        seen = (keys >= tile.row_lo[:, None]) & (keys < tile.row_hi[:, None])
                        s = torch.where(seen, s, -torch.inf)
                    scores.append(s)
                s = torch.cat(scores, dim=1)
                weights = torch.exp(s - s.amax(1, keepdim=True).nan_to_num(neginf=0.0))
                weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-300)
                # 0 * NaN is NaN: what nobody sees must have been scrubbed.
                answer = weights @ torch.cat([value.read() for _, value in fetched[: int(tile.own_blocks)]])
                row = torch.arange(C.rows) + tile.r0
                token, head = tile.m0 + row // pack, tile.unit * pack + row % pack
                own = token < tile.num_queries
                where = (tile.first_token + token)[own], head[own]
                assert output[where].isnan().all(), "two tiles write one row"
                output[where] = answer[own, : output.shape[2]]
        assert next(blocks, None) is None and next(queries, None) is None, "fetched, and nobody looked"
        return output


class Kept:
    """A buffer whose every use is a tile of its own, kept in a list."""

    def __init__(self, tiles, rows, columns):
        self.tiles, self.shape = tiles, (rows, columns)

    def index(self, _):
        self.tiles.append(Panels.of(*self.shape))
        self.tiles[-1].kept = self.tiles
        return self.tiles[-1]


def scrub(values, keep, n, lo, hi, any_key, BN, DV):
    # The producer asked for the same buffer again.
    assert values.kept.pop() is values
    keys, values = n + torch.arange(BN), values.kept[-1]
    values.write(torch.where(((keys >= lo) & (keys < hi))[:, None], values.read(), 0.0))


def wanted(own, window) -> torch.Tensor:
    """Attention in fp64, `[n, H, D]`, by its definition."""
    query, key, value = (t.double() for t in own)
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    place = len(key) - len(query) + torch.arange(len(query))[:, None]
    keys = torch.arange(len(key))
    seen = (keys <= place) & (keys > place - (window or 1 << 30))
    scores = torch.einsum("qhd,khd->hqk", query, key) * query.shape[2] ** -0.5
    weights = torch.where(seen, scores, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, value)


def assert_attention(batch, output, window=None) -> None:
    bounds = batch.pages.cu_seqlens_q.tolist()
    for s, own in enumerate(batch.own):
        got = output[bounds[s] : bounds[s + 1]]
        if len(own[0]) == 1:
            assert got.isnan().all(), "a single token's row was written"
        elif len(own[0]):
            torch.testing.assert_close(got, wanted(own, window), rtol=1e-9, atol=1e-9, msg=f"sequence {s}")
    assert (output[bounds[-1] :] == 0.0).all(), "padding is not 0"


LAYOUTS = [
    {"page_size": 16}, {"page_size": 64, "head_dim": 64}, {"page_size": 128, "heads": (8, 2), "head_dim": 128},
    {"page_size": 256, "heads": (6, 1), "cumulative": True}, {"page_size": 1024, "heads": (3, 1), "padding": 0},
    {"page_size": 32, "head_dim": 128, "heads": (7, 1), "padding": 150},
]  # fmt: skip


@pytest.mark.parametrize("layout, window", [*zip(LAYOUTS, (None, 40) * 3), (LAYOUTS[0], 40)], ids=str)
def test_what_is_fetched_is_attention(layout, window, monkeypatch):
    """Each row is written once, by a tile that sees its keys; nothing that nobody sees reaches a product with V."""
    batch = build(LENGTHS, **layout)
    assert_attention(batch, Emulated(batch, monkeypatch, window).output(), window)


def test_more_sequences_than_are_added_up_at_once(monkeypatch):
    lengths = tuple((i % 4, i % 9) for i in range(300))
    batch = build(lengths, page_size=128, heads=(1, 1))
    assert_attention(batch, Emulated(batch, monkeypatch).output())


class TestControls:
    """What must show."""

    def wrong(self, monkeypatch, change, window=None):
        batch = build(LENGTHS, page_size=64)
        changed = batch._replace(pages=batch.pages._replace(**change(batch.pages)))
        with pytest.raises(AssertionError):
            assert_attention(batch, Emulated(changed, monkeypatch, window).output())

    def test_pages_swapped(self, monkeypatch):
        self.wrong(monkeypatch, lambda pages: {"block_table": pages.block_table.roll(1, 1)})

    def test_lengths_off_by_one(self, monkeypatch):
        self.wrong(monkeypatch, lambda pages: {"key_lengths": pages.key_lengths - 1})

    def test_window_ignored(self, monkeypatch):
        self.wrong(monkeypatch, lambda pages: {}, window=40)

    def test_values_not_scrubbed(self, monkeypatch):
        monkeypatch.setattr("tests.kernels.hopper.paged.test_tiles.scrub", lambda values, *_: values.kept.pop())
        self.wrong(monkeypatch, lambda pages: {})
