"""choose: a Problem and a Device in, a Plan out. Pure: no GPU, no Triton, no state.

Each family of kernels says by itself whether a call is its own. A new family is one line here and one in `dispatch`.
"""

import torch

from .device import Device
from .hopper.backward.choose import choose_hopper_backward
from .hopper.decode.choose import choose_hopper_decode
from .hopper.prefill.choose import choose_hopper_prefill
from .plan import Plan
from .portable.backward_table import MAX_BACKWARD_HEAD_DIM, choose_portable_backward
from .portable.choose import choose_decode, choose_forward
from .problem import Problem

# Asked in this order. Each answers with a Plan; with the reason why a call of its kind is not for it; or with None
# where calls of this kind, or on this device, are never its own. The last takes whatever no other has taken.
FAMILIES = (choose_hopper_decode, choose_hopper_prefill, choose_decode, choose_forward)
BACKWARD_FAMILIES = (choose_hopper_backward, choose_portable_backward)

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 512
# Beside keys in fp8.
MAX_FP8_HEAD_DIM = 256


def fallback_reason(problem: Problem, device: Device) -> str | None:
    """Why no kernel can serve this call, or None where one can."""
    largest = max(problem.head_dim, problem.value_dim)
    if device.kind == "torch":
        return device.reason
    if problem.dtype not in KERNEL_DTYPES:
        return f"the kernels take float16, bfloat16 and float32, not {problem.dtype}"
    if largest > MAX_HEAD_DIM:
        return f"the kernels take head_dim up to {MAX_HEAD_DIM}, not {largest}"
    if problem.fp8 and largest > MAX_FP8_HEAD_DIM:
        return f"beside keys in fp8 the kernels take head_dim up to {MAX_FP8_HEAD_DIM}, not {largest}"
    if problem.fp8 and device.kind == "cuda" and device.arch < 89:
        return f"keys in fp8 need compute capability 8.9 or newer, this GPU has {device.arch // 10}.{device.arch % 10}"
    return None


def choose(problem: Problem, device: Device) -> Plan:
    """Choose the kernel and its configuration for one call.

    Nothing here depends on the batch size or on how long the sequences are, so that a sequence is computed the same way
    alone and in a batch; with one exception: calls of up to MAX_DECODE_QUERIES query tokens take a decode kernel.
    Which row of a table it is, or which of the prefill's kernels on Hopper, may depend on the numbers of queries and of
    key slots and on whether there is a key range: rows and kernels between which these decide give the same bits.
    """
    reason = fallback_reason(problem, device)
    if reason is not None:
        return Plan("torch", reason)
    return _ask(FAMILIES, problem, device)


def backward_fallback_reason(problem: Problem, device: Device) -> str | None:
    """Why no kernel can make the gradients of this call, or None where one can."""
    reason = fallback_reason(problem, device)
    if reason is not None:
        return reason
    if problem.fp8:
        return "gradients are asked for over keys and values in fp8, and the kernels have no backward for those"
    largest = max(problem.head_dim, problem.value_dim)
    if largest > MAX_BACKWARD_HEAD_DIM:
        return (
            f"gradients are asked for, and the kernels make those up to head_dim {MAX_BACKWARD_HEAD_DIM}, not {largest}"
        )
    return None


def choose_backward(problem: Problem, device: Device) -> Plan:
    """Choose the kernels of one call's backward; as in `choose`, no batch size and no length decides."""
    reason = backward_fallback_reason(problem, device)
    return Plan("torch", reason) if reason is not None else _ask(BACKWARD_FAMILIES, problem, device)


def _ask(families: tuple, problem: Problem, device: Device) -> Plan:
    refusals = []
    for family in families:
        answer = family(problem, device)
        if isinstance(answer, Plan):
            return answer._replace(reason="; ".join([answer.reason, *refusals])) if refusals else answer
        if answer is not None:
            refusals.append(f"not the Hopper kernel, because {answer}")
    raise LookupError(f"no family of kernels takes {problem} on {device}")
