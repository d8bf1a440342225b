"""From a Plan to the launch module of its family, imported when first needed: they need Triton, and this does not."""

from importlib import import_module

import torch

from .plan import Plan
from .problem import Inputs, Problem

# Kernel -> the module whose `make_launch(problem, config, inputs, output, has_lse)` describes its launch.
LAUNCHES = {
    "flashcore_hopper_decode": ".hopper.decode.launch",
    "flashcore_hopper": ".hopper.prefill.launch",
    "flashcore_hopper_short": ".hopper.prefill.short_launch",
    "flashcore_decode": ".portable.decode",
    "flashcore_forward": ".portable.forward",
}
# Backward -> the module whose `run_backward` launches it.
BACKWARDS = {
    "flashcore_hopper_backward": ".hopper.backward.launch",
    "flashcore_backward": ".portable.backward",
}


def make_launch(plan: Plan, problem: Problem, inputs: Inputs, output: torch.Tensor, has_lse: bool):
    """The Launch (see runtime.launch) of a plan on tensors with these strides.

    Args:
        inputs: as `fitted` leaves them.
        output: `[B, H, Q, Dv]`.
        has_lse: whether log-sum-exps are written.
    """
    module = import_module(LAUNCHES[plan.kernel], __package__)
    return module.make_launch(problem, plan.config, inputs, output, has_lse)


def fitted(plan: Plan, problem: Problem, inputs: Inputs) -> Inputs:
    """`inputs` as the plan's kernel takes them: a bool mask as bytes, and a mask copied where the kernel wants that."""
    if inputs.mask is None:
        return inputs
    if inputs.mask.dtype == torch.bool:
        inputs = inputs._replace(mask=inputs.mask.view(torch.uint8))
    module = import_module(LAUNCHES[plan.kernel], __package__)
    return module.fitted(problem, inputs) if hasattr(module, "fitted") else inputs


def serve(plan: Plan, problem: Problem, inputs: Inputs, output: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Launch on the current stream of the current device: write output `[B, H, Q, Dv]` and, where given, lse."""
    from .runtime.launch import run

    inputs = fitted(plan, problem, inputs)
    run(make_launch(plan, problem, inputs, output, lse is not None), inputs, output, lse)


def serve_backward(plan: Plan, problem: Problem, inputs: Inputs, *tensors: torch.Tensor | None, **asked) -> tuple:
    """Launch a plan of `choose_backward` on the current stream of the current device: the gradients.

    Args: output, lse, grad_output, grad_lse, and `sinks_grad`, `mask_grad`, as `portable.backward.run_backward`.
    """
    module = import_module(BACKWARDS[plan.kernel], __package__)
    return module.run_backward(problem, plan.config, inputs, *tensors, **asked)


def empty_output(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Output `[B, H, Q, Dv]` with the heads inside the sequence in memory."""
    batch_size, num_heads, num_queries, _ = query.shape
    return query.new_empty(batch_size, num_queries, num_heads, value.shape[3]).transpose(1, 2)


def empty_outputs(query: torch.Tensor, value: torch.Tensor, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`empty_output`, and lse `[B, H, Q]` (or `[0]`)."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    shape = query.shape[:3] if return_lse else (0,)
    return empty_output(query, value), query.new_empty(shape, dtype=dtype)
