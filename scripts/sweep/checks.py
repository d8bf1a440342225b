"""One class beside eager: built twice with the same weights, run in every way that it takes, compared."""

import copy
import math
from collections.abc import Iterator

import torch

import flashcore_hf  # noqa: F401
from flashcore_hf import compat

from . import TOLERANCE
from .classes import Entry, load_class
from .inputs import image_prompts, padding, parameters_of
from .overrides import OVERRIDES
from .running import (
    build,
    converted,
    is_refusal,
    largest_error,
    masked,
    rms_error,
    run,
    short,
    tensors,
    to_half,
)
from .subject import Verdict, subject
from .watch import Watch, control_error, forget, install_watch, paths

NEW_TOKENS = 32


class Refused(Exception):
    """flashcore said no; the message is its own."""


def sweep_class(entry: Entry, device: str, dtypes: list[str]) -> dict:
    """The row of one class: status, reason, checks and paths."""
    row = {"class": entry.name, "module": entry.module.removeprefix("transformers.models."), "model_type": None}
    row["supports_backend"] = entry.supports_backend
    watch = install_watch()
    forget(watch)
    try:
        model_class = load_class(entry)
        row["model_type"] = getattr(model_class.config_class, "model_type", "") or entry.module.split(".")[2]
        eager, model, kind, inputs, config = subject(model_class, row, watch)
    except Verdict as verdict:
        return row | {"status": verdict.status, "reason": verdict.reason}
    except Exception as error:  # noqa: BLE001 - whatever a class raises is why it cannot be built
        return row | {"status": "unbuildable", "reason": short(error)}
    eager, model, inputs = eager.to(device), model.to(device), converted(inputs, device)
    row["inputs"] = {name: list(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    try:
        checks, verdicts = {}, []
        for dtype in dtypes:
            comparison = Comparison(eager, model, watch, device)
            if dtype != "float32":
                comparison = HalfComparison(eager, model, watch, device, getattr(torch, dtype))
            checks[dtype], verdict = comparison.all(kind, inputs, config)
            verdicts.append((dtype, *verdict))
        row["checks"] = checks
    except Refused as error:
        return row | {"status": "refused", "reason": str(error)}
    row["paths"] = paths(watch)
    order = ("wrong", "unstable", "match")
    defect = OVERRIDES.get(entry.name, {}).get("reference_defect")
    if defect is not None and compat.VERSION < defect[0]:
        verdicts = [(dtype, "unstable" if verdict == "wrong" else verdict, f"{why}; {defect[1]}")
                    for dtype, verdict, why in verdicts]  # fmt: skip
    dtype, status, reason = min(verdicts, key=lambda verdict: order.index(verdict[1]))
    ran = next(iter(checks.values())).get("forward")
    if status == "match" and isinstance(ran, str):
        return row | {"status": "unbuildable", "reason": ran}
    if status == "match" and not watch.masks:
        reason = "no attention was called on these inputs"
    elif reason and len(dtypes) > 1:
        reason = f"{dtype}: {reason}"
    return row | {"status": status, "reason": reason}


class Comparison:
    """Two models in fp32: every check's error, and the verdict."""

    def __init__(self, eager, model, watch: Watch, device: str):
        self.eager, self.model, self.watch, self.device = eager, model, watch, device
        self.checks: dict[str, float | str | bool] = {}
        self.wrong: list[str] = []
        self.unstable: list[str] = []
        self.notes: list[str] = []  # what a matching row should still say

    def all(self, kind: str, inputs: dict, config) -> tuple[dict, tuple[str, str]]:
        """(checks by name, (status, reason))."""
        mask = inputs.get("attention_mask") if kind == "text" else None
        self.forward("forward", inputs, mask)
        self.control(inputs)
        if kind == "text":
            self.text(inputs, config)
        status = "wrong" if self.wrong else "unstable" if self.unstable else "match"
        return self.checks, (status, "; ".join(self.wrong or self.unstable or self.notes))

    def text(self, inputs: dict, config) -> None:
        """What only models that read tokens do."""
        takes = parameters_of(self.eager)
        if "attention_mask" in takes:
            for side in ("left", "right"):
                mask = padding(side).to(self.device)
                padded = {**inputs, "attention_mask": mask, "input_ids": inputs["input_ids"] * mask}
                self.forward(side, padded, mask)
        encoder_decoder = "decoder_input_ids" in takes
        if compat.CACHE_NAME in takes and not encoder_decoder:
            self.steps("chunked", inputs, takes, [5, 4, 4])
            self.steps("decode", inputs, takes, [9, 1, 1, 1, 1])
        if "position_ids" in takes and not encoder_decoder:
            positions = torch.cat([torch.arange(6), torch.arange(4), torch.arange(3)])[None].to(self.device)
            packed = {name: value[:1] if isinstance(value, torch.Tensor) else value
                      for name, value in inputs.items() if name != "attention_mask"}  # fmt: skip
            self.forward("packed", {**packed, "position_ids": positions}, None, use_cache=False)
        self.images(inputs, takes, config)
        if hasattr(self.model, "generate") and getattr(self.model, "can_generate", lambda: False)():
            self.tokens("dynamic", inputs)
            self.tokens("static", inputs, cache_implementation="static")

    def answer(self, model, call):
        """The outputs of `call(model)`; a refusal of flashcore's own ends the row."""
        try:
            return call(model)
        except Exception as error:
            if model is self.model and is_refusal(error):
                raise Refused(short(error)) from error
            raise

    def both(self, name: str, call) -> tuple | None:
        """call(eager), call(model); None where eager itself cannot, which is noted."""
        try:
            expected = self.answer(self.eager, call)
        except Exception as error:  # noqa: BLE001 - this way of running is not the model's
            self.checks[name] = f"not for eager: {short(error)[:120]}"
            return None
        try:
            return expected, self.answer(self.model, call)
        except Refused:
            raise
        except Exception as error:  # noqa: BLE001
            self.checks[name] = short(error)
            self.wrong.append(f"{name}: {short(error)}")
            return None

    def judge(self, name: str, call) -> None:
        """Compare `call` on both models and keep the error; above tolerance look whether eager itself is stable."""
        answers = self.both(name, call)
        if answers is None:
            return
        if not all(t.isfinite().all() for t in answers[0]) and name != "forward":
            self.checks[name] = "not for eager: its outputs are not finite"
            return
        error = largest_error(*answers)
        self.checks[name] = float(f"{error:.2e}")
        if error > TOLERANCE:
            own = self.own_error(call, answers[0])
            if error <= 4 * own:
                self.unstable.append(f"{name}: off by {error:.1e}, and eager by {own:.1e} when weights move by one ulp")
            elif (references := self.reference_error(call, *answers)) is not None:
                self.unstable.append(f"{name}: off by {error:.1e}; eager and sdpa differ by {references:.1e}, and "
                                     "flashcore is with sdpa")  # fmt: skip
            else:
                self.wrong.append(f"{name}: off by {error:.1e} (eager by {own:.1e} when weights move by one ulp)")

    def own_error(self, call, expected: list[torch.Tensor]) -> float:
        """How far eager's outputs move when each weight does by one unit in the last place."""
        return max(largest_error(expected, call(moved)) for moved in self.moved_models())

    @torch.no_grad()
    def moved_models(self) -> Iterator[torch.nn.Module]:
        """Eager with each weight moved by one unit in the last place, up or down at random, three times."""
        moved = copy.deepcopy(self.eager)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            for parameter, start in zip(moved.parameters(), self.eager.parameters()):
                signs = torch.randint(0, 2, parameter.shape, generator=generator).to(parameter) * 2 - 1
                parameter.copy_(start * (1 + signs * torch.finfo(parameter.dtype).eps))
            yield moved

    def sdpa_answer(self, call) -> list[torch.Tensor] | None:
        """The outputs of `call` under sdpa with the same weights, or None where the class has no sdpa."""
        try:
            sdpa = build(type(self.eager), self.eager.config, "sdpa").to(self.device)
            for parameter, like in zip(sdpa.parameters(), self.eager.parameters()):
                parameter.data = parameter.data.to(like.dtype)
            sdpa.load_state_dict(self.eager.state_dict())
            return call(sdpa)
        except Exception:  # noqa: BLE001 - without sdpa there is no second reference
            return None

    def reference_error(self, call, expected: list[torch.Tensor], got: list[torch.Tensor]) -> float | None:
        """How far sdpa is from eager, where flashcore equals sdpa: the reference is then no single one. Else None."""
        answer = self.sdpa_answer(call)
        if answer is None or largest_error(answer, got) > TOLERANCE:
            return None
        return largest_error(expected, answer)

    def forward(self, name: str, inputs: dict, mask: torch.Tensor | None, **more) -> None:
        self.judge(name, lambda model: masked(tensors(run(model, inputs, **more)), mask))

    def control(self, inputs: dict) -> None:
        """A scale that is wrong by half must show, or the comparison proves nothing."""
        error = control_error(self.model, inputs, self.watch)
        if math.isfinite(error):
            self.checks["control"] = float(f"{error:.1e}")

    def steps(self, name: str, inputs: dict, takes: dict, lengths: list[int]) -> None:
        """Prefill in pieces, or decode given tokens one at a time, on the cache that the model makes itself."""
        rest = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        mask = padding("left").to(self.device)

        def call(model):
            outputs, cache, start = [], None, 0
            for length in lengths:
                step = {**rest, "input_ids": inputs["input_ids"][:, start : start + length]}
                if "attention_mask" in takes:
                    step["attention_mask"] = mask[:, : start + length]
                if "position_ids" in takes:
                    positions = (mask.cumsum(1) - 1).clamp(min=0)
                    step["position_ids"] = positions[:, start : start + length]
                output = run(model, step, use_cache=True, **{compat.CACHE_NAME: cache})
                cache = getattr(output, compat.CACHE_NAME)
                if cache is None:
                    raise ValueError("the model returns no cache")
                outputs += masked(tensors(output), mask[:, start : start + length])
                start += length
            return outputs

        self.judge(name, call)

    def images(self, inputs: dict, takes: dict, config) -> None:
        """An image among the tokens, where the model says how many tokens it makes of it."""
        for ask in image_prompts(self.eager, config):
            ask = converted(ask, self.device)
            try:
                run(self.eager, ask)
            except Exception as error:  # noqa: BLE001 - the next shape may do
                self.checks["image"] = f"not for eager: {short(error)[:120]}"
                continue
            self.forward("image", ask, ask["attention_mask"])
            return

    def tokens(self, name: str, inputs: dict, **options) -> None:
        """32 greedy tokens from a left-padded batch."""
        takes = parameters_of(self.eager)
        rest = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
        rest = {key: value for key, value in rest.items() if not key.startswith("decoder_")}
        mask = padding("left").to(self.device) if "attention_mask" in takes else None

        def call(model):
            torch.manual_seed(0)
            return model.generate(
                inputs["input_ids"] * (1 if mask is None else mask), attention_mask=mask, max_new_tokens=NEW_TOKENS,
                do_sample=False, output_logits=True, return_dict_in_generate=True, disable_compile=True, **rest,
                **options,
            )  # fmt: skip

        answers = self.both(name, call)
        if answers is None:
            return
        expected, got = answers
        if not (hasattr(expected, "logits") and isinstance(getattr(expected, "sequences", None), torch.Tensor)):
            self.checks[name] = "not for eager: generate() returns something else than tokens"
            return
        same = expected.sequences.shape == got.sequences.shape and torch.equal(expected.sequences, got.sequences)
        self.checks[name] = same
        if same:
            return
        sdpa = self.sdpa_answer(call)
        if sdpa is not None and torch.equal(sdpa.sequences, got.sequences):
            self.unstable.append(f"{name}: eager's tokens and sdpa's differ, and flashcore's are sdpa's")
        else:
            self.explain_tokens(name, expected, got)

    def explain_tokens(self, name: str, expected, got) -> None:
        """Tokens differ: a tie of eager's own at the first of them, or wrong."""
        a, b = expected.sequences[:, -len(expected.logits) :], got.sequences[:, -len(got.logits) :]
        length = min(a.shape[1], b.shape[1])
        differ = (a[:, :length] != b[:, :length]).any(0).nonzero()
        step = int(differ[0]) if len(differ) else length - 1
        rows = (a[:, step] != b[:, step]).nonzero().flatten()
        logits = expected.logits[step][rows].float()
        gap = 1.0
        if len(rows):
            two = logits.topk(2).values
            gap = ((two[:, 0] - two[:, 1]) / logits.abs().amax(-1)).min().item()
        text = f"{name}: tokens differ from step {step} on, where eager's two best are {gap:.1e} apart"
        (self.unstable if gap <= 2 * TOLERANCE else self.wrong).append(text)


class HalfComparison(Comparison):
    """bf16 (or fp16) beside eager in the same dtype, both measured against eager in fp32 with the same weights."""

    def __init__(self, eager, model, watch: Watch, device: str, dtype: torch.dtype):
        reference = copy.deepcopy(eager)
        for parameter in reference.parameters():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
        super().__init__(to_half(copy.deepcopy(reference), dtype), to_half(model, dtype), watch, device)
        model.load_state_dict(self.eager.state_dict())
        self.reference, self.dtype = reference, dtype

    def judge(self, name: str, call) -> None:
        try:
            exact = call(self.reference)
        except Exception as error:  # noqa: BLE001
            self.checks[name] = f"not for eager: {short(error)[:120]}"
            return
        answers = self.both(name, call)
        if answers is None:
            return
        if [t.shape for t in exact] != [t.shape for t in answers[1]] or not all(t.isfinite().all() for t in exact):
            self.checks[name] = "not for eager: its outputs are not finite or differ in shape"
            return
        own, ours = (max((rms_error(a, b) for a, b in zip(exact, answer)), default=0.0) for answer in answers)
        self.checks[name] = float(f"{ours:.2e}")
        # One rounding of the output is below what any comparison in this dtype can tell.
        if ours <= 1.5 * own + torch.finfo(self.dtype).eps:
            return
        # Experts and keys are chosen by comparing numbers that are rounded: single tokens then go elsewhere, in eager
        # as well once its weights move by one unit in the last place.
        moved = self.moved_error(call, exact)
        text = f"{name}: RMS error {ours:.1e} against fp32, eager's {own:.1e}"
        if ours <= 1.5 * moved + torch.finfo(self.dtype).eps:
            self.notes.append(f"{text}, and {moved:.1e} when weights move by one ulp")
        elif (sdpa := self.sdpa_error(call, exact)) is not None and ours <= 1.5 * sdpa + torch.finfo(self.dtype).eps:
            self.unstable.append(f"{text}, and sdpa's {sdpa:.1e}")
        else:
            self.wrong.append(f"{text} ({moved:.1e} when weights move by one ulp)")

    def moved_error(self, call, exact: list[torch.Tensor]) -> float:
        """The largest RMS error of eager in this dtype over three ways of moving its weights by one ulp."""
        return max(
            max((rms_error(a, b) for a, b in zip(exact, call(moved))), default=0.0) for moved in self.moved_models()
        )

    def sdpa_error(self, call, exact: list[torch.Tensor]) -> float | None:
        """The RMS error of sdpa in this dtype, or None where the class has no sdpa."""
        answer = self.sdpa_answer(call)
        return None if answer is None else max((rms_error(a, b) for a, b in zip(exact, answer)), default=0.0)

    def tokens(self, name: str, inputs: dict, **options) -> None:
        """Not compared: in 16 bits two right backends choose differently between tokens that are nearly tied."""
