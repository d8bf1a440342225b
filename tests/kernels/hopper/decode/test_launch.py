"""How the Gluon kernel for decode shares chunks out among its programs.

No GPU is needed. tests/gpu/test_hopper_decode.py sees what the launches compute.
"""

import dataclasses
import itertools

import pytest
import torch
from flashcore_kernels.choose import choose
from flashcore_kernels.dispatch import make_launch
from flashcore_kernels.hopper.decode.sharing import share_out
from flashcore_kernels.plan import most_chunks
from flashcore_kernels.problem import Inputs

from ...runtime.test_prepared import H200
from ...test_choose import problem as problem_of

pytest.importorskip("flashcore_kernels.hopper.decode.launch")


@pytest.mark.parametrize("queries", [1, 4, 16])
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (32, 1)])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("processors", [132, 114, 78])
def test_how_the_hopper_kernel_shares_chunks_out(processors, fp8, heads, queries):
    """On an H200, and on other parts of compute capability 9.0 (H100 PCIe, H20)."""
    for batch, keys, head_dim in itertools.product((1, 2, 7, 16, 64, 300), (1, 129, 2048, 100_000), (64, 128, 256)):
        made = problem_of(queries, heads=heads, head_dim=head_dim, value_dim=head_dim)
        made = made._replace(batch_size=batch, num_keys=keys, aligned=True, fp8=fp8)
        chosen = choose(made, H200._replace(processors=processors))
        key = torch.empty(1, heads[1], 1, head_dim, dtype=torch.bfloat16)
        setup = make_launch(chosen, made, Inputs(key, key, key), key, False)
        (config,), (num_splits, each, lines) = setup.constants, setup.scalars[5:8]
        tiles = batch * heads[1] * config.row_tiles
        chunks = most_chunks(keys, chosen.config.min_chunk, chosen.config.max_chunks)
        shared = share_out(made, chosen.config)
        assert each == 2**config.levels if shared.whole_sequences else each in (1, 2, 4, 8) and each <= 2**config.levels
        assert num_splits == -(-chunks // each) and sorted(setup.grid) == sorted((tiles, num_splits))
        assert setup.grid == ((num_splits, tiles) if config.in_a_row else (tiles, num_splits))
        assert not config.in_a_row or tiles * num_splits <= processors, "what others wait for runs at the same time"
        assert tiles * num_splits >= min(tiles * chunks, processors - 4), "the GPU is filled where there are chunks"
        if shared.whole_sequences:
            assert each >= chosen.config.max_chunks and num_splits == 1, "no chunk is left out, whatever the length"
            assert not config.may_split and processors - 4 <= tiles <= shared.running
            assert shared.running == shared.resident * processors
            unequal = made._replace(range_layout="sequence")
            of_range = share_out(unequal, chosen.config)
            assert not of_range.whole_sequences, "one sequence may be much longer than the others"
        else:
            one_or_two = processors - 4 <= tiles <= 2 * processors
            assert fp8 or not one_or_two or config.rows > 8 or heads[1] < 8, "equal lengths, an SM each"
        level, nodes = num_splits, num_splits
        while level > 1:
            level = -(-level // config.fan_in)
            nodes += level
        assert lines == nodes and setup.counters == 0, "partial sums are their own flags"
        rows = queries * heads[0] // heads[1]
        floats = batch * heads[1] * rows * nodes * (chosen.config.block_dv + 2)
        assert setup.partials == (floats if chunks > 1 and not shared.whole_sequences else 0)
        long = made._replace(num_keys=10 * keys)
        (longer,) = make_launch(chosen, long, Inputs(key, key, key), key, False).constants
        assert longer == dataclasses.replace(config, may_split=longer.may_split), (
            "a generation compiles one kernel, and one more while there is a single chunk"
        )


def test_the_number_of_processors_reaches_the_launch():
    """Negative control of the above: what is shared out for 132 would not be right for 78."""
    made = problem_of(1, heads=(8, 8), head_dim=128, value_dim=128)._replace(batch_size=1, num_keys=2048, aligned=True)
    key = torch.empty(1, 8, 1, 128, dtype=torch.bfloat16)
    setups = [
        make_launch(choose(made, H200._replace(processors=n)), made, Inputs(key, key, key), key, False)
        for n in (132, 78)
    ]
    many, few = (config for setup in setups for config in setup.constants)
    assert many.in_a_row and not few.in_a_row
