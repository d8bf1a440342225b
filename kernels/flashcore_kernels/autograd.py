"""The operators for training: `flashcore::flash_attn_fwd`, and `flashcore::flash_attn_bwd`, which autograd calls.

Checkpointing that selects operators by name looks for "flash_attn", and tells sliding layers by `window_size_left`.
"""

from contextlib import nullcontext

import torch

from .choose import choose, choose_backward
from .counting import count_path
from .device import device_of
from .dispatch import serve_backward
from .fallback import note_fallback
from .problem import Inputs, Problem, empty_like_heads, problem_of_numbers, with_alignment
from .run import first_of_its_kind, run
from .runtime.prepared import find

_library = torch.library.Library("flashcore", "FRAGMENT")
_library.define(
    "flash_attn_fwd(Tensor query, Tensor key, Tensor value, Tensor? key_range, Tensor? mask, Tensor? sinks, "
    "int window_size_left, int window_size_right, float scale, float softcap, float dropout=0.0, Tensor? philox=None) "
    "-> (Tensor, Tensor)"
)
_library.define(
    "flash_attn_bwd(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? key_range, "
    "Tensor? mask, Tensor? sinks, Tensor output, Tensor lse, int window_size_left, int window_size_right, float scale, "
    "float softcap, float dropout, Tensor? philox, bool sinks_grad, bool mask_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# Places of flash_attn_fwd's arguments, and their number.
_MASK, _SINKS, _ARGUMENTS = 4, 5, 12


def flash_attn_fwd(problem: Problem, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(output `[B, H, Q, Dv]`, lse `[B, H, Q]`) of a call of which autograd keeps what its backward needs.

    Args:
        inputs: not in fp8; with dropout their `philox`, see `draw_philox`.
    """
    return torch.ops.flashcore.flash_attn_fwd(
        *inputs[:6], problem.left, problem.right, problem.scale, problem.softcap, problem.dropout, inputs.philox
    )


def draw_philox(device: torch.device) -> torch.Tensor:
    """int64 `[2]` on `device`, a seed and an offset from PyTorch's generator.

    A draw like any other: gradient checkpointing, which puts the generator's state back, draws it again, and so does a
    CUDA graph anew in each replay.
    """
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def _asked(query, key, value, key_range, mask, sinks, window_size_left, window_size_right, scale, softcap, dropout,
           philox) -> tuple[Inputs, Problem]:  # fmt: skip
    """What a call of the operators asks."""
    inputs = Inputs(query, key, value, key_range, mask, sinks, philox=philox)
    problem = problem_of_numbers(inputs, window_size_left, window_size_right, scale, softcap, dropout)
    if (philox is None) != (dropout == 0.0):
        raise ValueError(f"dropout={dropout} with philox={philox}: a seed and offset belong to dropout above 0")
    return inputs, problem


def _forward(query, key, value, key_range, mask, sinks, window_size_left, window_size_right, scale, softcap,
             dropout=0.0, philox=None):  # fmt: skip
    """(output `[B, H, Q, Dv]`, lse `[B, H, Q]`): `flashcore::attention` with what the backward needs."""
    inputs = Inputs(query, key, value, key_range, mask, sinks, philox=philox)
    signature = None
    if mask is None and not dropout:
        signature, known = find(inputs, (window_size_left, window_size_right, scale, softcap))
        if known is not None:
            count_path(known[0])
            output, lse = known[1](inputs)
            return output.transpose(1, 2), lse
    inputs, problem = _asked(*inputs[:6], window_size_left, window_size_right, scale, softcap, dropout, philox)
    if signature is not None and scale > 0.0 and all(t.stride(3) == 1 for t in inputs[:3]):
        problem = with_alignment(problem, inputs)
        plan = choose(problem, device_of(query.device))
        if plan.kernel != "torch":
            count_path(plan.kernel)
            output, lse = first_of_its_kind(signature, plan, problem, inputs, True)
            return output.transpose(1, 2), lse
    return run(problem, inputs, True)


def _forward_fake(query, key, value, *arguments, **more):
    batch_size, num_heads, num_queries, _ = query.shape
    output = query.new_empty(batch_size, num_queries, num_heads, value.shape[3]).transpose(1, 2)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return output, query.new_empty((batch_size, num_heads, num_queries), dtype=dtype)


def _backward(grad_output, grad_lse, query, key, value, key_range, mask, sinks, output, lse, window_size_left,
              window_size_right, scale, softcap, dropout, philox, sinks_grad, mask_grad):  # fmt: skip
    """(dq, dk, dv, dsinks, dmask); the last two are of no elements where they are not asked for."""
    inputs, problem = _asked(query, key, value, key_range, mask, sinks, window_size_left, window_size_right, scale,
                             softcap, dropout, philox)  # fmt: skip
    plan = choose_backward(problem, device_of(query.device))
    tensors, asked = (output, lse, grad_output, grad_lse), {"sinks_grad": sinks_grad, "mask_grad": mask_grad}
    count_path(plan.kernel)
    if plan.kernel == "torch":
        grads = _backward_by_torch(plan.reason, problem, inputs, *tensors, **asked)
    else:
        elsewhere = query.is_cuda and query.device.index != torch.cuda.current_device()
        with torch.cuda.device(query.device) if elsewhere else nullcontext():
            grads = serve_backward(plan, problem, inputs, *tensors, **asked)
    return (*grads[:3], *(query.new_empty(0) if grad is None else grad for grad in grads[3:]))


def _backward_by_torch(reason: str, problem: Problem, inputs: Inputs, *tensors: torch.Tensor | None, **asked):
    from .portable.naive_backward import naive_backward

    note_fallback(reason)
    if problem.dropout:
        raise NotImplementedError(
            f"dropout={problem.dropout} in a backward that PyTorch serves ({reason}) is not supported"
        )
    grads = naive_backward(problem, inputs, *tensors, **asked)
    laid_out = (empty_like_heads(t).copy_(grad) for t, grad in zip(inputs[:3], grads[:3]))
    return *laid_out, *grads[3:]


def _backward_fake(grad_output, grad_lse, query, key, value, key_range, mask, sinks, *arguments):
    sinks_grad, mask_grad = arguments[-2:]
    return (
        *(empty_like_heads(t) for t in (query, key, value)),
        sinks.new_empty(sinks.shape) if sinks_grad else query.new_empty(0),
        mask.new_empty(mask.shape) if mask_grad else query.new_empty(0),
    )


for _key in ("CPU", "CUDA"):
    _library.impl("flash_attn_fwd", _forward, _key)
    _library.impl("flash_attn_bwd", _backward, _key)
torch.library.register_fake("flashcore::flash_attn_fwd", _forward_fake, lib=_library)
torch.library.register_fake("flashcore::flash_attn_bwd", _backward_fake, lib=_library)


def _keep(ctx, inputs, output) -> None:
    tensors, (left, right, scale, softcap, dropout, philox) = inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors, *output, philox)
    ctx.numbers = left, right, scale, softcap, dropout
    # A gradient that nobody has stays None: delta then needs no pass over zeros.
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_output, grad_lse):
    *tensors, output, lse, philox = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    mask = tensors[_MASK]
    mask_grad = ctx.needs_input_grad[_MASK] and mask.dtype.is_floating_point
    sinks_grad = ctx.needs_input_grad[_SINKS]
    dq, dk, dv, dsinks, dmask = torch.ops.flashcore.flash_attn_bwd(
        grad_output, grad_lse, *tensors, output, lse, *ctx.numbers, philox, sinks_grad, mask_grad
    )
    grads = dq, dk, dv, None, dmask if mask_grad else None, dsinks if sinks_grad else None
    return *grads, *[None] * (_ARGUMENTS - len(grads))


def _refuse(ctx, *grads):
    raise NotImplementedError(
        "a gradient of a gradient through flashcore's attention was asked for (double backward, create_graph=True), "
        "and its backward has none; load the model with attn_implementation='eager' for second derivatives"
    )


torch.library.register_autograd("flashcore::flash_attn_fwd", _differentiate, setup_context=_keep, lib=_library)
torch.library.register_autograd("flashcore::flash_attn_bwd", _refuse, lib=_library)
