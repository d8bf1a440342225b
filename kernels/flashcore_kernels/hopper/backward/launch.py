"""From a Problem to the three launches of the Hopper backward: tensor descriptors, grids, constants."""

import torch

from ...dropout import drop_threshold
from ...problem import LOG2_E, Inputs, Problem, empty_like_heads
from ...runtime.launch import launch
from ...runtime.recording import fresh
from ...runtime.workspace import forget, workspace
from ..descriptors import descriptor
from ..schedule import heads_in_section
from .choose import HopperBackwardConfig
from .dkdv import DkdvConstants, flashcore_hopper_backward_dkdv
from .dq import DqConstants, flashcore_hopper_backward_dq
from .preprocess import flashcore_hopper_backward_rows
from .spans import SCAN, flashcore_hopper_backward_blocks, flashcore_hopper_backward_spans
from .table import BackwardRow

# Places for which a program of `preprocess` reads O and dO.
PLACES = 32
# Queries of a tile of `dq`.
TILE = 128
# Tiles of a program, where they differ in length, that a section of heads has at least, see `heads_in_section`.
LEAST_ROUNDS = 2

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, None]


def run_backward(
    problem: Problem,
    config: HopperBackwardConfig,
    inputs: Inputs,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None = None,
    *,
    sinks_grad: bool = False,
    mask_grad: bool = False,
) -> Gradients:
    """Gradients of an attention call from what its forward answered.

    Args:
        problem, config: what was asked, and what `choose_hopper_backward` answers to it.
        inputs: as the forward had them, with dropout its `philox` too; keys and values that no query sees may hold
            anything.
        output: `[B, H, Q, Dv]`, the forward's.
        lse: fp32 `[B, H, Q]`, the forward's: -inf where a query saw neither a key nor a sink.
        grad_output: `[B, H, Q, Dv]` in output's dtype, any strides.
        grad_lse: `[B, H, Q]`, or None where nothing looked at the lse.
        sinks_grad: make the gradient of the sinks too.
        mask_grad: never here, where there is no mask.

    Returns:
        (dq, dk, dv, dsinks, None): the first three `[B, H or Hkv, S, D]` in the inputs' dtype, laid out so that
        `.transpose(1, 2)` is contiguous; dsinks `[H]` in its own dtype, or None. Queries that saw no key and keys that
        no query saw get zeros.
    """
    query, key, value, output, grad_output = map(_readable, (*inputs[:3], output, grad_output))
    inputs = inputs._replace(query=query, key=key, value=value)
    lse = lse.contiguous()
    if grad_lse is not None:
        grad_lse = grad_lse.float().contiguous()
    grad_query, grad_key, grad_value = (fresh(empty_like_heads(t)) for t in (query, key, value))
    heads = problem.batch_size * problem.num_heads
    numbers = 4 if problem.dropout else 2
    rows = fresh(query.new_empty(numbers, heads, places_of(problem, config.row), dtype=torch.float32))
    try:
        _, counter = workspace(0, 1, query.device)
        launch_rows(problem, config, inputs, output, lse, grad_output, grad_lse, rows)
        spans = launch_spans(problem, config, inputs.key_range) if problem.range_layout == "rows" else None
        launch_dq(problem, config, inputs, grad_output, rows, spans, grad_query, counter)
        launch_dkdv(problem, config, inputs, grad_output, rows, spans, grad_key, grad_value, counter)
    except BaseException:
        forget(query.device)
        raise
    grad_sinks = sink_gradient(problem, inputs.sinks, rows) if sinks_grad else None
    return grad_query, grad_key, grad_value, grad_sinks, None


def sink_gradient(problem: Problem, sinks: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Gradient of `sinks` `[H]`, of what `preprocess` left in `rows` `[2 or 4, B * H, places]`.

    A sink is one more key, whose value is 0, so that its dP is too: P * (0 - delta), summed over all queries.
    """
    lse, negative_delta = rows[:2].view(2, problem.batch_size, problem.num_heads, -1)
    # A row that saw no key, whose lse is the sink and says -inf here, and places without a query, whose delta is 0.
    blind = lse == -torch.inf
    probability = torch.exp(sinks.float()[:, None] - lse / lse_factor(problem)).masked_fill(blind, 1.0)
    return ((probability * negative_delta).sum((0, 2)) / delta_factor(problem)).to(sinks.dtype)


def launch_rows(
    problem: Problem,
    config: HopperBackwardConfig,
    inputs: Inputs,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    rows: torch.Tensor,
) -> None:
    """Write lse and delta of each query, and with dropout its words, to rows `[2 or 4, B * H, places]`."""
    row, key_range = config.row, inputs.key_range
    _, heads, places = rows.shape
    launch(
        flashcore_hopper_backward_rows,
        heads * places // PLACES,
        (output, grad_output, lse, grad_lse, key_range, inputs.philox, rows, places, heads * places, problem.value_dim),
        (
            *_eights(output)[:3], *_eights(grad_output)[:3], problem.num_heads, *_visibility(problem, key_range),
            lse_factor(problem), delta_factor(problem),
        ),
        (row.dkdv.block_m, row.value_dim, range_layout(problem), problem.has_sinks, PLACES),
    )  # fmt: skip


def launch_dq(
    problem: Problem,
    config: HopperBackwardConfig,
    inputs: Inputs,
    grad_output: torch.Tensor,
    rows: torch.Tensor,
    spans: torch.Tensor | None,
    grad_query: torch.Tensor,
    counter: torch.Tensor,
) -> None:
    """Write grad_query `[B, H, Q, D]`."""
    constants = dq_constants(problem, config.row)
    query, key, value, key_range = inputs[:4]
    heads = problem.batch_size * problem.num_heads
    tiles = -(-problem.num_queries // TILE)
    # Heads of a group share their keys.
    bytes_per_head = max(2 * problem.num_keys * (problem.head_dim + problem.value_dim) // problem.group, 1)
    launch(
        flashcore_hopper_backward_dq,
        min(config.processors, heads * tiles),
        (
            descriptor(query, 64, constants.d), descriptor(grad_output, 64, constants.dv),
            descriptor(key, constants.block_n, constants.d), descriptor(value, constants.block_n, constants.dv),
            rows, key_range, spans, grad_query, counter, rows.shape[2], rows.shape[1] * rows.shape[2],
        ),
        (
            problem.num_heads, problem.group, *_visibility(problem, key_range), *_eights(grad_query),
            problem.scale / delta_factor(problem), *problem.score_factors[:2], heads, tiles,
            _section(problem, heads, tiles, bytes_per_head, config.processors), drop_threshold(problem.dropout),
        ),
        (constants,),
    )  # fmt: skip


def launch_spans(problem: Problem, config: HopperBackwardConfig, key_range: torch.Tensor) -> torch.Tensor:
    """Which queries see each 64 keys: int32 `[B, spans, 8]`, see spans.py."""
    block_m = config.row.dkdv.block_m
    # One more, of no keys: the last tile of `dkdv` may have it.
    num_blocks, spans = -(-problem.num_queries // block_m), -(-problem.num_keys // 64) + 1
    words = {"dtype": torch.int32, "device": key_range.device}
    blocks = fresh(torch.empty(problem.batch_size, 5, num_blocks, **words))
    found = fresh(torch.empty(problem.batch_size, spans, 8, **words))
    sizes = problem.num_queries, problem.num_keys, key_range.stride(0), key_range.stride(2)
    grid = num_blocks, problem.batch_size
    launch(flashcore_hopper_backward_blocks, grid, (key_range, blocks), sizes, (block_m,))
    grid = spans, problem.batch_size
    launch(
        flashcore_hopper_backward_spans, grid, (key_range, blocks, found), (num_blocks, *sizes), (block_m, SCAN)
    )  # fmt: skip
    return found


def launch_dkdv(
    problem: Problem,
    config: HopperBackwardConfig,
    inputs: Inputs,
    grad_output: torch.Tensor,
    rows: torch.Tensor,
    spans: torch.Tensor | None,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    counter: torch.Tensor,
) -> None:
    """Write grad_key `[B, Hkv, K, D]` and grad_value `[B, Hkv, K, Dv]`."""
    constants = dkdv_constants(problem, config.row)
    query, key, value, key_range = inputs[:4]
    heads = problem.batch_size * problem.num_kv_heads
    # With a line a sequence the grid of blocks begins at the sequence's first key, and one may lie before it.
    before = constants.tile_keys - 1 if problem.range_layout == "sequence" else 0
    tiles = -(-(problem.num_keys + before) // constants.tile_keys)
    bytes_per_head = 2 * problem.group * problem.num_queries * (problem.head_dim + problem.value_dim)
    launch(
        flashcore_hopper_backward_dkdv,
        min(config.processors, heads * tiles),
        (
            descriptor(query, constants.block_m, constants.d), descriptor(grad_output, constants.block_m, constants.dv),
            descriptor(key, 64, constants.d), descriptor(value, 64, constants.dv),
            rows, key_range, spans, grad_key, grad_value, counter, rows.shape[2], rows.shape[1] * rows.shape[2],
        ),
        (
            problem.num_kv_heads, problem.group, *_visibility(problem, key_range), *_eights(grad_key),
            *_eights(grad_value), problem.scale / delta_factor(problem), *problem.score_factors[:2], heads, tiles,
            _section(problem, heads, tiles, bytes_per_head, config.processors), drop_threshold(problem.dropout),
            1.0 / (1.0 - problem.dropout),
        ),
        (constants,),
    )  # fmt: skip


def dq_constants(problem: Problem, row: BackwardRow) -> DqConstants:
    """What `dq` for this call is compiled for."""
    return DqConstants(
        d=row.head_dim,
        dv=row.value_dim,
        block_n=row.dq.block_n,
        stages=row.dq.stages,
        query_block=row.dkdv.block_m,
        range_layout=range_layout(problem),
        softcap=problem.softcap > 0.0,
        dropout=problem.dropout > 0.0,
        consumer_registers=row.dq.consumer_registers,
        producer_registers=row.dq.producer_registers,
    )


def dkdv_constants(problem: Problem, row: BackwardRow) -> DkdvConstants:
    """What `dkdv` for this call is compiled for."""
    return DkdvConstants(
        d=row.head_dim,
        dv=row.value_dim,
        block_m=row.dkdv.block_m,
        query_stages=row.dkdv.query_stages,
        grad_stages=row.dkdv.grad_stages,
        shared_keys=row.dkdv.shared_keys,
        range_layout=range_layout(problem),
        softcap=problem.softcap > 0.0,
        dropout=problem.dropout > 0.0,
        consumer_registers=row.dkdv.consumer_registers,
        producer_registers=row.dkdv.producer_registers,
    )


def places_of(problem: Problem, row: BackwardRow) -> int:
    """Places of each head in the buffer of `preprocess`: whole blocks of queries, wherever their grid begins."""
    return -(-(problem.num_queries + row.dkdv.block_m - 1) // TILE) * TILE


def lse_factor(problem: Problem) -> float:
    """What makes of lse the number that the kernels add to scores: in units of log2 with softcap, else of q.k."""
    return -LOG2_E if problem.softcap else -1.0 / problem.scale


def delta_factor(problem: Problem) -> float:
    """What the kernels' delta and dS are multiplied by, see `preprocess` and `dropout.score_gradient`."""
    return 2.0 * (1.0 - problem.dropout) if problem.dropout else 1.0


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy where the copy engine cannot read it: where it is expanded, or no multiple of 16 bytes.

    Not `contiguous`, which returns a tensor as it is where only its address is wrong.
    """
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()) if size > 1]
    fine = tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0 and all(s and s % 8 == 0 for s in strides)
    return tensor if fine else tensor.clone(memory_format=torch.contiguous_format)


def _eights(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of `[B, H, S, D]` but the last, and D, in units of 8 elements."""
    return (*(stride // 8 for stride in tensor.stride()[:3]), tensor.shape[3] // 8)


def range_layout(problem: Problem) -> int:
    """0 no KeyRange, 1 a line a sequence, 2 a line a query."""
    return (None, "sequence", "rows").index(problem.range_layout)


def _visibility(problem: Problem, key_range: torch.Tensor | None) -> tuple[int, ...]:
    """What a `Visibility` holds, in its order."""
    strides = (0, 0) if key_range is None else (key_range.stride(0), key_range.stride(2))
    # With a line a query it does not matter where query 0 stands. Before the first key, where there are fewer keys than
    # queries, it would move the blocks of queries off the grid of spans.py.
    query_start = 0 if problem.range_layout == "rows" else problem.query_start
    return (problem.num_queries, problem.num_keys, query_start, problem.left, problem.right, *strides)


def _section(problem: Problem, all_heads: int, tiles: int, bytes_per_head: int, processors: int) -> int:
    """How many heads are worked on side by side; one where all tiles are of one length."""
    if problem.right < 0 and problem.range_layout is None:
        return 1
    return heads_in_section(1, bytes_per_head, all_heads, 1, tiles, processors, LEAST_ROUNDS)
