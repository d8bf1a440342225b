"""The portable backward: every GPU that Triton compiles for, fp16, bf16 and fp32, everything that the forward takes.

Two kernels, one for dQ (backward_query.py) and one for dK and dV (backward_key.py), make the scores twice, and need
neither atomics nor buffers for it: gradients have the same bits in every run, and for a sequence alone, batched or
padded. A third (backward_mask.py) makes the gradient of an additive mask where that is asked for, and where there is
such a mask a fourth (backward_shift.py) comes first, for rows whose log-sum-exp has no digits left.
"""

import torch
import triton

from ..dropout import drop_threshold
from ..problem import LOG2_E, Inputs, Problem, empty_like_heads, with_mask_in_rows
from ..runtime.launch import launch
from ..runtime.recording import fresh, seen_as
from .backward_key import flashcore_backward_dkdv, flashcore_query_blocks
from .backward_mask import flashcore_backward_mask
from .backward_query import flashcore_backward_dq
from .backward_shift import flashcore_backward_shift
from .backward_table import BackwardConfig, BackwardRow
from .blocks import mask_strides

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def run_backward(
    problem: Problem,
    config: BackwardConfig,
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
        problem, config: what was asked, and `backward_config(problem, arch)`.
        inputs: as the forward had them; with dropout its `philox` too.
        output: `[B, H, Q, Dv]`, the forward's.
        lse: fp32 `[B, H, Q]`, the forward's.
        grad_output: `[B, H, Q, Dv]` in output's dtype, any strides.
        grad_lse: `[B, H, Q]`, or None where nothing looked at the lse.
        sinks_grad, mask_grad: make these gradients too.

    Returns:
        (dq, dk, dv, dsinks, dmask): the first three `[B, H or Hkv, S, D]` in the inputs' dtype, laid out so that
        `.transpose(1, 2)` is contiguous; dsinks `[H]` and dmask (of the mask's shape, summed over what it was broadcast
        over), in their own dtypes, or None.

    Raises:
        NotImplementedError: keys and values are in fp8.
        ValueError: dropout without `philox` or the reverse; mask_grad without a floating-point mask.
    """
    if problem.fp8:
        raise NotImplementedError(
            "gradients of attention over float8_e4m3fn keys and values are not supported; "
            "use keys and values in query's dtype where gradients are needed"
        )
    given_mask = inputs.mask
    query, key, value, key_range, mask, sinks = with_mask_in_rows(inputs)[:6]
    dropout, philox = problem.dropout, inputs.philox
    if (philox is None) != (dropout == 0.0):
        raise ValueError(f"dropout={dropout} with philox={philox}: a seed and offset belong to dropout above 0")
    if mask_grad and problem.mask_kind != "float":
        raise ValueError(f"mask_grad with a mask of kind {problem.mask_kind}: only an additive mask has a gradient")
    dtype = query.dtype
    query, key, value, output, grad_output = (
        t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value, output, grad_output)
    )
    lse = lse.contiguous()
    if dtype == torch.bfloat16 and query.device.type == "cpu":
        # NumPy has no bfloat16, and the interpreter would multiply its bit patterns.
        query, key, value, output, grad_output = (t.float() for t in (query, key, value, output, grad_output))
    if grad_lse is not None:
        grad_lse = grad_lse.float().contiguous()
    scale = problem.scale
    if scale == 0.0:
        # Products have to be 0 for the right probabilities, and a factor that can be divided by.
        query, problem = query * 0.0, problem._replace(scale=1.0)
    call = BackwardCall(problem, config, key_range, mask, philox, drop_threshold(dropout), 1.0 / (1.0 - dropout))
    # What is answered comes first: whoever makes the launches again finds it there.
    dq, dk, dv = (fresh(empty_like_heads(t)) for t in (query, key, value))
    dmask = fresh(given_mask.new_empty(given_mask.shape, dtype=torch.float32)) if mask_grad else None
    delta, weight, shift = fresh(torch.empty_like(lse)), None, lse
    if problem.mask_kind == "float":
        shift, weight = call.launch_shift(query, key, sinks, lse)
    call.launch_dq(query, key, value, output, grad_output, grad_lse, shift, weight, delta, dq, scale)
    call.launch_dkdv(query, key, value, grad_output, shift, weight, delta, dk, dv, scale)
    if mask_grad:
        call.launch_mask(query, key, value, grad_output, shift, weight, delta, dmask)
        dmask = dmask.to(mask.dtype)
    dsinks = sink_gradient(sinks, lse, delta) if sinks_grad else None
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), dsinks, dmask


def sink_gradient(sinks: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """`[H]`: a sink is one more key, whose value is 0: -sum of exp(sink - lse) * delta over the batch and its rows."""
    share = torch.exp(sinks.float()[None, :, None] - lse)  # [B, H, Q]
    # A sink of -inf, in a row without a key, has no share in anything.
    share = share.masked_fill(lse == -torch.inf, 0.0)
    return -(share * delta).sum(dim=(0, 2)).to(sinks.dtype)


class BackwardCall:
    """What the launches of one backward have in common."""

    def __init__(
        self,
        problem: Problem,
        config: BackwardConfig,
        key_range: torch.Tensor | None,
        mask: torch.Tensor | None,
        philox: torch.Tensor | None,
        drop_below: int,
        keep_scale: float,
    ):
        self.problem, self.config, self.philox = problem, config, philox
        self.key_range = key_range
        self.mask = seen_as(mask.view(torch.uint8), mask) if problem.mask_kind == "bool" else mask
        self.mask_strides = mask_strides(mask)
        self.range_strides = (0, 0) if key_range is None else (key_range.stride(0), key_range.stride(2))
        self.range = (None, "sequence", "rows").index(problem.range_layout)
        self.exact = problem.dtype == torch.float32
        self.fold = self.folds(problem)
        unit = 1.0 if self.exact else LOG2_E
        if problem.softcap:
            factors = problem.scale / problem.softcap, problem.softcap * unit
        else:
            factors = problem.scale * unit, 0.0
        self.numbers = (
            problem.num_queries, problem.num_keys, problem.query_start, problem.left, problem.right, drop_below,
        )  # fmt: skip
        self.factors, self.keep_scale = (*factors, 1.0 / factors[0]), keep_scale

    @staticmethod
    def folds(problem: Problem) -> bool:
        """Whether the sums of products that are scores begin at -lse.

        Under softcap the tanh needs the scores alone, a float mask is added to them, and in fp32 it would cost digits.
        """
        return not (problem.softcap or problem.mask_kind == "float" or problem.dtype == torch.float32)

    def constants(self, row: BackwardRow) -> tuple:
        sizes = self.problem.head_dim, self.problem.value_dim, self.config.block_d, self.config.block_dv
        return *sizes, row.block_m, row.block_n, self.exact, self.range

    def features(self) -> tuple:
        mask = (None, "bool", "float").index(self.problem.mask_kind)
        return mask, self.problem.softcap > 0.0, self.fold

    def launch_shift(self, query, key, sinks, lse) -> tuple[torch.Tensor, torch.Tensor]:
        """(Shift, Weight) in place of an lse that an additive mask may have left without digits."""
        problem, row = self.problem, self.config.mask
        shift, weight = fresh(torch.empty_like(lse)), fresh(torch.empty_like(lse))
        launch(
            flashcore_backward_shift,
            triton.cdiv(problem.num_queries, row.block_m) * problem.batch_size * problem.num_heads,
            (
                query, key, lse, shift, weight, self.key_range, self.mask, sinks, *_strides(query, key),
                *self.range_strides, *self.mask_strides, problem.num_heads, problem.group,
            ),
            (*self.numbers, *self.factors[:2], 1.0),
            (
                problem.head_dim, self.config.block_d, row.block_m, row.block_n, self.exact, self.range,
                problem.softcap > 0.0,
            ),
            num_warps=row.num_warps,
            num_stages=row.num_stages,
        )  # fmt: skip
        return shift, weight

    def launch_dq(self, query, key, value, output, grad_output, grad_lse, lse, weight, delta, dq, scale: float) -> None:
        problem, row = self.problem, self.config.dq
        launch(
            flashcore_backward_dq,
            triton.cdiv(problem.num_queries, row.block_m) * problem.batch_size * problem.num_heads,
            (
                query, key, value, output, grad_output, grad_lse, lse, weight, delta, dq, self.key_range,
                self.mask, self.philox, *_strides(query, key, value, output, grad_output, dq), *self.range_strides,
                *self.mask_strides, problem.num_heads, problem.group,
            ),
            (*self.numbers, *self.factors, scale, self.keep_scale, 1.0),
            (*self.constants(row), *self.features(), row.branch),
            num_warps=row.num_warps,
            num_stages=row.num_stages,
        )  # fmt: skip

    def launch_dkdv(self, query, key, value, grad_output, lse, weight, delta, dk, dv, scale: float) -> None:
        problem, row = self.problem, self.config.dkdv
        blocks = None
        if problem.range_layout == "rows":
            num_blocks = triton.cdiv(problem.num_queries, row.block_m)
            blocks = fresh(torch.empty(problem.batch_size, num_blocks, 4, dtype=torch.int32, device=query.device))
            launch(
                flashcore_query_blocks, (num_blocks, problem.batch_size), (self.key_range, blocks, *self.range_strides),
                (problem.num_queries, problem.num_keys), (row.block_m,), num_warps=row.num_warps,
                num_stages=row.num_stages,
            )  # fmt: skip
        # One tile more may lie before a sequence's first key.
        num_tiles = triton.cdiv(problem.num_keys, row.block_n) + (problem.range_layout == "sequence")
        launch(
            flashcore_backward_dkdv,
            num_tiles * problem.batch_size * problem.num_kv_heads,
            (
                query, key, value, grad_output, lse, weight, delta, dk, dv, self.key_range, blocks, self.mask,
                self.philox,
                *_strides(query, key, value, grad_output, dk, dv), *self.range_strides, *self.mask_strides,
                problem.num_heads, problem.group,
            ),
            (*self.numbers, *self.factors, scale, self.keep_scale, 1.0),
            (*self.constants(row), *self.features(), row.branch),
            num_warps=row.num_warps,
            num_stages=row.num_stages,
        )  # fmt: skip

    def launch_mask(self, query, key, value, grad_output, lse, weight, delta, dmask) -> None:
        problem, row = self.problem, self.config.mask
        batch, heads, queries, keys = dmask.shape
        # Along an axis that the mask is broadcast over, one tile sums up all.
        sum_m, sum_n = queries < problem.num_queries, keys < problem.num_keys
        m_tiles = 1 if sum_m else triton.cdiv(queries, row.block_m)
        launch(
            flashcore_backward_mask,
            (1 if sum_n else triton.cdiv(keys, row.block_n)) * m_tiles * batch * heads,
            (
                query, key, value, grad_output, lse, weight, delta, dmask, self.key_range, self.mask, self.philox,
                *_strides(query, key, value, grad_output), *self.range_strides, *self.mask_strides, batch, heads,
                problem.batch_size, problem.num_heads, problem.group,
            ),
            (*self.numbers, *self.factors, self.keep_scale, 1.0),
            (*self.constants(row), problem.softcap > 0.0, sum_m, sum_n),
            num_warps=row.num_warps,
            num_stages=row.num_stages,
        )  # fmt: skip


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])
