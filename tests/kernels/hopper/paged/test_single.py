"""Where the Hopper decode finds the keys of single tokens in pages, its device code run as plain Python."""

import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from flashcore_kernels.hopper.decode import tiles  # noqa: E402
from flashcore_kernels.hopper.decode.records import Block, PagedKeysAndValues  # noqa: E402

from .test_tiles import Memory, Warp  # noqa: E402

NEW = 1 << 40  # where new keys lie
KV_HEADS, SIZE = 3, 32


class Warp(Warp):
    """What `_copy_out_of_pages` needs of Gluon; addresses are numbers."""

    expand_dims = staticmethod(lambda x, axis: x.unsqueeze(axis))
    multiple_of = max_contiguous = max_constancy = staticmethod(lambda x, _: x)


@pytest.fixture(autouse=True)
def plain_python(monkeypatch):
    monkeypatch.setattr(tiles, "gl", Warp)
    for name in ("_copy_out_of_pages", "_page"):
        monkeypatch.setattr(tiles, name, getattr(tiles, name).fn)


def fetched(monkeypatch, table, n, end, length, block_n=64, *, page_size, ring=0, new_keys=False, step=False):
    """For each key of a block (page, row within it), "new", or None where zeros are written."""
    caught = []
    monkeypatch.setattr(tiles, "copy_async", lambda _, at, mask: caught.append((at, mask)))
    # Two pages' room from one to the next, as in pools of several layers; in units of 16 bytes.
    stride, stride_page = KV_HEADS * SIZE // 8, 2 * page_size * KV_HEADS * SIZE // 8
    number = torch.tensor
    head = PagedKeysAndValues(
        k=number(0), v=None, stride_ks=number(stride), stride_vs=None, stride_kp=number(stride_page), stride_vp=None,
        table=Memory(table), width=len(table), num_pages=100, past=number(length - 1), new_k=number(NEW), new_v=None,
    )  # fmt: skip
    C = SimpleNamespace(page_size=page_size, ring=ring, new_keys=new_keys)
    smem = SimpleNamespace(shape=(block_n, SIZE), dtype=SimpleNamespace(primitive_bitwidth=16))
    block = Block(n=number(n), end=number(end))
    tiles._copy_out_of_pages(
        smem, head.k, head.stride_ks, head.stride_kp, head.new_k, head, block, C, SIZE, KV_HEADS * SIZE if step else 0
    )
    ((at, mask),) = caught
    assert (at[:, :1] + torch.arange(SIZE) == at).all() and (mask[:, :1] == mask).all()
    found = []
    for address, there in zip(at[:, 0].tolist(), mask[:, 0].tolist()):
        page, rest = divmod(address, stride_page * 8)
        row, column = divmod(rest, stride * 8)
        assert not there or address == NEW or column == 0
        found.append(None if not there else "new" if address == NEW else (page, row))
    return found


def wanted(table, n, end, length, block_n=64, *, page_size, ring=0, new_keys=False, step=False):
    found = []
    for key in range(n, n + block_n):
        slot = key % ring if ring else key
        entry = (int(table[slot // page_size]), slot % page_size) if slot // page_size < len(table) else None
        found.append(None if key >= end else "new" if new_keys and key >= length - 1 else entry)
    return found


@pytest.mark.parametrize("page_size, step", list(itertools.product([16, 32, 64, 256], [False, True])))
@pytest.mark.parametrize("new_keys", [False, True])
def test_every_key_from_its_page(page_size, step, new_keys, monkeypatch):
    """Blocks begin anywhere: at a window's first key, or at a chunk's."""
    length = 700
    table = torch.full((length // page_size + 2,), -1, dtype=torch.int32)
    used = -(-length // page_size)
    table[:used] = torch.randperm(100, generator=torch.Generator().manual_seed(0))[:used].int()
    for n, end in ((0, 64), (32, 96), (200, 250), (250, 314), (255, 300), (650, 700), (699, 700), (0, 0)):
        call = (table, n, end, length)
        layout = {"page_size": page_size, "new_keys": new_keys, "step": step}
        assert fetched(monkeypatch, *call, **layout) == wanted(*call, **layout)


@pytest.mark.parametrize("page_size, ring", [(16, 96), (64, 128), (64, 200), (256, 512), (256, 300), (128, 128)])
@pytest.mark.parametrize("new_keys", [False, True])
def test_rings(page_size, ring, new_keys, monkeypatch):
    length = 1000
    table = torch.randperm(100, generator=torch.Generator().manual_seed(0))[: -(-ring // page_size)].int()
    first = length - min(ring, length)
    for n in range(first, length, 33):
        call = (table, n, min(n + 64, length), length)
        layout = {"page_size": page_size, "ring": ring, "new_keys": new_keys}
        assert fetched(monkeypatch, *call, **layout) == wanted(*call, **layout)


def test_a_wrong_table_reads_nothing_outside(monkeypatch):
    """Entries of -1 and past the pool, and lengths past the table."""
    found = fetched(monkeypatch, torch.tensor([-1, 1000], dtype=torch.int32), 0, 64, 64, page_size=16)
    assert {page for page, _ in found} == {0, 99}


def test_control(monkeypatch):
    """The wrong page shows."""
    table = torch.tensor([3, 4], dtype=torch.int32)
    assert fetched(monkeypatch, table, 0, 64, 64, page_size=32) != wanted(table.flip(0), 0, 64, 64, page_size=32)
