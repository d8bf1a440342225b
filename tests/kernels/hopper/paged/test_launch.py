"""What launches of the Hopper kernels for pages get, caught before them, and who serves what. No GPU is needed."""

import pytest
import torch
from flashcore_kernels.cache import paged, paged_kernels
from flashcore_kernels.device import Device
from flashcore_kernels.hopper.prefill.table import prefill_row_for

from ...cache.test_paged import MIXED, SINGLE, build

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

from flashcore_kernels.hopper.paged import decode_launch, launch, table  # noqa: E402
from flashcore_kernels.portable.paged import launch as portable_launch  # noqa: E402

H200 = Device("cuda", 90, triton=(3, 6))
STRIDED = 3 * 64 * 8 * 64  # elements from a page to the next in the pool that `build` makes


@pytest.fixture
def launched(monkeypatch):
    """launched(batch, **arguments of paged_attention) -> for each launch its kernel's name, its parameters by name."""
    caught = []

    def catch(kernel, grid, arguments, scalars, constants, **options):
        parameters = (*arguments, *scalars, *constants)
        assert len(parameters) == len(kernel.arg_names)
        caught.append((kernel.__name__, {"grid": grid, **dict(zip(kernel.arg_names, parameters))}))

    for module in (launch, decode_launch, portable_launch):
        monkeypatch.setattr(module, "launch", catch)
    monkeypatch.setattr(paged, "device_of", lambda _: H200)

    def run(batch, **arguments):
        caught.clear()
        batch.run(**arguments)
        return dict(caught)

    return run


SHAPE = {"page_size": 64, "head_dim": 64, "heads": (32, 8), "dtype": torch.bfloat16}


def test_each_kind_has_a_launch(launched):
    batch = build(MIXED, **SHAPE)
    assert set(launched(batch)) == {"flashcore_hopper_paged", "flashcore_hopper_paged_decode"}
    assert set(launched(build(SINGLE, **{**SHAPE, "padding": 1}), max_queries=1)) == {"flashcore_hopper_paged_decode"}


@pytest.mark.parametrize(
    "shape, arguments, names",
    [
        ({"dtype": torch.float32}, {}, {"flashcore_paged"}),
        ({"head_dim": 256}, {}, {"flashcore_paged", "flashcore_hopper_paged_decode"}),
        ({"page_size": 8}, {}, {"flashcore_paged", "flashcore_hopper_paged_decode"}),
        ({"ring": 64, "filled": False}, {"window": 64}, {"flashcore_paged", "flashcore_hopper_paged_decode"}),
        ({"head_dim": 36}, {}, {"flashcore_paged"}),
    ],
)
def test_what_the_portable_kernel_keeps(shape, arguments, names, launched):
    """And it does not do again what another launch does."""
    batch = build(MIXED, **{**SHAPE, **shape})
    if arguments:
        arguments |= {"new_key": batch.new_key, "new_value": batch.new_value}
    found = launched(batch, **arguments)
    assert set(found) == names
    assert (found["flashcore_paged"]["decode_programs"] > 0) == (len(names) == 1)
    assert found["flashcore_paged"]["PROMPTS"] and not found["flashcore_paged"]["PADDING"]


def test_prompts(launched):
    batch = build(MIXED, **SHAPE)
    found = launched(batch)["flashcore_hopper_paged"]
    q, k = found["q_desc"], found["k_desc"]
    total = len(batch.query)
    assert q.base is batch.query and q.shape == [8, total, 4, 64] and q.block_shape == [1, 16, 4, 64]
    assert q.strides == [4 * 64, 32 * 64, 64, 1]
    assert k.shape == [len(batch.pages.key), 8, 64, 64] and k.block_shape == [1, 1, 64, 64]
    assert k.strides == [STRIDED, 64, 8 * 64, 1]
    wanted = {
        "num_sequences": 8,
        "num_tokens": total,
        "units": 8,
        "units_each": 1,
        "window_left": -1,
        "window_right": 0,
    }
    assert {name: found[name] for name in wanted} == wanted
    assert found["grid"] <= 132 and found["num_pages"] == len(batch.pages.key) and found["value_eights"] == 8
    assert found["score_scale"] == pytest.approx(64**-0.5 * 1.4426950408889634)
    assert found["C"].pack == 4 and found["C"].box == 64 and found["C"].block_n == 128


@pytest.mark.parametrize("heads, pack", [((7, 1), 1), ((6, 1), 2), ((24, 2), 4), ((8, 1), 8)])
def test_a_group_is_packed_as_far_as_it_is_a_power_of_two(heads, pack, launched):
    found = launched(build(MIXED, **{**SHAPE, "heads": heads}))["flashcore_hopper_paged"]
    assert found["C"].pack == pack and found["units"] * pack == heads[0]
    assert found["units_each"] * pack == heads[0] // heads[1]


def test_single_tokens(launched):
    batch = build(SINGLE, **{**SHAPE, "padding": 1})
    found = launched(batch, max_queries=1, window=100)["flashcore_hopper_paged_decode"]
    wanted = {
        "num_sequences": 5, "num_tokens": 5, "table_width": batch.pages.block_table.shape[1], "window_left": 99,
        "stride_table": batch.pages.block_table.stride(0), "stride_qt": 32 * 8, "stride_qh": 8,
        "stride_kp": STRIDED // 8, "stride_ks": 8 * 8, "stride_kh": 8, "stride_nkt": 0,
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted
    assert found["padding"] == 1 and found["C"].key_step == 8 * 64 and not found["C"].range
    assert found["grid"] == (5 * 8, found["num_splits"]) or found["grid"] == (found["num_splits"], 5 * 8)
    mixed = launched(build(MIXED, **SHAPE))["flashcore_hopper_paged_decode"]
    assert mixed["padding"] == 0, "the padding is the other launch's"


def test_single_tokens_depend_on_no_batch(launched):
    """What could move a bit is the same; who computes what is not."""
    few, many = (build(SINGLE * count, **{**SHAPE, "padding": 0}) for count in (1, 40))
    first, second = (launched(batch, max_queries=1)["flashcore_hopper_paged_decode"]["C"] for batch in (few, many))
    for name in ("block_n", "min_chunk", "max_splits", "rows"):
        assert getattr(first, name) == getattr(second, name)


@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: f"{row.head_dim}-{row.least_page}")
def test_blocks_are_those_of_the_prefill(row):
    """Or bits would differ."""
    for causal, plain in ((True, True), (True, False), (False, False)):
        prefill = prefill_row_for(row.head_dim, row.head_dim, 4096, causal=causal, plain=plain, one_copy=True)
        assert prefill.block_n == row.block_n


def test_unaligned_pages_are_the_portable_kernels(launched):
    batch = build(MIXED, **SHAPE)
    odd = torch.zeros(batch.pages.key.numel() + 1, dtype=torch.bfloat16)[1:].view(batch.pages.key.shape)
    assert set(launched(batch._replace(pages=batch.pages._replace(key=odd)))) == {"flashcore_paged"}
    assert paged_kernels.choose_pages.cache_info().maxsize, "a server must not fill the memory with choices"
