"""Which kernels serve a call on pages: single tokens and prompts, each by a family of their own where there is one."""

import functools
from typing import NamedTuple

import torch

from ..counting import count_path
from ..device import Device
from ..hopper.decode.choose import HopperDecodeConfig
from ..hopper.paged.choose import PromptConfig, choose_hopper_prompts, choose_hopper_single
from ..paged_problem import PagedProblem
from ..portable.paged.choose import PagedConfig, choose_paged


class PagedChoice(NamedTuple):
    """Which kernels serve a call.

    Attributes:
        hopper_single, hopper_prompts: how the Gluon kernels serve sequences of one query, and those of several beside
            padding; None where they do not.
        single, prompts: whether the portable kernel serves these.
        config: of the portable kernel.
    """

    hopper_single: HopperDecodeConfig | None
    hopper_prompts: PromptConfig | None
    single: bool
    prompts: bool
    config: PagedConfig


@functools.lru_cache(1024)  # it takes longer than a launch, and a server asks the same in every layer
def choose_pages(problem: PagedProblem, device: Device, aligned: bool) -> PagedChoice:
    """The PagedChoice of a call.

    Whether the Gluon kernel takes single tokens does not depend on what else is in a batch: their bits must not.

    Args:
        aligned: addresses and strides of query, pages and new keys are multiples of 16 bytes.
    """
    single = choose_hopper_single(problem, device, aligned)
    prompts = choose_hopper_prompts(problem, device, aligned) if problem.several else None
    hopper_single = None if isinstance(single, str) else single
    hopper_prompts = None if isinstance(prompts, str) else prompts
    return PagedChoice(
        hopper_single=hopper_single,
        hopper_prompts=hopper_prompts,
        single=hopper_single is None,
        prompts=problem.several and hopper_prompts is None,
        config=choose_paged(problem, device),
    )


def _aligned(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can fetch these: addresses and strides are multiples of 16 bytes."""
    for tensor in tensors:
        elements = 16 // tensor.element_size()
        strides = zip(tensor.shape[:-1], tensor.stride()[:-1])
        if tensor.data_ptr() % 16 or any(stride % elements for size, stride in strides if size > 1):
            return False
    return True


def serve_pages(
    problem: PagedProblem,
    device: Device,
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    new_key: torch.Tensor | None,
    new_value: torch.Tensor | None,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    key_lengths: torch.Tensor,
    sinks: torch.Tensor | None,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
) -> None:
    """Launch on the current stream of query's device: writes output `[T, H, Dv]` and, where given, lse `[H, T]`.

    One launch of the portable kernel serves both kinds of sequences; where Gluon kernels do, each kind has its own.
    Nothing is launched on meta tensors, and no call is counted.
    """
    states = (query, key_pages, value_pages, *(() if new_key is None else (new_key, new_value)))
    choice = choose_pages(problem, device, _aligned(*states))
    pool_and_output = (query, key_pages, value_pages, output, lse)
    where = (block_table, cu_seqlens_q, key_lengths, sinks)
    if not query.is_meta:
        if choice.hopper_single is not None or choice.hopper_prompts is not None:
            count_path("flashcore_hopper_paged")
        if choice.single or choice.prompts:
            count_path("flashcore_paged")
    if choice.hopper_single is not None:
        from ..hopper.paged.decode_launch import run_single  # needs Triton

        run_single(
            problem, choice.hopper_single, *pool_and_output, new_key, new_value, *where, key_scale, value_scale,
            padding=not problem.several,
        )  # fmt: skip
    if choice.hopper_prompts is not None:
        from ..hopper.paged.launch import run_prompts  # needs Triton

        run_prompts(problem, choice.hopper_prompts, *pool_and_output, *where)
    if choice.single or choice.prompts:
        from ..portable.paged.launch import run_paged  # needs Triton

        run_paged(
            problem, choice.config, device, *pool_and_output, new_key, new_value, *where, key_scale, value_scale,
            single=choice.single, prompts=choice.prompts,
        )  # fmt: skip
