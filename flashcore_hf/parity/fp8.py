"""What an fp8 cache costs in accuracy: flashcore beside itself, keys and values in e4m3 and in the model's dtype.

Rounding to three bits of mantissa changes tokens; how many is for the user to judge, so the rows report, and fail only
where a call was not served by a kernel, or a logit is NaN.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from flashcore_kernels import interpreter_pace

from ..cache.switch import use_flashcore_cache
from .rules import Settings, check_paths, largest_difference
from .runs import generate, load


@dataclass
class Fp8Row:
    """One way to generate, with an fp8 cache, beside one in the model's dtype.

    Attributes:
        tokens: of all sequences; tokens_equal: of them, those of the free runs that are the same.
        steps_equal: share of the steps at which both choose the same token after the same text (the other's tokens).
        relative_error: root-mean-square of the logits' differences there, over the logits' standard deviation.
        largest_difference: of a logit there.
    """

    model: str
    cell: str
    tokens: int
    tokens_equal: int
    steps_equal: float
    relative_error: float
    largest_difference: float
    failures: list[str]

    @property
    def passed(self) -> bool:
        return not self.failures


def compare_fp8(settings: Settings, on_steps: Callable[[str, int], None] = lambda what, steps: None) -> list[Fp8Row]:
    """A row for each cell of `settings` with a dynamic cache.

    Args:
        on_steps: called with what is going on and how many tokens have come since the last call.
    """
    model = load(settings.path, "flashcore", settings.dtype, settings.device)
    rows = []
    for cell in settings.cells:
        if cell.cache != "dynamic":
            continue

        def run(dtype, forced=None, cell=cell):
            use_flashcore_cache(model, dtype=dtype)
            what = f"{settings.name}: fp8 cache, {cell.name}"
            with interpreter_pace() if settings.interpreted else nullcontext():
                return generate(model, cell, forced, False, lambda step: on_steps(what, 1))

        exact, free = run(None), run(torch.float8_e4m3fn)
        forced = run(torch.float8_e4m3fn, exact.tokens)
        difference = (forced.logits.float() - exact.logits.float()).square().mean().sqrt()
        failures = check_paths(free.paths)
        if free.logits.isnan().any() or forced.logits.isnan().any():
            failures.append("there is NaN in the logits")
        rows.append(
            Fp8Row(
                settings.name,
                cell.name.replace("dynamic", "fp8"),
                exact.tokens.numel(),
                int((free.tokens == exact.tokens).sum()),
                (forced.tokens == exact.tokens).float().mean().item(),
                (difference / exact.logits.float().std()).item(),
                largest_difference(forced.logits, exact.logits).max().item(),
                failures,
            )
        )
    return rows
