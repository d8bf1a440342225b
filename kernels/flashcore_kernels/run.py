"""A call that is checked, served on the device that it is on, without derivatives: by a kernel, or by PyTorch."""

import functools
from contextlib import nullcontext

import torch

from .choose import choose, fallback_reason
from .counting import count_path
from .device import device_of
from .dispatch import empty_output, empty_outputs, fitted, make_launch, serve
from .fallback import note_fallback, torch_attention
from .plan import Plan
from .precompile import prompt_attends
from .problem import Inputs, Problem, with_alignment
from .runtime.prepared import make_call, remember


def run(problem: Problem, inputs: Inputs, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(output `[B, H, Q, Dv]`, lse `[B, H, Q]`, or `[0]` where nobody asks), for tensors of any layout."""
    device = device_of(inputs.query.device)
    inputs = inputs._replace(
        **{name: t if t.stride(3) == 1 else t.contiguous() for name, t in zip(Inputs._fields[:3], inputs)}
    )
    if problem.scale <= 0.0 and fallback_reason(problem, device) is None:
        # The kernels take the largest product for the largest score.
        inputs = inputs._replace(query=inputs.query * (-1.0 if problem.scale < 0.0 else 0.0))
        problem = problem._replace(scale=-problem.scale or 1.0)
    problem = with_alignment(problem, inputs)
    plan = choose(problem, device)
    count_path(plan.kernel)
    output, lse = empty_outputs(inputs.query, inputs.value, return_lse)
    if plan.kernel == "torch":
        note_fallback(plan.reason)
        answer, answer_lse = torch_attention(problem, inputs, return_lse)
        output.copy_(answer)
        return output, (answer_lse if return_lse else lse)
    if device.kind == "interpreter" and inputs.query.dtype == torch.bfloat16:
        # NumPy has no bfloat16, and the interpreter would multiply its bit patterns.
        names = ("query",) if problem.fp8 else ("query", "key", "value")
        inputs = inputs._replace(**{name: getattr(inputs, name).float() for name in names})
    with torch.cuda.device(inputs.query.device) if inputs.query.is_cuda else nullcontext():
        serve(plan, problem, inputs, output, lse if return_lse else None)
    return output, lse


def first_of_its_kind(
    signature: tuple, plan: Plan, problem: Problem, inputs: Inputs, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Serve a call on the current GPU, and remember how for those like it.

    Its kernel may be there already: a step of a generation is like the one before but for its length.
    """
    given, inputs = inputs, fitted(plan, problem, inputs)
    # Where the mask was copied, each call has to copy its own.
    copied = inputs.mask is not None and inputs.mask.data_ptr() != given.mask.data_ptr()
    fit = functools.partial(fitted, plan, problem) if copied else None
    launch = make_launch(plan, problem, inputs, empty_output(inputs.query, inputs.value), return_lse)
    call = make_call(launch, problem, inputs, return_lse, fit)
    prompt_attends(problem, inputs.sinks, inputs.query.device, call is not None)
    if call is not None:
        remember(signature, plan.kernel, call)
        return call(given)
    output, lse = empty_outputs(inputs.query, inputs.value, return_lse)
    serve(plan, problem, inputs, output, lse if return_lse else None)
    remember(signature, plan.kernel, make_call(launch, problem, inputs, return_lse, fit))
    return output.transpose(1, 2), lse
