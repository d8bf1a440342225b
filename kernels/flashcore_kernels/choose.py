"""choose: a Problem and a Device in, a Plan out. Pure: no GPU, no Triton, no state.

Each family of kernels says by itself whether a call is its own. A new family is one line here and one in `dispatch`.
"""

import torch

from .device import Device
from .hopper.decode.choose import choose_hopper_decode
from .hopper.prefill.choose import choose_hopper_prefill
from .plan import Plan
from .portable.choose import choose_decode, choose_forward
from .problem import Problem

# Asked in this order. Each answers with a Plan; with the reason why a call of its kind is not for it; or with None
# where calls of this kind, or on this device, are never its own. The last takes whatever no other has taken.
FAMILIES = (choose_hopper_decode, choose_hopper_prefill, choose_decode, choose_forward)

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 512
# Of the backward kernels, and beside keys in fp8.
MAX_OTHER_HEAD_DIM = 256


def fallback_reason(problem: Problem, device: Device) -> str | None:
    """Why no kernel can serve this call, or None where one can."""
    if problem.needs_grad:
        return "gradients are asked for, and the kernels have no backward yet"
    if device.kind == "torch":
        return device.reason
    if problem.dtype not in KERNEL_DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {problem.dtype}"
    if max(problem.head_dim, problem.value_dim) > MAX_HEAD_DIM:
        return f"the kernels take head_dim up to {MAX_HEAD_DIM}, not {max(problem.head_dim, problem.value_dim)}"
    if problem.fp8 and max(problem.head_dim, problem.value_dim) > MAX_OTHER_HEAD_DIM:
        return (
            f"beside keys in fp8 the kernels take head_dim up to {MAX_OTHER_HEAD_DIM}, not "
            f"{max(problem.head_dim, problem.value_dim)}"
        )
    if problem.fp8 and device.kind == "cuda" and device.arch < 89:
        return f"keys in fp8 need compute capability 8.9 or newer, this GPU has {device.arch // 10}.{device.arch % 10}"
    return None


def backward_fallback_reason(problem: Problem, device: Device) -> str | None:
    """Why no kernel can serve the backward of this call, or None where one can."""
    reason = fallback_reason(problem, device)
    if reason is None and max(problem.head_dim, problem.value_dim) > MAX_OTHER_HEAD_DIM:
        return (
            f"the backward kernels take head_dim up to {MAX_OTHER_HEAD_DIM}, not "
            f"{max(problem.head_dim, problem.value_dim)}"
        )
    return reason


def choose(problem: Problem, device: Device) -> Plan:
    """Choose the kernel and its configuration for one call.

    Nothing here depends on the batch size or on how long the sequences are, so that a sequence is computed the same way
    alone and in a batch; with one exception: calls of up to MAX_DECODE_QUERIES query tokens take a decode kernel.
    Which row of a table it is may depend on the number of queries and on whether there is a key range: rows between
    which these decide give the same bits.
    """
    reason = fallback_reason(problem, device)
    if reason is not None:
        return Plan("torch", reason)
    refusals = []
    for family in FAMILIES:
        answer = family(problem, device)
        if isinstance(answer, Plan):
            return answer._replace(reason="; ".join([answer.reason, *refusals])) if refusals else answer
        if answer is not None:
            refusals.append(f"not the Hopper kernel, because {answer}")
    raise LookupError(f"no family of kernels takes {problem} on {device}")
