"""What a launch gets on the long way, caught before it: descriptors, grids, how chunks are shared out, the launcher.

No GPU is needed. tests/gpu/test_hopper.py and test_hopper_decode.py see what the launches compute.
"""

import dataclasses
import itertools
import types

import pytest
import torch
from flashcore_kernels.choose import choose
from flashcore_kernels.plan import most_chunks
from flashcore_kernels.problem import check_problem, with_alignment
from flashcore_kernels.runtime import launch

from ..test_plan import problem as problem_of
from .test_prepared import H200, tensors_of  # which skips where there is no Triton


class TestHopper:
    @pytest.fixture
    def launched(self, monkeypatch):
        run = pytest.importorskip("flashcore_kernels.hopper.prefill.launch")
        caught = []
        monkeypatch.setattr(run, "launch", lambda *args: caught.append(args))

        def launch_of(query, key, value, is_causal=False, sinks=None, lse=None):
            problem = check_problem(query, key, value, None, None, is_causal, None, None, None, sinks, None, None)
            chosen = choose(with_alignment(problem, query, key, value), H200)
            assert chosen.kernel == "flashcore_hopper", chosen
            out = torch.empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3], dtype=query.dtype)
            run.run_hopper(problem, chosen, query, key, value, None, None, sinks, out.transpose(1, 2), lse)
            return chosen, caught.pop()

        return launch_of

    def test_descriptors_say_where_the_tensors_are(self, launched):
        query, key, value = tensors_of(num_queries=200)
        chosen, (_, programs, arguments, scalars, _, _) = launched(query, key, value)
        q, _, k, _, v, _, o, _ = arguments[:8]
        for tensor, descriptor, rows in (
            (query, q, 64),
            (key, k, chosen.config.block_n),
            (value, v, chosen.config.block_n),
        ):
            assert descriptor.base is tensor and list(descriptor.shape) == list(tensor.shape)
            assert list(descriptor.strides) == list(tensor.stride())
            assert list(descriptor.block_shape) == [1, 1, rows, 64]
        assert list(o.shape) == [2, 8, 200, 64] and o.strides[1] == 64
        tiles = -(-200 // chosen.config.block_m)
        assert programs == min(132, 16 * tiles)
        assert scalars[:5] == (8, 4, 200, 500, 300) and scalars[-3:] == (16, tiles, 1)

    def test_head_dims_that_are_no_power_of_two_come_in_two_pieces(self, launched):
        query, key, value = (torch.randn(1, 4, 100, size, dtype=torch.float16) for size in (192, 192, 128))
        _, (_, _, arguments, _, _, _) = launched(query, key, value)
        columns = [None if d is None else d.block_shape[3] for d in arguments[:8]]
        assert columns == [128, 64, 128, 64, 128, None, 64, None], "the output leaves in halves"

    def test_a_stride_that_is_never_used_does_not_matter(self, launched):
        """One sequence, whose batch stride may be anything."""
        query = torch.randn(1, 4, 100, 64, dtype=torch.float16)
        odd = query.as_strided(query.shape, (3, *query.stride()[1:]))
        _, (_, _, arguments, _, _, _) = launched(odd, query, query)
        assert arguments[0].strides[0] % 8 == 0

    def test_causal_tiles_come_in_sections(self, launched):
        query = torch.empty(1, 32, 8192, 64, dtype=torch.float16)
        key = query[:, :8]
        full, causal = (launched(query, key, key, is_causal=c)[1][3][-1] for c in (False, True))
        assert full == 1 < causal

    def test_sections_last_as_many_rounds_as_the_row_says(self, launched):
        """Of these heads 4 fit; 3 consumers want five rounds, which 8 of them make."""
        query = torch.empty(1, 32, 16384, 64, dtype=torch.float16)
        chosen, (_, _, _, scalars, _, _) = launched(query, query, query, is_causal=True)
        assert chosen.config.row.least_rounds == 5 and scalars[-1] == 8


@pytest.mark.parametrize("queries", [1, 4, 16])
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (32, 1)])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("processors", [132, 114, 78])
def test_how_the_hopper_kernel_shares_chunks_out(processors, fp8, heads, queries):
    """On an H200, and on other parts of compute capability 9.0 (H100 PCIe, H20)."""
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    decode_run = pytest.importorskip("flashcore_kernels.hopper.decode.launch")
    for batch, keys, head_dim in itertools.product((1, 2, 7, 16, 64, 300), (1, 129, 2048, 100_000), (64, 128, 256)):
        made = problem_of(queries, heads=heads, head_dim=head_dim, value_dim=head_dim)
        made = made._replace(batch_size=batch, num_keys=keys, aligned=True, fp8=fp8)
        chosen = plan(made, H200._replace(processors=processors))
        key = torch.empty(1, heads[1], 1, head_dim, dtype=torch.bfloat16)
        setup = decode_run.hopper_decode_launch(made, chosen, key, key, key, None, False)
        (config,), (num_splits, each, lines) = setup.constants, setup.scalars[5:8]
        units = batch * heads[1] * config.row_tiles
        chunks = most_chunks(keys, chosen.config.min_chunk, chosen.config.max_chunks)
        shared = decode_run.sharing(made, chosen)
        assert each == 2**config.levels if shared.whole else each in (1, 2, 4, 8) and each <= 2**config.levels
        assert num_splits == -(-chunks // each) and sorted(setup.programs) == sorted((units, num_splits))
        assert setup.programs == ((num_splits, units) if config.in_a_row else (units, num_splits))
        assert not config.in_a_row or units * num_splits <= processors, "what others wait for runs at the same time"
        assert units * num_splits >= min(units * chunks, processors - 4), "the GPU is filled where there are chunks"
        if shared.whole:
            assert each >= chosen.max_splits and num_splits == 1, "no chunk is left out, whatever the length"
            assert not config.may_split and processors - 4 <= units <= shared.resident * processors
            unequal = made._replace(range_layout="sequence")
            assert not decode_run.sharing(unequal, chosen).whole, "one sequence may be much longer than the others"
        else:
            one_or_two = processors - 4 <= units <= 2 * processors
            assert fp8 or not one_or_two or config.rows > 8 or heads[1] < 8, "equal lengths, an SM each"
        level, nodes = num_splits, num_splits
        while level > 1:
            level = -(-level // config.fan_in)
            nodes += level
        assert lines == nodes and setup.units == 0, "partial sums are their own flags"
        rows = queries * heads[0] // heads[1]
        floats = batch * heads[1] * rows * nodes * (chosen.config.block_dv + 2)
        assert setup.partial == (floats if chunks > 1 and not shared.whole else 0)
        long = made._replace(num_keys=10 * keys)
        (longer,) = decode_run.hopper_decode_launch(long, chosen, key, key, key, None, False).constants
        assert longer == dataclasses.replace(config, may_split=longer.may_split), (
            "a generation compiles one kernel, and one more while there is a single chunk"
        )


def test_the_number_of_processors_reaches_the_launch():
    """Negative control of the above: what is shared out for 132 would not be right for 78."""
    decode_run = pytest.importorskip("flashcore_kernels.hopper.decode_run")
    made = problem_of(1, heads=(8, 8), head_dim=128, value_dim=128)._replace(batch_size=1, num_keys=2048, aligned=True)
    key = torch.empty(1, 8, 1, 128, dtype=torch.bfloat16)
    setups = [
        decode_run.hopper_decode_launch(made, plan(made, H200._replace(processors=n)), key, key, key, None, False)
        for n in (132, 78)
    ]
    many, few = (config for setup in setups for config in setup.constants)
    assert many.in_a_row and not few.in_a_row


def test_a_gpus_processors_are_counted(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr("flashcore_kernels.forward.flashcore_forward", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(multi_processor_count=78)
    )
    found = op.device_of.__wrapped__(torch.device("cuda", 0))
    assert (found.kind, found.arch, found.processors) == ("cuda", 90, 78)
    assert plan(problem_of(aligned=True), found).processors == 78


def test_aligned_and_unaligned_calls_get_kernels_of_their_own():
    """What Triton compiles a variant for is in the key under which a compiled kernel is kept."""
    tensor = torch.zeros(64, dtype=torch.float16)
    chosen = choose(check_problem(*tensors_of(), None, None, False, None, None, None, None, None, None), H200)
    keys = [
        launch._key("kernel", (pointer, number), (), chosen)
        for pointer, number in ((tensor, 16), (tensor[1:], 16), (tensor, 17), (tensor, 1), (tensor, 2**33))
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == launch._key("kernel", (torch.zeros(64, dtype=torch.float16), 32), (), chosen)


class CudaLauncher:
    """Triton's, as of 3.5 and 3.6."""

    launch_cooperative_grid, launch_pdl, global_scratch_size, profile_scratch_size = False, True, 0, 0

    def __init__(self):
        self.caught = []

    def launch(self, *arguments):
        self.caught.append(arguments)

    def __call__(self, x, y, z, stream, function, *rest):
        scratch = [f"{size} bytes" if size else None for size in (self.global_scratch_size, self.profile_scratch_size)]
        self.launch(x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl, *scratch, *rest)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("scratch", [0, 128])
def test_past_tritons_own_launcher(monkeypatch, known, scratch):
    """Straight to its C function, with the arguments that it would pass on; never where it has more to do."""
    monkeypatch.setattr(launch, "_has_known_launcher", lambda: known)
    monkeypatch.setattr(CudaLauncher, "global_scratch_size", scratch)
    run = CudaLauncher()
    call, prefix = launch.launcher(types.SimpleNamespace(run=run, function="function", packed_metadata="metadata"))
    assert (call == run.launch) == (known and not scratch)
    call(5, 1, 1, "stream", *prefix, "query", "key")
    run(5, 1, 1, "stream", "function", "metadata", None, None, None, "query", "key")
    assert run.caught[0] == run.caught[1]


def test_what_is_known_of_tritons_launcher():
    """The signature of these versions, read from their source where one of them is installed."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="before 3.5 nobody has asked")
    expected = "iiiKKppOOOOOO"  # grid, stream, function, two flags; scratch x 2, metadata x 2, hooks x 2
    assert launch._has_known_launcher() == (getattr(driver, "_BASE_ARGS_FORMAT", None) == expected)
