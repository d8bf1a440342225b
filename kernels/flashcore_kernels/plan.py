"""plan: a Problem and a Device in, the kernel and its configuration out. Pure: no GPU, no Triton, no state."""

from typing import NamedTuple

import torch

from .problem import Problem
from .tables import configuration
from .tables.hopper import hopper_configuration, hopper_decode_configuration
from .tables.row import HopperDecodeRow, HopperRow

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
# Rows (query tokens x group) above which the decode kernel's tiles would outgrow its purpose.
MAX_DECODE_QUERIES = 16
# The first Triton whose Gluon has wgmma.
HOPPER_TRITON = (3, 5)
# The first that puts barriers where both consumers of a partition would wait for each other (HopperRow.one_copy).
ONE_COPY_BEFORE = (3, 8)


class Device(NamedTuple):
    """What `plan` needs to know of a device.

    Attributes:
        kind: "cuda", "interpreter" (Triton's, on any tensor) or "torch" (no kernel can run).
        arch: compute capability as major * 10 + minor; 0 where it means nothing.
        reason: for kind "torch", why no kernel can run.
        triton: version of Triton as (major, minor).
        processors: streaming multiprocessors; H100 SXM and H200 have 132, other parts of compute capability 9.0 fewer.
    """

    kind: str
    arch: int = 0
    reason: str = ""
    triton: tuple[int, int] = (0, 0)
    processors: int = 132


class Plan(NamedTuple):
    """Which kernel runs a call, and how.

    Attributes:
        kernel: "flashcore_forward", "flashcore_decode", "flashcore_hopper", "flashcore_hopper_decode" or "torch".
        reason: one sentence: the rule that chose it.
        block_m, block_n: rows of a tile, keys of a block.
        block_d, block_dv: head_dim and value_dim padded to powers of two.
        num_warps, num_stages: of the launch.
        min_chunk, max_splits: decode only: least keys of a chunk, most chunks of a sequence.
        hopper: flashcore_hopper and flashcore_hopper_decode only: their rows of the tables.
        processors: flashcore_hopper and flashcore_hopper_decode only: of the device. Work is shared out by it, which
            moves no bit of the answer.
        block_d1, block_dv1: flashcore_forward only: where not 0, what lies behind block_d, block_dv, see `pieces`.
    """

    kernel: str
    reason: str
    block_m: int = 0
    block_n: int = 0
    block_d: int = 0
    block_dv: int = 0
    num_warps: int = 4
    num_stages: int = 1
    min_chunk: int = 1
    max_splits: int = 1
    hopper: HopperRow | HopperDecodeRow | None = None
    processors: int = 0
    block_d1: int = 0
    block_dv1: int = 0


def fallback_reason(problem: Problem, device: Device) -> str | None:
    """Why no kernel can serve this call, or None where one can."""
    if problem.needs_grad:
        return "gradients are asked for, and the kernels have no backward yet"
    if device.kind == "torch":
        return device.reason
    if problem.dtype not in KERNEL_DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {problem.dtype}"
    if max(problem.head_dim, problem.value_dim) > MAX_HEAD_DIM:
        return f"the kernels take head_dim up to {MAX_HEAD_DIM}, not {max(problem.head_dim, problem.value_dim)}"
    if problem.fp8 and device.kind == "cuda" and device.arch < 89:
        return f"keys in fp8 need compute capability 8.9 or newer, this GPU has {device.arch // 10}.{device.arch % 10}"
    return None


def plan(problem: Problem, device: Device) -> Plan:
    """Choose the kernel and its configuration for one call.

    Nothing here depends on the batch size or on how long the sequences are, so that a sequence is computed the same way
    alone and in a batch; with one exception: calls of up to MAX_DECODE_QUERIES query tokens take the decode kernel.
    Which row of the Hopper kernel's table it is may depend on the number of queries, and which of the portable one's on
    whether there is a key range: they give the same bits.
    """
    reason = fallback_reason(problem, device)
    if reason is not None:
        return Plan("torch", reason)
    head = max(problem.head_dim, problem.value_dim)
    few = f"{problem.num_queries} query tokens, at most {MAX_DECODE_QUERIES}"
    decode = problem.num_queries <= MAX_DECODE_QUERIES and problem.range_layout != "rows"
    if decode and device.arch == 90:
        not_hopper = hopper_decode_reason(problem, device)
        if not_hopper is None:
            return _hopper_decode_plan(problem, device, few)
        few += f"; not the Hopper kernel, because {not_hopper}"
    if decode and not problem.fp8:
        kernel, why = "flashcore_decode", few
    elif problem.range_layout == "rows":
        kernel, why = "flashcore_forward", "a key range for each query"
    elif problem.fp8:
        kernel, why = "flashcore_forward", "the portable decode kernel does not read fp8"
    else:
        kernel, why = "flashcore_forward", f"{problem.num_queries} query tokens, more than {MAX_DECODE_QUERIES}"
    if kernel == "flashcore_forward" and device.arch == 90:
        not_hopper = hopper_reason(problem, device)
        if not_hopper is None:
            return _hopper_plan(problem, device, why)
        why += f"; not the Hopper kernel, because {not_hopper}"
    gaps = problem.mask_kind is not None or problem.range_layout == "rows"
    keys, values = (max(padded(problem.head_dim), 16), 0), (value_columns(problem, device), 0)
    # Only where asynchronous copies bring K and V, and nothing hides keys. Of tiles of 32 columns that come by way of
    # registers (single elements, fp8, calls with gaps) wrong code was seen on 9.0, see `value_columns`.
    copied = problem.aligned and not problem.fp8 and problem.mask_kind is None and problem.range_layout is None
    if kernel == "flashcore_forward" and problem.dtype.itemsize == 2 and copied:
        keys, values = pieces(problem.head_dim) or keys, pieces(problem.value_dim) or values
    whole = (sum(keys), sum(values)) == (problem.head_dim, problem.value_dim)
    ranges = problem.range_layout is not None
    row = configuration(kernel, device.arch, problem.dtype, head, gaps, problem.fp8, whole, ranges)
    block_m = row.block_m
    if kernel == "flashcore_decode":
        # One tile holds the whole group and all query tokens where it can; 16 is tl.dot's least.
        block_m = min(max(padded(problem.num_queries * problem.group), 16), row.block_m)
    return Plan(
        kernel,
        why,
        block_m,
        row.block_n,
        keys[0],
        values[0],
        row.num_warps,
        row.num_stages,
        row.min_chunk,
        padded(-(-row.chunks // problem.num_kv_heads)),
        block_d1=keys[1],
        block_dv1=values[1],
    )


def pieces(size: int) -> tuple[int, int] | None:
    """Two powers of two that are together `size`, or None where there are none that tl.dot takes.

    96 columns in tiles of 64 and 32 are a quarter less work than in tiles of 128.
    """
    first = padded(size + 1) // 2
    return (first, size - first) if size - first >= 16 and padded(size - first) == size - first else None


def value_columns(problem: Problem, device: Device) -> int:
    """value_dim padded to what the tile has: a power of two, at least 16.

    Tiles of 32 columns that are not all there are avoided on Hopper: where neither K's nor V's rows can be loaded by
    vectors, ptxas 12.8 (which Triton 3.6 brings) makes wrong machine code of the wgmma loop. 12.9 does not.
    """
    columns = max(padded(problem.value_dim), 16)
    if columns == 32 and problem.value_dim != 32 and device.arch // 10 == 9 and problem.dtype.itemsize == 2:
        return 64
    return columns


def hopper_decode_reason(problem: Problem, device: Device) -> str | None:
    """Why the Gluon kernel cannot serve a decode on compute capability 9.0, or None where it can."""
    if device.triton < HOPPER_TRITON:
        return f"that needs Triton 3.5 or newer, and this is {device.triton[0]}.{device.triton[1]}"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"that takes float16 and bfloat16, not {problem.dtype}"
    if problem.mask_kind is not None:
        return "there is a dense mask"
    if not problem.aligned:
        return "an address or stride of query, key or value is no multiple of 16 bytes"
    piece = 16 if problem.fp8 else 8
    if problem.head_dim % piece or problem.value_dim % piece:
        return f"rows of {problem.head_dim} or {problem.value_dim} elements are no multiple of 16 bytes"
    return None


def _hopper_decode_plan(problem: Problem, device: Device, why: str) -> Plan:
    row = hopper_decode_configuration(8 if problem.fp8 else 16, max(problem.head_dim, problem.value_dim))
    return Plan(
        "flashcore_hopper_decode",
        why,
        # wgmma's least are 8 rows, and 64 columns of the output.
        min(max(padded(problem.num_queries * problem.group), 8), row.rows),
        row.block_n,
        # 32 bytes of a row, so that all threads copy no more than 64 keys at once.
        max(padded(problem.head_dim), 32 if problem.fp8 else 16),
        max(padded(problem.value_dim), 64),
        4,
        row.stages[0][0],
        row.min_chunk,
        padded(-(-row.chunks // problem.num_kv_heads)),
        row,
        device.processors,
    )


def hopper_reason(problem: Problem, device: Device) -> str | None:
    """Why the Gluon kernel cannot serve a prefill on compute capability 9.0, or None where it can."""
    if device.triton < HOPPER_TRITON:
        return f"that needs Triton 3.5 or newer, and this is {device.triton[0]}.{device.triton[1]}"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"that takes float16 and bfloat16, not {problem.dtype}"
    if problem.fp8:
        return "key and value are in fp8"
    if problem.mask_kind is not None:
        return "there is a dense mask"
    if not problem.aligned:
        return "an address or stride of query, key or value is no multiple of 16 bytes"
    if problem.value_dim % 8:
        return f"rows of {problem.value_dim} values are no multiple of 16 bytes"
    if _hopper_row(problem, device) is None:
        return f"no configuration has head_dim {problem.head_dim} with {problem.value_dim}"
    return None


def _hopper_row(problem: Problem, device: Device) -> HopperRow | None:
    plain = problem.range_layout is None and not problem.softcap
    return hopper_configuration(problem.head_dim, problem.value_dim, problem.num_queries, plain, problem.right >= 0,
                                device.triton < ONE_COPY_BEFORE)  # fmt: skip


def _hopper_plan(problem: Problem, device: Device, why: str) -> Plan:
    row = _hopper_row(problem, device)
    return Plan(
        "flashcore_hopper", why, 64 * row.consumers, row.block_n, sum(row.head_dim), sum(row.value_dim),
        num_warps=8 if row.one_copy else 4, num_stages=row.stages, hopper=row, processors=device.processors,
    )  # fmt: skip


def max_splits_for(num_keys: int, plan: Plan) -> int:
    """The most chunks that any sequence within `num_keys` slots can have: how many programs a head gets."""
    return min(-(-num_keys // plan.min_chunk), plan.max_splits)


def padded(size: int) -> int:
    """The power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()
