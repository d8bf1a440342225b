"""How the programs of a decode share out the chunks of all sequences. None of it moves a bit of the answer."""

from typing import NamedTuple

from ...plan import power_of_2_from
from ...problem import Problem
from .choose import HopperDecodeConfig

# With fewer programs (of 8 rows, fewer of more rows) bandwidth stays unused. Of e4m3 it takes twice as many.
ENOUGH = 256
# Programs that an SM has registers for, by rows.
MOST_RESIDENT = {8: 8, 16: 3, 32: 2}
# Values (rows x columns x levels) of trees that so many programs have registers for.
MOST_IN_TREES = {1: 8192, 2: 8192, 3: 4096, 4: 4096}
# Tiles of rows may be so many fewer than SMs, and count as one for each.
NEARLY = 4


class Sharing(NamedTuple):
    """How chunks are shared out.

    Attributes:
        stages: blocks of K and V in shared memory.
        levels: a program may take up to 2**levels chunks.
        fan_in: neighbours whose partial sums are merged at once.
        resident: programs that an SM runs at once.
        running: programs that the GPU runs at once.
        enough: programs that use all bandwidth.
        whole_sequences: a program takes all chunks of a sequence.
        in_a_row: the programs of one tile of rows are numbered in a row.
    """

    stages: int
    levels: int
    fan_in: int
    resident: int
    running: int
    enough: int
    whole_sequences: bool = False
    in_a_row: bool = False

    def chunks_each(self, chunks: int, tiles: int) -> int:
        """Chunks a program takes, where each of `tiles` tiles of rows may have `chunks`.

        The more it takes, the fewer partial sums are written. But programs are to fill the GPU. And they are either to
        run all at once, or to be so many that the last ones do not run alone for long.
        """
        if self.whole_sequences:
            return 2**self.levels
        for level in range(self.levels, 0, -1):
            programs = tiles * -(-chunks // 2**level)
            if self.enough <= programs <= self.running or programs >= 1.9 * self.running:
                return 2**level
        return 1


def share_out(problem: Problem, config: HopperDecodeConfig) -> Sharing:
    """The Sharing of a call. It depends on the batch and the heads alone, not on lengths: these grow in a generation,
    and each Sharing compiles a kernel.
    """
    row, rows, processors = config.row, config.block_m, config.processors
    tiles = problem.batch_size * problem.num_kv_heads * row_tiles(problem, config)
    fills = tiles >= processors - NEARLY
    # A KeyRange may make one sequence longer than others, and then many programs are to share it.
    if problem.range_layout is None and fills and rows <= 16:
        levels = (config.max_chunks - 1).bit_length()
        for stages, resident in row.whole_sequences:
            fit = rows * config.block_dv * levels <= MOST_IN_TREES[resident]
            if tiles <= resident * processors and resident <= MOST_RESIDENT[rows] and fit:
                return Sharing(
                    stages=stages, levels=levels, fan_in=4, resident=resident, running=resident * processors,
                    enough=tiles, whole_sequences=True,
                )  # fmt: skip
    # Twice the rows take twice the registers for each level.
    levels = max(row.levels - (rows // 8).bit_length() + 1, 0)
    programs = tiles * config.max_chunks
    fits = [c for c in row.stages if (programs if c[1] == 1 else programs // 2**levels) <= c[1] * processors]
    stages, resident = (fits or row.stages[-1:])[0]
    if resident > 3 and problem.range_layout is not None and not problem.fp8:
        levels = min(levels, 2)  # with 3 registers spill: B64 S4096 250.5 us, with 2 247.8
    enough = max(ENOUGH * (16 if problem.fp8 else 8) // rows, processors - NEARLY)
    if row.many_rows and resident > MOST_RESIDENT[rows] and fills:
        stages, resident, levels = row.many_rows
        # More than run at once, for the sake of calls where one sequence is longer than the others. With 8 chunks each
        # B16 S2048, 4 tokens, takes 37 us instead of 41 with 4, but 24 instead of 14 if one sequence alone is long.
        enough = resident * processors + 1
    resident = min(resident, MOST_RESIDENT[rows])
    shared = Sharing(
        stages=stages, levels=levels, fan_in=4, resident=resident, running=resident * processors, enough=enough
    )
    # What no call of this batch will use costs registers and instructions.
    if tiles * -(-config.max_chunks // 2) < min(enough, 1.9 * shared.running):
        shared = shared._replace(levels=0)
    # As many neighbours as the longest sequences have: instructions for more would take time. But 16 of them, or with
    # e4m3 or many rows fewer, take registers that so many programs do not have.
    nodes = -(-config.max_chunks // shared.chunks_each(config.max_chunks, tiles))
    most = 4 if rows > 8 else 8 if problem.fp8 else 16
    # The last program of a tile waits for the others. Where not all programs run at once, it is to start long after
    # them: so those of a tile are not numbered in a row. Where each program has an SM, they are, so that those that
    # start last are not all ones that others wait for: B1 S8192 of head_dim 64 8.04 us, in a row 7.86.
    return shared._replace(fan_in=min(max(power_of_2_from(nodes), 4), most), in_a_row=tiles * nodes <= processors)


def row_tiles(problem: Problem, config: HopperDecodeConfig) -> int:
    """Tiles that the rows of a KV head take."""
    return -(-problem.num_queries * problem.group // config.block_m)
