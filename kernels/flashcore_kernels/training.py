"""Training in plain eager code: forward and backward by launches alone.

Through torch's dispatcher an operator and its backward cost Python most of a millisecond, more than the attention of a
layer of BERT takes the GPU. Wherever somebody listens (torch.compile, modes such as selective checkpointing's, function
transforms) the operators of `autograd` are called instead; the kernels, and so the bits, are the same.
"""

from collections.abc import Callable

import torch

from .autograd import draw_philox
from .choose import backward_fallback_reason, choose, choose_backward
from .counting import count_path
from .device import device_of, goes_past_dispatcher, nobody_listens
from .dispatch import serve_backward
from .problem import (
    Inputs,
    Window,
    any_requires_grad,
    check_problem,
    problem_of_numbers,
    with_alignment,
    with_mask_in_rows,
)
from .run import first_of_its_kind
from .runtime.prepared import MOST, find_by, signature_of
from .runtime.recording import recording

# Signatures of calls that were served here -> (left, right, scale, softcap, dropout).
_numbers: dict[tuple, tuple] = {}
# Signatures of backwards -> the kernel's name, and the function that makes its launches again.
_backwards: dict[tuple, tuple[str, Callable]] = {}


def attend_in_training(
    inputs: Inputs,
    is_causal: bool,
    window: Window,
    scale: float | None,
    softcap: float | None,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`op.attend` of a call that wants gradients: (output `[B, Q, H, Dv]`, lse `[B, H, Q]`).

    None where it has to go through the dispatcher, or to PyTorch, or wants no gradient.
    """
    query = inputs.query
    try:
        if not (torch.is_grad_enabled() and any_requires_grad(*inputs) and goes_past_dispatcher(query)):
            return None
        if inputs.mask is not None:
            if not nobody_listens(inputs.mask):
                return None
            inputs = with_mask_in_rows(inputs)
        signature = signature_of(inputs, (is_causal, window, scale, softcap, True, dropout))
        numbers, problem = _numbers.get(signature), None
    except (AttributeError, TypeError, RuntimeError, IndexError):  # a wrong argument, which the checks will name
        return None
    if numbers is None:
        problem = with_alignment(check_problem(inputs, is_causal, window, scale, softcap, dropout), inputs)
        served = backward_fallback_reason(problem, device_of(query.device)) is None
        if not served or problem.scale <= 0.0 or any(t.stride(3) != 1 for t in inputs[:3]):
            return None
        numbers = problem.left, problem.right, problem.scale, problem.softcap, problem.dropout
        if len(_numbers) >= MOST:
            _numbers.clear()
        _numbers[signature] = numbers
    philox = draw_philox(query.device) if dropout else None
    return _Attention.apply(*inputs[:6], philox, signature, numbers, problem)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, key_range, mask, sinks, philox, signature, numbers, problem):
        inputs = Inputs(query, key, value, key_range, mask, sinks, philox=philox)
        known = find_by(signature)
        if known is None:
            if problem is None:  # another call of its kind was checked, and its kernel forgotten
                problem = with_alignment(problem_of_numbers(inputs, *numbers), inputs)
            plan = choose(problem, device_of(query.device))
            count_path(plan.kernel)
            output, lse = first_of_its_kind(signature, plan, problem, inputs, True)
        else:
            count_path(known[0])
            output, lse = known[1](inputs)
        ctx.save_for_backward(query, key, value, key_range, mask, sinks, output, lse, philox)
        ctx.signature, ctx.numbers = signature, numbers
        # A gradient that nobody has stays None: delta then needs no pass over zeros.
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        query, key, value, key_range, mask, sinks, output, lse, philox = ctx.saved_tensors
        if grad_output is None:
            grad_output = torch.zeros_like(output)
        mask_grad, sinks_grad = ctx.needs_input_grad[4:6]
        # Whoever kept tensors elsewhere meanwhile (on the CPU, say) may bring them back in another layout.
        given = (
            query, key, value, key_range, mask, sinks, output.transpose(1, 2), lse, grad_output.transpose(1, 2),
            grad_lse, philox,
        )  # fmt: skip
        if torch.is_grad_enabled() or not goes_past_dispatcher(grad_output):
            dq, dk, dv, dsinks, dmask = torch.ops.flashcore.flash_attn_bwd(
                given[8], grad_lse, *given[:6], given[6], lse, *ctx.numbers, philox, sinks_grad, mask_grad
            )
        else:
            dq, dk, dv, dsinks, dmask = _backward(ctx.signature, ctx.numbers, given, sinks_grad, mask_grad)
        grads = dq, dk, dv, None, dmask if mask_grad else None, dsinks if sinks_grad else None
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


def _backward(signature: tuple, numbers: tuple, given: tuple, sinks_grad: bool, mask_grad: bool) -> tuple:
    """(dq, dk, dv, dsinks, dmask) of what a call was given, by launches that were made before where that can be."""
    layout = tuple(None if t is None else (t.stride(), t.data_ptr() % 16, t.dtype, t.device) for t in given)
    kind = signature, layout, mask_grad
    known = None if sinks_grad else _backwards.get(kind)
    query, key, value, key_range, mask, sinks, output, lse, grad_output, grad_lse, philox = given
    if known is not None:
        count_path(known[0])
        made = known[1](given)
        # The gradient of a mask is added up in fp32.
        return *made[:3], None, made[3].to(mask.dtype) if mask_grad else None
    inputs = Inputs(query, key, value, key_range, mask, sinks, philox=philox)
    problem = problem_of_numbers(inputs, *numbers)
    plan = choose_backward(problem, device_of(query.device))
    count_path(plan.kernel)
    with recording(given) as watched:
        grads = serve_backward(
            plan, problem, inputs, output, lse, grad_output, grad_lse, sinks_grad=sinks_grad, mask_grad=mask_grad
        )
    if watched.complete and not sinks_grad:
        if len(_backwards) >= MOST:
            _backwards.clear()
        _backwards[kind] = plan.kernel, watched.repeat()
    return grads
