"""Which rows of V the producer scrubs under a dense mask, its device code run as plain Python beside the map.

A key that no query sees may hold NaN, and 0 * NaN is NaN: in no block may it reach a consumer.
"""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from flashcore_kernels.naive import visible_mask

from ...reference import build, poison_unseen, problem_of

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from flashcore_kernels.hopper import visible  # noqa: E402
from flashcore_kernels.hopper.prefill import masks, producer  # noqa: E402

from .test_mask_map import made as map_of  # noqa: E402

BLOCK_N, CONSUMERS = 128, 2
BLOCK_M = 64 * CONSUMERS


class Memory:
    """A tensor's address, or what lies behind one."""

    def __init__(self, words, at=0):
        self.words, self.at = words, at

    def __add__(self, offset):
        return Memory(self.words, self.at + int(offset))


class Number(int):
    """A scalar of Gluon, as far as addresses are computed from it."""

    def to(self, _):
        return self


class Warp:
    """What `produce` needs of Gluon."""

    int64 = constexpr = None
    where = staticmethod(lambda condition, a, b: a if condition else b)
    minimum, maximum = staticmethod(min), staticmethod(max)
    static_range = staticmethod(range)
    program_id = staticmethod(lambda _: 0)
    load = staticmethod(lambda address: address.words[address.at])


class Anything:
    """Barriers, buffers, descriptors, and whatever is done with them."""

    def __getattr__(self, _):
        return self

    def __call__(self, *_, **__):
        return self


@pytest.fixture(autouse=True)
def plain_python(monkeypatch):
    for module, name in itertools.product((masks, producer, visible), ("gl", "mbarrier", "tma_load", "barrier")):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, Warp if name == "gl" else Anything())
    for module in (masks, producer, visible):
        for name, value in vars(module).items():
            if hasattr(value, "fn"):
                monkeypatch.setattr(module, name, value.fn)
            elif hasattr(value, "value"):  # a constexpr
                monkeypatch.setattr(module, name, value.value)
    for name in ("fence_async_shared", "load_mask_tiles"):
        monkeypatch.setattr(producer, name, Anything())


@functools.cache
def mask_and_map(kind: str, num_queries: int, num_keys: int):
    """A mask for two sequences of two heads, and its map, which takes the interpreter longer than all else here."""
    mask = mask_of_blocks(kind, 2, 2, num_queries, num_keys)
    return mask, map_of(mask, block_m=BLOCK_M, block_n=BLOCK_N)


def unscrubbed(call, shape, lines, monkeypatch):
    """bool `[B, H, tiles, K]`: V of these keys reaches the consumers of a tile as it is."""
    problem, mask = problem_of(call), call.arguments["mask"]
    left = visible_mask(problem, "cpu", None, mask).expand(*mask.shape)
    batch, heads, _, num_keys = mask.shape
    tiles = shape.lines[2]
    reaches = torch.zeros(batch, heads, tiles, num_keys, dtype=torch.bool)
    positions = [*itertools.product(range(batch), range(heads), range(tiles)), (0, 0, -1)]
    upcoming = iter([tuple(map(Number, position)) for position in positions])
    here, keep = {}, {}

    def visit(_queue, _done, _warps):
        here["position"] = next(upcoming)
        return here["position"]

    def fetch(descriptor, at, full, buffer):
        if descriptor == "values":
            here["n"] = at[2]
            settle(0, num_keys)

    def settle(lo, hi, kept=None):
        b, h, tile = here["position"]
        keys = torch.arange(num_keys)[here["n"] : here["n"] + BLOCK_N]
        shown = (keys >= lo) & (keys < hi)
        reaches[b, h, tile, keys] = shown if kept is None else shown & kept[: len(keys)]

    def write_left_keys(_, entry, b, h, m0, lo, hi, any_key, bounds, call, BM, C):
        n = entry // masks.FLAGS * BLOCK_N
        keep["keys"] = left[b, h, m0 : m0 + BM, n : n + BLOCK_N].any(0)

    def scrub(values, _, n, lo, hi, any_key, BN, DV):
        settle(lo, hi, keep["keys"] if any_key else None)

    monkeypatch.setattr(producer, "position_of", lambda *_: visit(0, 0, 0))
    monkeypatch.setattr(producer, "next_position", visit)
    monkeypatch.setattr(producer, "tma_load", fetch)
    monkeypatch.setattr(producer, "write_left_keys", write_left_keys)
    monkeypatch.setattr(producer, "scrub", scrub)
    anything = Anything()
    C = SimpleNamespace(
        d0=64, d1=0, dv0=64, dv1=0, block_n=BLOCK_N, stages=2, range_layout=0, consumers=CONSUMERS, query_buffers=2,
        rows=64, mask=masks.BOOL if mask.dtype == torch.bool else masks.BIAS,
    )  # fmt: skip
    strides = dict(zip(("line_b", "line_h", "line_t"), shape.line_strides))
    of_mask = SimpleNamespace(
        lines=Memory([*lines.flatten().tolist(), 0]), num_blocks=shape.num_blocks, **strides
    )  # fmt: skip
    visibility = SimpleNamespace(
        num_queries=problem.num_queries, num_keys=num_keys, query_start=problem.query_start, window_left=problem.left,
        window_right=problem.right,
    )  # fmt: skip
    call = SimpleNamespace(
        descriptors=SimpleNamespace(q0=0, k0=0, v0="values"), buffers=anything, barriers=anything, queue=anything,
        pointers=anything, heads=SimpleNamespace(num_heads=heads, group=problem.group), visibility=visibility,
        order=anything, mask=of_mask,
    )  # fmt: skip
    producer.produce(call, C)
    return reaches


def mask_of_blocks(kind: str, *shape: int) -> torch.Tensor:
    """Blocks that are shown or hidden whole, or in every third key."""
    generator = torch.Generator().manual_seed(sum(shape))
    of_block = torch.randint(0, 3, (*shape[:2], -(-shape[2] // 64), -(-shape[3] // 64)), generator=generator)
    of_block = of_block.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, : shape[2], : shape[3]]
    keep = ((of_block == 0) | ((of_block == 1) & (torch.arange(shape[3]) % 3 == 0))).contiguous()
    return keep if kind == "bool" else torch.zeros(shape).masked_fill(~keep, -torch.inf)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("features", [(), ("causal",), ("window",), ("causal", "window")], ids="+".join)
def test_nobody_gets_values_that_nobody_sees(features, kind, monkeypatch):
    """Also where one tile's mask hides a key from those that reach it, and another tile, which does not, hides none."""
    poisoned = 0
    for num_queries, num_keys in ((17, 129), (129, 129), (300, 500)):
        call = build(features, num_queries, num_keys, heads=(2, 1), head_dim=8, dtype=torch.float32)
        call.arguments["mask"], (shape, lines, _) = mask_and_map(kind, num_queries, num_keys)
        poison_unseen(call)
        nan = call.value.isnan().any(-1)[:, :, None]  # [B, 1, 1, K]
        reaches = unscrubbed(call, shape, lines, monkeypatch)
        assert reaches.any()
        wrong = (reaches & nan).nonzero()
        assert not len(wrong), f"{len(wrong)} keys, the first {wrong[0].tolist()} (sequence, head, tile, key)"
        poisoned += nan.sum().item()
    assert poisoned
