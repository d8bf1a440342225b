"""From a Problem to the three launches of the Hopper backward: tensor descriptors, grids, constants."""

from typing import NamedTuple

import torch

from ...counters import forget, zero
from ...launch import LOG2_E, launch, score_factors
from ...problem import Problem
from ..run import _descriptor as descriptor
from ..run import _processors as processors_of
from ..schedule import heads_in_section
from .dkdv import DkdvConfig, flashcore_backward_dkdv
from .dq import DqConfig, flashcore_backward_dq
from .preprocess import flashcore_backward_rows
from .table import BackwardRow

# Places for which a program of `preprocess` reads O and dO.
PLACES = 32
# Keys of a tile of `dkdv`, queries of one of `dq`.
TILE = 128
# Tiles of a program, where they differ in length, that a section of heads has at least, see `heads_in_section`.
LEAST_ROUNDS = 2


class Launch(NamedTuple):
    """One kernel with its grid and parameters, as `launch` takes them."""

    kernel: object
    programs: int
    arguments: tuple
    scalars: tuple
    constants: tuple


def make_configs(problem: Problem, row: BackwardRow) -> tuple[DqConfig, DkdvConfig]:
    """What the two kernels for this problem are compiled for."""
    common = {"d": row.head_dim, "dv": row.value_dim, "softcap": problem.softcap > 0.0}
    common["range_layout"] = int(problem.range_layout is not None)
    dq = DqConfig(query_block=row.dkdv.block_m, **row.dq._asdict(), **common)
    return dq, DkdvConfig(**row.dkdv._asdict(), **common)


def places_of(problem: Problem, row: BackwardRow) -> int:
    """Places of each head in the buffer of `preprocess`: whole blocks of queries, wherever their grid begins."""
    return -(-(problem.num_queries + row.dkdv.block_m - 1) // TILE) * TILE


def eights(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of `[B, H, S, D]` but the last, and D, in units of 8 elements."""
    return (*(stride // 8 for stride in tensor.stride()[:3]), tensor.shape[3] // 8)


def gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    """An unwritten tensor for the gradient of `tensor`, laid out like it where the kernels can write that."""
    gradient = torch.empty_like(tensor)
    if gradient.stride(3) != 1 or any(stride % 8 for stride in gradient.stride()[:3]):
        gradient = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return gradient


def lse_factor(problem: Problem) -> float:
    """What makes of lse the number that the kernels add to scores: in units of log2 with softcap, else of q.k."""
    return -LOG2_E if problem.softcap else -1.0 / problem.scale


def rows_launch(problem, row, out, lse, grad_out, grad_lse, key_range, rows) -> Launch:
    """The launch of `flashcore_backward_rows`."""
    places = rows.shape[2]
    return Launch(
        flashcore_backward_rows,
        rows.shape[1] * places // PLACES,
        (
            out, grad_out, lse, grad_lse, key_range, rows, *out.stride()[:3], *grad_out.stride()[:3], places,
            rows.shape[1] * places, problem.value_dim,
        ),
        (problem.num_heads, problem.num_queries, problem.query_start, _line(key_range), lse_factor(problem)),
        (row.dkdv.block_m, row.value_dim, int(key_range is not None), PLACES),
    )  # fmt: skip


def _line(key_range: torch.Tensor | None) -> int:
    """Words from one sequence's line to the next."""
    return 0 if key_range is None else key_range.stride(0)


def _section(problem: Problem, all_heads: int, tiles: int, bytes_per_head: int, processors: int) -> int:
    """How many heads are worked on side by side; one where all tiles are of one length."""
    if problem.right < 0 and problem.range_layout is None:
        return 1
    return heads_in_section(1, bytes_per_head, all_heads, 1, tiles, processors, LEAST_ROUNDS)


def dq_launch(problem, row, query, key, value, key_range, grad_out, rows, grad_query, counter, processors) -> Launch:
    """The launch of `dq`."""
    config, _ = make_configs(problem, row)
    heads = problem.batch_size * problem.num_heads
    tiles = -(-problem.num_queries // TILE)
    # Heads of a group share their keys.
    bytes_per_head = 2 * problem.num_keys * (problem.head_dim + problem.value_dim) // problem.group
    return Launch(
        flashcore_backward_dq,
        min(processors, heads * tiles),
        (
            descriptor(query, 64, config.d), descriptor(grad_out, 64, config.dv),
            descriptor(key, config.block_n, config.d), descriptor(value, config.block_n, config.dv),
            rows, key_range, grad_query, counter, rows.shape[2], rows.shape[1] * rows.shape[2],
        ),
        (
            problem.num_heads, problem.group, problem.num_queries, problem.num_keys, problem.query_start, problem.left,
            problem.right, _line(key_range), *eights(grad_query), problem.scale,
            *score_factors(problem)[:2], heads, tiles,
            _section(problem, heads, tiles, max(bytes_per_head, 1), processors),
        ),
        (config,),
    )  # fmt: skip


def dkdv_launch(
    problem, row, query, key, value, key_range, grad_out, rows, grad_key, grad_value, counter, processors
) -> Launch:
    """The launch of `dkdv`."""
    _, config = make_configs(problem, row)
    heads = problem.batch_size * problem.num_kv_heads
    # With a key range the grid of blocks begins at the sequence's first key, and one may lie before it.
    tiles = -(-(problem.num_keys + (0 if key_range is None else TILE - 1)) // TILE)
    bytes_per_head = 2 * problem.group * problem.num_queries * (problem.head_dim + problem.value_dim)
    return Launch(
        flashcore_backward_dkdv,
        min(processors, heads * tiles),
        (
            descriptor(query, config.block_m, config.d), descriptor(grad_out, config.block_m, config.dv),
            descriptor(key, 64, config.d), descriptor(value, 64, config.dv),
            rows, key_range, grad_key, grad_value, counter, rows.shape[2], rows.shape[1] * rows.shape[2],
        ),
        (
            problem.num_kv_heads, problem.group, problem.num_queries, problem.num_keys, problem.query_start,
            problem.left, problem.right, _line(key_range), *eights(grad_key),
            *eights(grad_value), problem.scale, *score_factors(problem)[:2], heads, tiles,
            _section(problem, heads, tiles, bytes_per_head, processors),
        ),
        (config,),
    )  # fmt: skip


def run_hopper_backward(
    problem: Problem,
    config: BackwardRow,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_range: torch.Tensor | None,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key, value, and sinks if given, of a call that `hopper_backward_reason` does not object to.

    Args:
        query, key, value, key_range: the forward's, `[B, H, Q, D]`, `[B, Hkv, K, D]`, `[B, Hkv, K, Dv]`.
        output, lse: what forward gave, `[B, H, Q, Dv]` and `[B, H, Q]` fp32 (-inf where a query saw no key).
        grad_output, grad_lse: of those; `grad_lse` fp32, or None where nothing flows through lse.
        sinks: `[H]`, where their gradient is wanted; without it a call with sinks has the same dq, dk and dv.

    Returns:
        (dq, dk, dv), in the dtype of query, and with sinks their gradient in theirs; freshly allocated. Queries that
        saw no key and keys that no query saw get zeros, whatever their slots hold.
    """
    grad_output = _readable(grad_output)
    lse = lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    gradients = tuple(map(gradient_of, (query, key, value)))
    # Of meta tensors the launches are only compiled, and for every grid alike.
    processors = 1 if query.is_meta else processors_of(query.device)
    heads = problem.batch_size * problem.num_heads
    rows = torch.empty(2, heads, places_of(problem, config), dtype=torch.float32, device=query.device)
    counter = zero(query.device)
    tensors = (problem, config, query, key, value, key_range, grad_output, rows)
    launches = (
        rows_launch(problem, config, output, lse, grad_output, grad_lse, key_range, rows),
        dq_launch(*tensors, gradients[0], counter, processors),
        dkdv_launch(*tensors, *gradients[1:], counter, processors),
    )
    try:
        for each in launches:
            launch(*each, config)
    except BaseException:
        forget(query.device)
        raise
    return gradients if sinks is None else (*gradients, sink_gradient(problem, sinks, rows))


def sink_gradient(problem: Problem, sinks: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Gradient of `sinks` `[H]`, of what `preprocess` left in `rows` `[2, B * H, places]`.

    A sink is one more key, whose value is 0, so that its dP is too: P * (0 - delta), summed over all queries.
    """
    lse, negative_delta = rows.view(2, problem.batch_size, problem.num_heads, -1)
    # Places without a query say that lse is infinite.
    probability = torch.exp(sinks.float()[:, None] - lse / lse_factor(problem))
    return (probability * negative_delta).sum((0, 2)).to(sinks.dtype)


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, in a form that the copy engine reads: gradients come expanded, transposed, or as views of others."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride()) if size > 1]
    fine = tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0 and all(s and s % 8 == 0 for s in strides[:-1])
    return tensor if fine else tensor.contiguous()
