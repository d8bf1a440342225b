"""With which tiles pages are read: those of the kernels without pages, so that the bits are theirs."""

from typing import NamedTuple

from ...device import Device
from ...paged_problem import PagedProblem
from ...plan import power_of_2_from
from ..tables import row_for


class PagedConfig(NamedTuple):
    """How `flashcore_paged` runs.

    Attributes:
        block_m, block_n: rows and keys of a prompt's blocks.
        decode_m, decode_n: rows and keys of a single token's blocks.
        block_d, block_dv: head_dim and value_dim padded to powers of two.
        num_warps, num_stages: of the launch.
        decode_stages: in place of num_stages for single tokens.
        min_chunk, max_chunks: least keys of a chunk, most chunks of a single token's keys (a power of two).
        chunk_unit: chunks begin and end at multiples of so many keys; 0: at the first key that is seen.
    """

    block_m: int
    block_n: int
    decode_m: int
    decode_n: int
    block_d: int
    block_dv: int
    num_warps: int
    num_stages: int
    decode_stages: int
    min_chunk: int
    max_chunks: int
    chunk_unit: int


def choose_paged(problem: PagedProblem, device: Device) -> PagedConfig:
    """The configuration of a call: the same for a sequence in whatever batch it comes."""
    largest = max(problem.head_dim, problem.value_dim)
    block_d, block_dv = (max(power_of_2_from(size), 16) for size in (problem.head_dim, problem.value_dim))
    options = {"full_columns": (block_d, block_dv) == (problem.head_dim, problem.value_dim), "fp8": problem.fp8}
    decode = row_for("flashcore_decode", device.arch, problem.dtype, largest, **{**options, "fp8": False})
    forward = row_for("flashcore_forward", device.arch, problem.dtype, largest, **options)
    # On Hopper other kernels serve what has no pages, whose bits are others anyway. So chunks begin where pages may,
    # and are long: of a batch most programs then take a sequence each, and hardly any has partial sums to write.
    hopper = device.arch == 90
    num_warps, block_n, num_stages = decode.num_warps, forward.block_n, forward.num_stages
    if hopper and largest > 128 and problem.dtype.itemsize == 2:
        # With 4 warps a prompt's tile of 64 rows spills 440 bytes. With 64 keys, or with new keys beside the pool 32,
        # ptxas 12.8 waits for each wgmma by itself.
        num_warps = 8
        block_n, num_stages = (64, 2) if problem.new_keys else (32, 3)
    return PagedConfig(
        # One launch has one number of warps: a prompt's tile takes as many rows for each as without pages, but no more
        # than 64, since addresses of keys take registers here. With 128 rows of head_dim 64 424 bytes spill.
        block_m=min(max(forward.block_m * num_warps // forward.num_warps, 16), 64),
        block_n=block_n,
        decode_m=min(max(power_of_2_from(problem.group), 16), decode.block_m),
        decode_n=decode.block_n,
        block_d=block_d,
        block_dv=block_dv,
        num_warps=num_warps,
        # A page is looked up before its keys are: two loads in a row, of which Triton has each run half as far ahead.
        num_stages=2 * num_stages - 1,
        decode_stages=5 if hopper and problem.dtype.itemsize == 2 else 2 * decode.num_stages - 1,
        min_chunk=256 if hopper else decode.min_chunk,
        max_chunks=power_of_2_from(-(-decode.chunks // problem.num_kv_heads)),
        chunk_unit=decode.block_n if hopper else 0,
    )


# Two run on an SM at once, and twice as many even out sequences of different lengths.
PROGRAMS_PER_PROCESSOR = 4


def shares(problem: PagedProblem, config: PagedConfig, device: Device) -> int:
    """How many programs take the chunks of one sequence in turns, a power of two.

    Enough to fill the GPU, and no more: most programs of short sequences would find nothing to do. It moves no bit.
    """
    units = problem.num_sequences * problem.num_kv_heads * -(-problem.group // config.decode_m)
    most = min(-(-problem.most_keys // config.min_chunk), config.max_chunks)
    wanted = max(min(device.processors * PROGRAMS_PER_PROCESSOR // units, most), 1)
    return 1 << (wanted.bit_length() - 1)
