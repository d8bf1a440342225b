"""The Hopper backward without a GPU: blocks that it visits, what it starts from, and what ptxas makes of it."""

import os

import pytest
import torch
from flashcore_kernels import make_key_range, make_row_ranges
from flashcore_kernels.device import Device
from flashcore_kernels.dropout import drop_threshold
from flashcore_kernels.hopper.backward.choose import choose_hopper_backward
from flashcore_kernels.hopper.backward.table import ROWS
from flashcore_kernels.key_range import visible
from flashcore_kernels.naive import visible_mask
from flashcore_kernels.problem import Inputs, Problem

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from flashcore_kernels.hopper.backward import launch, masks  # noqa: E402
from flashcore_kernels.hopper.visible import SequenceBounds  # noqa: E402

from ...portable.test_dropout import kept_and_keys, words  # noqa: E402
from . import aot_backward  # noqa: E402

FULL = os.environ.get("FLASHCORE_TEST_FULL") == "1"
FAR = 1 << 29
H200 = Device("cuda", 90, triton=(3, 6))


class PlainPython:
    """What `masks` needs of Gluon, for plain numbers."""

    where = staticmethod(lambda condition, a, b: a if condition else b)
    minimum = staticmethod(min)
    maximum = staticmethod(max)


def problem(**changed) -> Problem:
    fields = dict(
        batch_size=2, num_heads=4, num_kv_heads=2, num_queries=300, num_keys=300, head_dim=64, value_dim=64,
        dtype=torch.bfloat16, device_type="cuda", range_layout=None, mask_kind=None, scale=0.125, softcap=0.0, left=-1,
        right=0, query_start=0, has_sinks=False, aligned=True,
    )  # fmt: skip
    return Problem(**{**fields, **changed})


@pytest.fixture
def plain_python(monkeypatch):
    """The device functions of `masks` as plain Python."""
    monkeypatch.setattr(masks, "gl", PlainPython)
    for name in ("missing", "query_shift", "first_key", "query_blocks", "whole_blocks", "seeing_queries"):
        monkeypatch.setattr(masks, name, getattr(masks, name).fn)


def bounds_of(first, end, start, left, right) -> SequenceBounds:
    return SequenceBounds(first=first, end=end, start=start, left=left, right=right, holes=0)


SEQUENCES = [  # as `bounds_of` takes them
    (0, 300, 0, FAR, FAR), (0, 300, 0, FAR, 0), (0, 300, 0, 70, 0), (0, 300, -40, FAR, 0), (0, 300, 90, FAR, 0),
    (77, 300, 0, FAR, 0), (77, 300, 77, FAR, 0), (150, 260, 0, 100, 33), (0, 120, 0, 5, 0), (299, 300, 0, FAR, FAR),
    (10, 10, 0, FAR, FAR), (64, 256, -3, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize("block_m", [32, 64, 128])
@pytest.mark.parametrize("sequence", SEQUENCES, ids=str)
def test_blocks(plain_python, sequence, block_m):
    """A tile visits every block with a pair and no block without one; whole blocks are those without a hidden pair."""
    bounds = bounds_of(*sequence)
    first, end, start, left, right, _ = bounds
    num_queries, num_keys = 300, 300

    def seen(m, n):
        return first <= n < end and start + m - left <= n <= start + m + right

    shift = masks.query_shift(bounds, block_m)
    covered = set()
    for tile in range(-(-(num_keys + 127) // 128)):
        n0 = masks.first_key(bounds, tile, 128)
        keys = [n for n in range(n0, n0 + 128) if 0 <= n < num_keys]
        covered.update(keys)
        wanted = {(m + shift) // block_m for m in range(num_queries) for n in keys if seen(m, n)}
        begin, stop = masks.query_blocks(bounds, n0, num_queries, block_m, 128)
        assert set(range(begin, stop)) == (set(range(min(wanted), max(wanted) + 1)) if wanted else set())
        for k0 in (n0, n0 + 64):
            whole_begin, whole_end = masks.whole_blocks(bounds, k0, block_m, 64)
            exist = [n for n in range(k0, k0 + 64) if first <= n < end]
            for i in range(max(begin, whole_begin), min(stop, whole_end)):
                queries = [m for m in range(i * block_m - shift, (i + 1) * block_m - shift) if 0 <= m < num_queries]
                assert all(seen(m, n) for m in queries for n in exist), (n0, k0, i)
    assert covered == set(range(num_keys))
    # Those that see nothing may be NaN, and are scrubbed.
    seeing = [m for m in range(num_queries) if any(seen(m, n) for n in range(num_keys))]
    seeing_from, seeing_to = masks.seeing_queries(bounds)
    assert seeing == (list(range(max(seeing_from, 0), min(seeing_to, num_queries))) if first < end else [])


@pytest.mark.parametrize("block_m", [64, 128])
def test_padding_moves_no_block(plain_python, block_m):
    """Queries and keys lie in the same blocks with padding before the sequence as without.

    Without `query_shift` dK and dV of a left-padded sequence would be added up in other pieces, and differ in bits.
    """
    alone = bounds_of(0, 200, 0, FAR, 0)
    for padding in (1, 37, 64, 100, 128):
        padded = bounds_of(padding, 200 + padding, 0, FAR, 0)
        starts = {masks.first_key(padded, tile, 128) - padding for tile in range(4)}
        assert {masks.first_key(alone, tile, 128) for tile in range(2)} <= starts
        at = [(m + masks.query_shift(alone, block_m)) % block_m for m in range(200)]
        assert at == [(m + padding + masks.query_shift(padded, block_m)) % block_m for m in range(200)]


RANGES = {
    "none": lambda: None,
    "left padding": lambda: make_key_range(2, 300, first=torch.tensor([0, 77]), right=0),
    "queries on": lambda: make_key_range(2, 300, first=torch.tensor([150, 3]), query_start=20),
}


def inputs_of(key_range, philox=None) -> Inputs:
    """As `launch_rows` takes them: it looks at no other tensor of the call."""
    return Inputs(None, None, None, key_range, philox=philox)


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("name", RANGES)
def test_rows(name, dropout, with_lse):
    """What `preprocess` leaves of each query: lse and delta, at its place; nothing at places without a query.

    With dropout delta is 2 (1 - dropout) times as large, and behind it are the words of `dropout_keys`.
    """
    key_range = RANGES[name]()
    call = problem(range_layout=None if key_range is None else "sequence", value_dim=40, dropout=dropout)
    config = choose_hopper_backward(call, H200).config
    generator = torch.Generator().manual_seed(0)
    out, grad = (torch.randn(2, 300, 4, 40, generator=generator).half() for _ in range(2))
    out, grad = out.transpose(1, 2), grad.permute(1, 0, 2, 3).contiguous().permute(1, 2, 0, 3)
    lse, grad_lse = (torch.randn(2, 4, 300, generator=generator) for _ in range(2))
    lse[0, 1, :9] = -torch.inf
    places = launch.places_of(call, config.row)
    philox = words(1234567890123, 4, "cpu") if dropout else None
    rows = torch.full((4 if dropout else 2, 8, places), torch.nan)
    launch.launch_rows(call, config, inputs_of(key_range, philox), out, lse, grad, grad_lse if with_lse else None, rows)
    empty = lse == -torch.inf
    delta = (grad_lse if with_lse else 0.0) - (out.float() * grad.float()).sum(-1)
    if dropout:
        delta *= 2 * 0.75
    for b in range(2):
        first, start = (0, 0) if key_range is None else key_range[b, 0, 0, [0, 2]].tolist()
        shift = -max(first - start, 0) % config.row.dkdv.block_m
        of = rows[:, 4 * b : 4 * b + 4]
        want = (lse[b] / -call.scale).masked_fill(empty[b], -torch.inf)
        torch.testing.assert_close(of[0, :, shift : shift + 300], want)
        torch.testing.assert_close(of[1, :, shift : shift + 300], delta[b].masked_fill(empty[b], 0.0))
        none = torch.ones(places, dtype=torch.bool)
        none[shift : shift + 300] = False
        assert (of[0][:, none] == -torch.inf).all() and (of[1][:, none] == 0.0).all()
        for h in range(4 if dropout else 0):
            _, want = kept_and_keys(philox, 4 * b + h, dropout, (512, 16), 0, 0)
            assert torch.equal(of[2:, h, shift : shift + 300].view(torch.int32), want[:300].T)


@pytest.mark.parametrize("softcap, dropout", [(0.0, 0.0), (8.0, 0.0), (0.0, 0.25)])
def test_sink_gradient(softcap, dropout):
    """Against float64 autograd of the formula, rows without a key too."""
    key_range = make_key_range(2, 40, first=torch.tensor([0, 7]), right=0)
    blind = ~visible(key_range, 40, 40)[:, 0].any(-1)  # [B, Q]
    assert blind.any()
    call = problem(num_queries=40, num_keys=40, has_sinks=True, range_layout="sequence", softcap=softcap)
    call = call._replace(dropout=dropout)
    config = choose_hopper_backward(call, H200).config
    generator = torch.Generator().manual_seed(0)
    scores, value = (torch.randn(2, 4, 40, n, generator=generator).double() for n in (40, 64))
    sinks = torch.randn(4, generator=generator).double().requires_grad_()
    grad, grad_lse = (torch.randn(2, 4, 40, *n, generator=generator) for n in ((64,), ()))
    scores = scores.masked_fill(~visible(key_range, 40, 40), -torch.inf)
    lse = torch.cat((scores, sinks[:, None, None].expand(2, 4, 40, 1)), -1).logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    if dropout:
        weights = weights * (torch.rand(weights.shape, generator=generator) >= dropout) / (1 - dropout)
    output = weights @ value
    (want,) = torch.autograd.grad((output * grad).sum() + (lse * grad_lse).sum(), sinks)
    philox = words(0, 0, "cpu") if dropout else None
    rows = torch.full((4 if dropout else 2, 8, launch.places_of(call, config.row)), torch.nan)
    output, lse = output.detach().float(), lse.detach().float()
    grad = torch.where(blind[:, None, :, None], torch.nan, grad)
    launch.launch_rows(call, config, inputs_of(key_range, philox), output, lse, grad, grad_lse, rows)
    got = launch.sink_gradient(call, sinks.detach().float(), rows)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    rows[1] = 0.0
    assert not torch.allclose(launch.sink_gradient(call, sinks.detach().float(), rows).double(), want, rtol=0.1)


def with_hole(**changed) -> torch.Tensor:
    """Of 150 queries on 300 keys, of which the 70th to the 249th are missing."""
    mask = torch.ones(2, 300, dtype=torch.bool)
    mask[1, 70:250] = False
    return make_key_range(2, 300, query_start=100, key_mask=mask, **changed)


BLIND = {  # for each, whether some query sees no key
    "causal": (dict(left=-1, right=0, query_start=-20), lambda: None, True),
    "window": (dict(left=10, right=0, query_start=170), lambda: None, True),
    "everything": (dict(left=-1, right=-1), lambda: None, False),
    "bounds": ({}, lambda: make_key_range(2, 300, first=torch.tensor([0, 150]), right=3), True),
    "holes": ({}, lambda: with_hole(left=37, right=0), True),
    "holes, no window": ({}, lambda: with_hole(right=0), False),
    "rows": (
        {},
        lambda: make_row_ranges(*torch.tensor([[[0, 5, 7, 9] * 75] * 2, [[9, 4, 7, 400] * 75] * 2]), 300),
        True,
    ),
}


@pytest.mark.parametrize("name", BLIND)
def test_queries_that_see_no_key_are_found_beside_sinks(name):
    """Their lse is the sink's. Both kernels take -inf for a sign, and what such rows hold, or their dO, may be NaN."""
    changed, made, some = BLIND[name]
    key_range = made()
    num_queries = 150 if name.startswith("holes") else 300
    layout = None if key_range is None else "rows" if name == "rows" else "sequence"
    call = problem(num_queries=num_queries, range_layout=layout, has_sinks=True, **changed)
    seen = visible_mask(call, torch.device("cpu"), key_range, None).expand(2, 1, num_queries, 300)[:, 0].any(-1)
    assert bool((~seen).any()) == some
    config = choose_hopper_backward(problem(), H200).config
    out = torch.zeros(2, 4, num_queries, 64, dtype=torch.float16)
    grad = torch.full_like(out, torch.nan).where(~seen[:, None, :, None], torch.tensor(1.0, dtype=torch.float16))
    lse = torch.full((2, 4, num_queries), 0.5)
    for grad_lse in (None, torch.full_like(lse, 3.0)):
        rows = torch.full((2, 8, launch.places_of(call, config.row)), torch.nan)
        launch.launch_rows(call, config, inputs_of(key_range), out, lse, grad, grad_lse, rows)
        for b in range(2):
            first, start = (0, call.query_start) if layout != "sequence" else key_range[b, 0, 0, [0, 2]].tolist()
            shift = -max(first - start, 0) % config.row.dkdv.block_m
            of = rows[:, 4 * b : 4 * b + 4, shift : shift + num_queries]
            assert torch.equal(of[0] == -torch.inf, ~seen[b].expand(4, -1))
            assert (of[1] == (0.0 if grad_lse is None else 3.0)).all()


REASONS = {
    "older Triton": ({}, Device("cuda", 90, triton=(3, 4)), "Triton 3.5"),
    "fp32": ({"dtype": torch.float32}, H200, "float32"),
    "fp8": ({"fp8": True}, H200, "fp8"),
    "mask": ({"mask_kind": "bool"}, H200, "dense mask"),
    "head_dim": ({"head_dim": 264}, H200, "264"),
    "odd head_dim": ({"head_dim": 68}, H200, "68"),
    "odd value_dim": ({"value_dim": 60}, H200, "60"),
    "scale": ({"scale": -1.0}, H200, "scale"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_is_left_to_the_portable_backward(name):
    changed, device, said = REASONS[name]
    assert said in choose_hopper_backward(problem(**changed), device)
    assert choose_hopper_backward(problem(), H200).kernel == "flashcore_hopper_backward"


def test_other_gpus_are_not_asked_twice():
    for device in (Device("cuda", 80, triton=(3, 6)), Device("cuda", 100, triton=(3, 6)), Device("interpreter")):
        assert choose_hopper_backward(problem(), device) is None


def test_rows_of_the_same_heads_give_the_same_bits():
    """Which row serves a call must not hang on its length: blocks of one size for all calls of the same heads."""
    for softcap in (False, True):
        rows = [row for row in ROWS if row.softcap == softcap]
        assert len({(row.head_dim, row.value_dim) for row in rows}) == len(rows)


def test_gradients_are_laid_out_as_the_operator_says():
    """With the heads inside the sequence, and in units of 8 elements, in which the kernels count."""
    for shape in ((2, 4, 300, 64), (1, 1, 1, 8), (3, 2, 17, 120)):
        gradient = launch.empty_like_heads(torch.empty(shape))
        assert gradient.shape == shape and gradient.transpose(1, 2).is_contiguous()
        assert not any(stride % 8 for stride in gradient.stride()[:3])


def test_what_the_copy_engine_cannot_read_is_copied():
    """A tensor that is contiguous but begins between two multiples of 16 bytes was once passed on as it was."""
    memory = torch.arange(2 * 4 * 16 * 72 + 8, dtype=torch.int16)
    fine = memory[: 2 * 4 * 16 * 64].view(2, 4, 16, 64)
    for tensor in (fine, fine.transpose(1, 2), memory[: 2 * 4 * 16 * 72].view(2, 4, 16, 72)[..., :64]):
        assert launch._readable(tensor) is tensor
    unreadable = {
        "address": memory[1 : 1 + 2 * 4 * 16 * 64].view(2, 4, 16, 64),
        "stride": memory[: 2 * 4 * 16 * 68].view(2, 4, 16, 68)[..., :64],
        "expanded": fine[:, :1].expand(2, 4, 16, 64),
        "columns": fine.transpose(2, 3),
    }
    for name, tensor in unreadable.items():
        copy = launch._readable(tensor)
        assert torch.equal(copy, tensor) and copy.is_contiguous() and copy.data_ptr() % 16 == 0, name
        assert copy.data_ptr() != tensor.data_ptr(), name


@pytest.fixture
def launched(monkeypatch):
    """launched(layout, key_range, head_dim, dropout) -> what each kernel's launch gets, by its name; the gradients."""

    def run(layout=None, key_range=None, head_dim=64, dropout=0.0):
        call = problem(range_layout=layout, head_dim=head_dim, dropout=dropout)
        shapes = {"query": (4, 300, head_dim), "key": (2, 300, head_dim), "value": (2, 300, 64), "output": (4, 300, 64)}
        of = {name: torch.zeros(2, *shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        caught = {}
        monkeypatch.setattr(launch, "launch", lambda kernel, *given: caught.update({kernel.__name__: given}))
        philox = words(0, 0, "cpu") if dropout else None
        inputs = Inputs(of["query"], of["key"], of["value"], key_range, sinks=torch.zeros(4), philox=philox)
        grad_output = torch.zeros((), dtype=torch.bfloat16).expand(2, 4, 300, 64)
        lse = torch.zeros(2, 4, 300)
        config = choose_hopper_backward(call, H200).config
        return caught, launch.run_backward(call, config, inputs, of["output"], lse, grad_output)

    return run


LAUNCHED = {  # layout, KeyRange, kernels, tiles of keys of a head with head_dim 64 and 256
    "plain": (None, lambda: None, ("rows", "dq", "dkdv"), (3, 5)),
    "padded": (
        "sequence", lambda: make_key_range(2, 300, first=torch.tensor([0, 77]), right=0),
        ("rows", "dq", "dkdv"), (4, 6),
    ),
    "packed": (
        "rows", lambda: make_row_ranges(*torch.zeros(2, 2, 300, dtype=torch.int32), 300),
        ("rows", "blocks", "spans", "dq", "dkdv"), (3, 5),
    ),
}  # fmt: skip


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("name", LAUNCHED)
def test_launches(name, head_dim, launched):
    """Every parameter is given, a grid has no more programs than tiles, and there is a tile for keys before the first.

    tests/gpu/test_hopper_backward.py sees what the launches compute.
    """
    layout, made, kernels, key_tiles = LAUNCHED[name]
    caught, gradients = launched(layout, made(), head_dim)
    assert list(caught) == [f"flashcore_hopper_backward_{kernel}" for kernel in kernels]
    for kernel, (_, arguments, scalars, constants) in caught.items():
        assert len(getattr(launch, kernel).arg_names) == len(arguments) + len(scalars) + len(constants)
    assert caught["flashcore_hopper_backward_dq"][0] == 2 * 4 * 3
    assert caught["flashcore_hopper_backward_dkdv"][0] == 2 * 2 * key_tiles[head_dim == 256]
    query, grad_output, key, value = caught["flashcore_hopper_backward_dkdv"][1][:4]
    row = choose_hopper_backward(problem(head_dim=head_dim), H200).config.row
    blocks = [[1, 1, row.dkdv.block_m, head_dim], [1, 1, 64, head_dim]]
    assert [list(d.block_shape) for d in (query, key)] == blocks
    assert grad_output.base.is_contiguous() and list(value.base.shape) == [2, 2, 300, 64]
    shapes = [(2, 4, 300, head_dim), (2, 2, 300, head_dim), (2, 2, 300, 64)]
    assert [tuple(gradient.shape) for gradient in gradients[:3]] == shapes
    assert gradients[3:] == (None, None)


def test_launches_with_dropout(launched):
    """Sums are undone of what delta was multiplied by, and dV's are multiplied by what the forward's output was."""
    factors = {}
    for dropout in (0.0, 0.25):
        caught, _ = launched(dropout=dropout)
        named = {
            kernel.removeprefix("flashcore_hopper_backward_"): dict(
                zip(getattr(launch, kernel).arg_names, (*arguments, *scalars, *constants), strict=True)
            )
            for kernel, (_, arguments, scalars, constants) in caught.items()
        }
        rows, dq, dkdv = named["rows"], named["dq"], named["dkdv"]
        assert rows["Rows"] is dq["Rows"] is dkdv["Rows"] and rows["Rows"].shape[0] == (4 if dropout else 2)
        assert (rows["Philox"] is None) == (not dropout)
        assert dq["C"].dropout == dkdv["C"].dropout == bool(dropout)
        assert dq["drop_below"] == dkdv["drop_below"] == drop_threshold(dropout)
        factors[dropout] = rows["delta_factor"], dq["query_scale"], dkdv["key_scale"], dkdv["value_scale"]
    assert factors == {0.0: (1.0, 0.125, 0.125, 1.0), 0.25: (1.5, 0.125 / 1.5, 0.125 / 1.5, 1 / 0.75)}


@pytest.mark.parametrize("value_dim", [64, 128])
def test_rows_are_read_by_16_bytes_whatever_their_strides(value_dim, compiling):
    """And so are added up in one order. As elements, strides of one sequence may be even and those of a batch odd."""
    wide = [load for load in compiling(aot_backward.loads_of_rows, value_dim) if "v4.b32" in load]
    assert len(wide) == 2 * 32 * value_dim // (8 * 128)  # of two tensors, 8 numbers a load, by 128 threads


@pytest.mark.parametrize("features", aot_backward.FEATURES if FULL else ["plain", "range-dropout"])
def test_compiled(features, compiling):
    """Main loops spill nothing, their exponentials run beside the products, and these are not serialised."""
    # Consumers that share keys, above 128, run other code. Two of the others are enough without FLASHCORE_TEST_FULL=1.
    rows = [row for row in ROWS if FULL or not row.softcap and row.head_dim == row.value_dim > 64]
    found = compiling(aot_backward.reports, features, rows)
    assert len(found) == 2 * len(rows) >= 4
    wrong = {f"{report['kernel']} {report['constants']}": report["problems"] for report in found if report["problems"]}
    assert not wrong


@pytest.mark.skipif(not FULL, reason="compiles for half a minute more; FLASHCORE_TEST_FULL=1 asks for it")
def test_a_block_too_large_would_show(compiling):
    """Negative control: with softcap 128 queries a block are more than the registers hold."""
    row = next(row for row in ROWS if row.softcap)
    row = row._replace(dq=row.dq._replace(stages=16), dkdv=row.dkdv._replace(block_m=128))
    dq, dkdv = compiling(aot_backward.reports, "plain", [row])
    assert "shared memory" in dq["problems"][0]
    assert "registers spill" in dkdv["problems"][0]


def test_definition_of_visible_is_ours():
    """Negative control of `test_blocks`: its `seen` is KeyRange's definition."""
    key_range = make_key_range(1, 300, first=77, end=260, query_start=5, left=70, right=3)
    dense = visible(key_range, 300, 300)[0, 0]
    m, n = torch.arange(300)[:, None], torch.arange(300)[None, :]
    assert torch.equal(dense, (n >= 77) & (n < 260) & (n >= 5 + m - 70) & (n <= 5 + m + 3))
