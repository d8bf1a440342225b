"""Parity: greedy decoding under "flashcore" beside the reference backends "eager" and "sdpa".

Every row of the table is one model, one way to generate (cache, batch) and one reference R. It passes or fails by this:

1. float32: the tokens that flashcore generates freely are R's tokens, all of them.
2. float16 and bfloat16: rounding decides between tokens that are nearly tied, in any backend. Once a token differs the
   texts are different texts, so R's tokens are forced upon flashcore and upon the other reference O, step by step along
   the same caches, and at each step of each sequence the logits of one prefix are compared. A step is *excusable* where
   R's two largest logits are no further apart than the largest difference between R's and O's logits at that step.
   Each disagreement of flashcore with R's token, forced or (at its first divergence) free, must be at an excusable
   step. Where more than 10 % of the steps are excusable the row says too little, and is void.
3. The calls of attention are counted by the path that served them. One call by PyTorch instead of a kernel fails the
   row, and so does a row without any call of a kernel: it would compare PyTorch with PyTorch.
4. No logit may be NaN.
5. Negative control: flashcore again, with the softmax scale multiplied by 1.5 in every layer and R's tokens forced upon
   it, must break rule 1 or 2. Where it does not, the row could not have noticed a defect, and is void.

A void row has failed.

In 16 bits rule 2 leaves something to chance: R's distance from O at a step is one draw of rounding, flashcore's is
another, now and then the larger one beside a tie. So each row also counts (`other_unexcused`) the steps at which O
would break rule 2 if it were the candidate and flashcore the other reference. That count decides nothing.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from flashcore_kernels import interpreter_pace

from .runs import Cell, Run, caught_at, generate, load, unload, wrong_scale

REFERENCES = ("eager", "sdpa")
MOST_EXCUSABLE = 0.10
KERNEL_PREFIX = "flashcore_"


class Comparison(NamedTuple):
    """What rules 1, 2 and 4 say of one candidate run.

    Attributes:
        failures: one sentence for each rule that is broken; empty where all hold.
        equal: tokens of the free run that are R's.
        first: (sequence, step) of the free run's first divergence, both from 0, or None.
        gap: R's top-2 logit gap there, or None.
        largest_difference: largest logit difference over all steps whose prefix is the same.
        excusable: bool `[B, T]`.
    """

    failures: list[str]
    equal: int
    first: tuple[int, int] | None
    gap: float | None
    largest_difference: float
    excusable: torch.Tensor


@dataclass
class Row:
    """One line of the table; every field is plain data, for the JSON."""

    model: str
    cell: str
    reference: str
    tokens: int
    tokens_equal: int
    first_divergence: tuple[int, int] | None
    gap_there: float | None
    largest_difference: float
    excusable_share: float
    milliseconds: float
    reference_milliseconds: float
    paths: dict[str, int]
    control_caught_at: int | None
    other_unexcused: int | None
    failures: list[str]

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass
class Settings:
    """What to load and how; plain data, so that it can go to another process.

    Attributes:
        name, path: what the table calls the model, and where from_pretrained finds it.
        dtype: of weights and activations.
        device: "cpu" or a device_map.
        references: any of REFERENCES.
        cells: the ways to generate.
        interpreted: whether the kernels run in Triton's interpreter.
    """

    name: str
    path: str
    dtype: torch.dtype
    device: str
    references: tuple[str, ...]
    cells: list[Cell]
    interpreted: bool = False

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float32

    def total_steps(self) -> int:
        """How many tokens `compare_model` generates in all, for progress bars; the negative controls come on top."""
        tokens = sum(cell.max_new_tokens for cell in self.cells)
        runs_each = 1 if self.exact else 3  # R free; else also O and flashcore forced
        return tokens * (1 + runs_each * len(self.references))


def top2_gap(logits: torch.Tensor) -> torch.Tensor:
    """Distance between the two largest logits: `[..., V]` -> float32 `[...]`."""
    top = logits.float().topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Largest absolute difference over the vocabulary: two `[..., V]` -> float32 `[...]`."""
    # Equal infinities (a vocabulary padded with -inf) differ by nothing, not by NaN.
    difference = (a.float() - b.float()).abs()
    return difference.masked_fill(a == b, 0.0).amax(-1)


def compare(reference: Run, free: Run, forced: Run | None = None, noise: torch.Tensor | None = None) -> Comparison:
    """Hold a candidate's runs against the reference's, by rules 1, 2 and 4 of this module.

    Args:
        reference: R's free run.
        free: the candidate's free run.
        forced: the candidate's run with R's tokens forced upon it; None in float32.
        noise: float32 `[B, T]`: largest logit difference between R and O at each step; None in float32.
    """
    gap = top2_gap(reference.logits)  # [B, T]
    excusable = torch.zeros_like(gap, dtype=torch.bool) if noise is None else gap <= noise
    failures = []

    batch_size, steps = reference.tokens.shape
    same = free.tokens == reference.tokens  # [B, T]
    until = same.long().cumprod(-1).sum(-1)  # [B]: the step at which each sequence diverges, T for never
    diverged = [(b, t) for b, t in enumerate(until.tolist()) if t < steps]
    first = min(diverged, key=lambda place: place[1], default=None)
    unexcused = [(b, t) for b, t in diverged if not excusable[b, t]]
    if unexcused:
        b, t = unexcused[0]
        failures.append(
            f"{len(unexcused)} of {batch_size} sequences diverge where nothing excuses it, the first at token {t} of "
            f"sequence {b}, with a top-2 gap of {gap[b, t]:.3g}"
        )

    if forced is None:
        comparable = torch.arange(steps) <= until[:, None]  # the step that diverges still has the same prefix
        difference = largest_difference(free.logits, reference.logits)[comparable].max().item()
    else:
        difference = largest_difference(forced.logits, reference.logits).max().item()
        wrong = int(((forced.tokens != reference.tokens) & ~excusable).sum())
        if wrong:
            failures.append(f"{wrong} of {gap.numel()} steps disagree under forced tokens where nothing excuses it")
    if excusable.float().mean() > MOST_EXCUSABLE:
        failures.append(f"void: {excusable.float().mean():.1%} of the steps are excusable, more than 10 %")
    if any(run.logits.isnan().any() for run in (free, forced) if run is not None):
        failures.append("there is NaN in the logits")
    return Comparison(
        failures, int(same.sum()), first, None if first is None else gap[first].item(), difference, excusable
    )


def unexcused(reference: Run, forced: Run, other: torch.Tensor) -> int:
    """Steps at which the other reference breaks rule 2, with flashcore in its place.

    Args:
        reference: R's free run.
        forced: flashcore's run with R's tokens forced upon it.
        other: int64 `[B, T]`: what O chooses at each step after R's tokens.
    """
    excusable = top2_gap(reference.logits) <= largest_difference(forced.logits, reference.logits)
    return int(((other != reference.tokens) & ~excusable).sum())


def check_paths(paths: Counter[str]) -> list[str]:
    """Rule 3: what is wrong with who served the calls; empty where kernels served them all."""
    failures = []
    others = {name: count for name, count in paths.items() if not name.startswith(KERNEL_PREFIX)}
    if others:
        failures.append(
            f"{sum(others.values())} attention calls were not served by a kernel "
            f"({', '.join(f'{name}: {count}' for name, count in others.items())})"
        )
    if len(others) == len(paths):
        failures.append("no kernel was called")
    return failures


def compare_model(settings: Settings, on_steps: Callable[[str, int], None] = lambda what, steps: None) -> list[Row]:
    """All rows of one model. One copy of the model is in memory at a time.

    Args:
        on_steps: called with what is going on and how many tokens have come since the last call.
    """
    warm_up = settings.device != "cpu"

    def run(model, backend: str, cell: Cell, forced: torch.Tensor | None = None) -> Run:
        what = f"{settings.name}: {backend}{'' if forced is None else ' (forced)'}, {cell.name}"
        return generate(model, cell, forced, warm_up and forced is None, lambda step: on_steps(what, 1))

    free: dict[tuple, Run] = {}
    noise: dict[tuple, torch.Tensor] = {}
    others: dict[tuple, torch.Tensor] = {}  # what O chooses after R's tokens
    cells = list(enumerate(settings.cells))
    for name in settings.references:
        model = load(settings.path, name, settings.dtype, settings.device)
        for i, cell in cells:
            free[name, i] = run(model, name, cell)
        del model
        unload()
    if not settings.exact:
        for name in settings.references:
            other = REFERENCES[1 - REFERENCES.index(name)]
            model = load(settings.path, other, settings.dtype, settings.device)
            for i, cell in cells:
                answer = run(model, other, cell, free[name, i].tokens)
                noise[name, i] = largest_difference(answer.logits, free[name, i].logits)
                others[name, i] = answer.tokens
            del model
            unload()

    rows = []
    model = load(settings.path, "flashcore", settings.dtype, settings.device)
    with interpreter_pace() if settings.interpreted else nullcontext():
        for i, cell in cells:
            ours = run(model, "flashcore", cell)
            controls: list[tuple[torch.Tensor, torch.Tensor, int | None]] = []
            for name in settings.references:
                reference = free[name, i]
                forced = None if settings.exact else run(model, "flashcore", cell, reference.tokens)
                found = compare(reference, ours, forced, noise.get((name, i)))
                # Where the references agree, so do the negative controls beside them.
                same = [
                    c for t, e, c in controls if torch.equal(t, reference.tokens) and torch.equal(e, found.excusable)
                ]
                if same:
                    caught = same[0]
                else:
                    on_steps(f"{settings.name}: negative control, {cell.name}", 0)
                    with wrong_scale(model):
                        caught = caught_at(model, cell, reference.tokens, found.excusable)
                    controls.append((reference.tokens, found.excusable, caught))
                swapped = None if forced is None else unexcused(reference, forced, others[name, i])
                rows.append(_row(settings, cell, name, reference, ours, found, caught, swapped))
    del model
    unload()
    return rows


def _row(
    settings: Settings, cell: Cell, name: str, reference: Run, ours: Run, found: Comparison, caught: int | None,
    other_unexcused: int | None,
) -> Row:  # fmt: skip
    failures = found.failures + check_paths(ours.paths)
    if caught is None:
        failures.append("void: a softmax scale that is wrong by 1.5 passes too")
    return Row(
        model=settings.name,
        cell=cell.name,
        reference=name,
        tokens=reference.tokens.numel(),
        tokens_equal=found.equal,
        first_divergence=found.first,
        gap_there=found.gap,
        largest_difference=found.largest_difference,
        excusable_share=found.excusable.float().mean().item(),
        milliseconds=ours.milliseconds,
        reference_milliseconds=reference.milliseconds,
        paths=dict(ours.paths),
        control_caught_at=caught,
        other_unexcused=other_unexcused,
        failures=failures,
    )
