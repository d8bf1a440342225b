"""The Hopper backward without a GPU: blocks that it visits, what it starts from, and what ptxas makes of it."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from flashcore_kernels import make_key_range
from flashcore_kernels.key_range import visible
from flashcore_kernels.problem import Problem

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from flashcore_kernels.hopper.backward import launch, masks, table  # noqa: E402

from . import aot_backward  # noqa: E402

FAR = 1 << 29


class PlainPython:
    """What `masks` needs of Gluon, for plain numbers."""

    where = staticmethod(lambda condition, a, b: a if condition else b)
    minimum = staticmethod(min)
    maximum = staticmethod(max)


def problem(**changed) -> Problem:
    fields = dict(
        batch_size=2, num_heads=4, num_kv_heads=2, num_queries=300, num_keys=300, head_dim=64, value_dim=64,
        dtype=torch.bfloat16, device_type="cuda", range_layout=None, mask_kind=None, scale=0.125, softcap=0.0, left=-1,
        right=0, query_start=0, has_sinks=False, needs_grad=True, aligned=True,
    )  # fmt: skip
    return Problem(**{**fields, **changed})


@pytest.fixture
def plain_python(monkeypatch):
    """The device functions of `masks` as plain Python."""
    monkeypatch.setattr(masks, "gl", PlainPython)
    for name in ("missing", "query_shift", "first_key", "query_blocks", "whole_blocks"):
        monkeypatch.setattr(masks, name, getattr(masks, name).fn)


SEQUENCES = [  # first, end, start, left, right
    (0, 300, 0, FAR, FAR), (0, 300, 0, FAR, 0), (0, 300, 0, 70, 0), (0, 300, -40, FAR, 0), (0, 300, 90, FAR, 0),
    (77, 300, 0, FAR, 0), (77, 300, 77, FAR, 0), (150, 260, 0, 100, 33), (0, 120, 0, 5, 0), (299, 300, 0, FAR, FAR),
    (10, 10, 0, FAR, FAR), (64, 256, -3, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("block_m", [32, 64, 128])
@pytest.mark.parametrize("sequence", SEQUENCES, ids=str)
def test_blocks(plain_python, sequence, block_m):
    """A tile visits every block with a pair and no block without one; whole blocks are those without a hidden pair."""
    first, end, start, left, right = sequence
    sequence += (0,)
    num_queries, num_keys = 300, 300

    def seen(m, n):
        return first <= n < end and start + m - left <= n <= start + m + right

    shift = masks.query_shift(sequence, block_m)
    covered = set()
    for tile in range(-(-(num_keys + 127) // 128)):
        n0 = masks.first_key(sequence, tile, 128)
        keys = [n for n in range(n0, n0 + 128) if 0 <= n < num_keys]
        covered.update(keys)
        wanted = {(m + shift) // block_m for m in range(num_queries) for n in keys if seen(m, n)}
        begin, stop = masks.query_blocks(sequence, n0, num_queries, block_m, 128)
        assert set(range(begin, stop)) == (set(range(min(wanted), max(wanted) + 1)) if wanted else set())
        for k0 in (n0, n0 + 64):
            whole_begin, whole_end = masks.whole_blocks(sequence, k0, block_m, 64)
            exist = [n for n in range(k0, k0 + 64) if first <= n < end]
            for i in range(max(begin, whole_begin), min(stop, whole_end)):
                queries = [m for m in range(i * block_m - shift, (i + 1) * block_m - shift) if 0 <= m < num_queries]
                assert all(seen(m, n) for m in queries for n in exist), (n0, k0, i)
    assert covered == set(range(num_keys))


@pytest.mark.parametrize("block_m", [64, 128])
def test_padding_moves_no_block(plain_python, block_m):
    """Queries and keys lie in the same blocks with padding before the sequence as without.

    Without `query_shift` dK and dV of a left-padded sequence would be added up in other pieces, and differ in bits.
    """
    alone = (0, 200, 0, FAR, 0, 0)
    for padding in (1, 37, 64, 100, 128):
        padded = (padding, 200 + padding, 0, FAR, 0, 0)
        starts = {masks.first_key(padded, tile, 128) - padding for tile in range(4)}
        assert {masks.first_key(alone, tile, 128) for tile in range(2)} <= starts
        at = [(m + masks.query_shift(alone, block_m)) % block_m for m in range(200)]
        assert at == [(m + padding + masks.query_shift(padded, block_m)) % block_m for m in range(200)]


RANGES = {
    "none": lambda: None,
    "left padding": lambda: make_key_range(2, 300, first=torch.tensor([0, 77]), right=0),
    "queries on": lambda: make_key_range(2, 300, first=torch.tensor([150, 3]), query_start=20),
}


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("name", RANGES)
def test_rows(name, with_lse):
    """What `preprocess` leaves of each query: lse and delta, at its place; nothing at places without a query."""
    key_range = RANGES[name]()
    call = problem(range_layout=None if key_range is None else "sequence", value_dim=40)
    row = table.backward_configuration(call)
    generator = torch.Generator().manual_seed(0)
    out, grad = (torch.randn(2, 4, 300, 40, generator=generator).half() for _ in range(2))
    lse, grad_lse = (torch.randn(2, 4, 300, generator=generator) for _ in range(2))
    lse[0, 1, :9] = -torch.inf
    places = launch.places_of(call, row)
    rows = torch.full((2, 8, places), torch.nan)
    launch.launch(*launch.rows_launch(call, row, out, lse, grad, grad_lse if with_lse else None, key_range, rows), row)
    empty = lse == -torch.inf
    delta = (grad_lse if with_lse else 0.0) - (out.float() * grad.float()).sum(-1)
    for b in range(2):
        first, start = (0, 0) if key_range is None else key_range[b, 0, 0, [0, 2]].tolist()
        shift = -max(first - start, 0) % row.dkdv.block_m
        of = rows[:, 4 * b : 4 * b + 4]
        want = (lse[b] / -call.scale).masked_fill(empty[b], -torch.inf)
        torch.testing.assert_close(of[0, :, shift : shift + 300], want)
        torch.testing.assert_close(of[1, :, shift : shift + 300], delta[b].masked_fill(empty[b], 0.0))
        none = torch.ones(places, dtype=torch.bool)
        none[shift : shift + 300] = False
        assert (of[0][:, none] == -torch.inf).all() and (of[1][:, none] == 0.0).all()


@pytest.mark.parametrize("softcap", [0.0, 8.0])
def test_sink_gradient(softcap):
    """Against float64 autograd of the formula, rows without a key too."""
    key_range = make_key_range(2, 40, first=torch.tensor([0, 7]), right=0)
    call = problem(num_queries=40, num_keys=40, has_sinks=True, range_layout="sequence", softcap=softcap)
    row = table.backward_configuration(call)
    generator = torch.Generator().manual_seed(0)
    scores, value = (torch.randn(2, 4, 40, n, generator=generator).double() for n in (40, 64))
    sinks = torch.randn(4, generator=generator).double().requires_grad_()
    grad, grad_lse = (torch.randn(2, 4, 40, *n, generator=generator) for n in ((64,), ()))
    scores = scores.masked_fill(~visible(key_range, 40, 40), -torch.inf)
    lse = torch.cat((scores, sinks[:, None, None].expand(2, 4, 40, 1)), -1).logsumexp(-1)
    output = (scores - lse[..., None]).exp() @ value
    (want,) = torch.autograd.grad((output * grad).sum() + (lse * grad_lse).sum(), sinks)
    rows = torch.full((2, 8, launch.places_of(call, row)), torch.nan)
    output, lse = output.detach().float(), lse.detach().float()
    launch.launch(*launch.rows_launch(call, row, output, lse, grad, grad_lse, key_range, rows), row)
    got = launch.sink_gradient(call, sinks.detach().float(), rows)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    rows[1] = 0.0
    assert not torch.allclose(launch.sink_gradient(call, sinks.detach().float(), rows).double(), want, rtol=0.1)


REASONS = {
    "another GPU": (problem(), 80, (3, 6)),
    "older Triton": (problem(), 90, (3, 4)),
    "fp32": (problem(dtype=torch.float32), 90, (3, 6)),
    "mask": (problem(mask_kind="bool"), 90, (3, 6)),
    "rows": (problem(range_layout="rows"), 90, (3, 6)),
    "head_dim": (problem(head_dim=136), 90, (3, 6)),
    "odd head_dim": (problem(head_dim=68), 90, (3, 6)),
    "alignment": (problem(aligned=False), 90, (3, 6)),
    "scale": (problem(scale=-1.0), 90, (3, 6)),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_left_to_the_portable_backward(name):
    assert table.hopper_backward_reason(*REASONS[name]) is not None
    assert table.hopper_backward_reason(problem(), 90, (3, 6)) is None


def test_rows_of_the_same_heads_give_the_same_bits():
    """Which row serves a call must not hang on its length: blocks of one size for all calls of the same heads."""
    for softcap in (False, True):
        rows = [row for row in table.ROWS if row.softcap == softcap]
        assert len({(row.head_dim, row.value_dim) for row in rows}) == len(rows)


@pytest.fixture(scope="module")
def reports():
    """reports(features, rows) of the kernels of these rows, from a process that compiles: this one interprets."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as environment:
            environment.delenv("TRITON_INTERPRET", raising=False)
            yield lambda features, rows: pool.submit(aot_backward.reports, features, rows).result()


@pytest.mark.parametrize("features", ["plain", "range"])
def test_compiled(features, reports):
    """Main loops spill nothing, their exponentials run beside the products, and these are not serialised."""
    found = reports(features, table.ROWS)
    assert len(found) == 2 * len(table.ROWS)
    wrong = {f"{report['kernel']} {report['row']}": report["problems"] for report in found if report["problems"]}
    assert not wrong


def test_a_block_too_large_would_show(reports):
    """Negative control: with softcap 128 queries a block are more than the registers hold."""
    row = next(row for row in table.ROWS if row.softcap)
    row = row._replace(dq=row.dq._replace(stages=16), dkdv=row.dkdv._replace(block_m=128))
    dq, dkdv = reports("plain", [row])
    assert "shared memory" in dq["problems"][0]
    assert "registers spill" in dkdv["problems"][0]


def test_gradients_are_laid_out_like_their_tensors():
    query = torch.empty(2, 300, 4, 64, dtype=torch.bfloat16).transpose(1, 2)
    assert launch.gradient_of(query).stride() == query.stride()
    odd = torch.empty(2, 4, 300, 72, dtype=torch.bfloat16)[..., :68]
    assert launch.gradient_of(odd).is_contiguous()


def test_definition_of_visible_is_ours():
    """Negative control of `test_blocks`: its `seen` is KeyRange's definition."""
    key_range = make_key_range(1, 300, first=77, end=260, query_start=5, left=70, right=3)
    dense = visible(key_range, 300, 300)[0, 0]
    m, n = torch.arange(300)[:, None], torch.arange(300)[None, :]
    assert torch.equal(dense, (n >= 77) & (n < 260) & (n >= 5 + m - 70) & (n <= 5 + m + 3))
