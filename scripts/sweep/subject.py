"""The two models that are compared, and the inputs: of a class by itself, or inside a model that has it as a part."""

from itertools import islice

import torch

from . import CONTROL
from .configs import parts_of, tiny_config
from .overrides import OVERRIDES
from .parts import inside
from .running import accepted_inputs, build, is_refusal, run, short, switch_on
from .watch import Watch, control_error, forget

RECIPES = 4  # inputs that are tried for one on which the control shows


class Verdict(Exception):
    """A row's status and reason, before anything could be compared."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


def subject(model_class: type, row: dict, watch: Watch) -> tuple:
    """(eager, flashcore's, kind, inputs, config) of a class by itself, or inside a model that has it as a part.

    Raises: Verdict: it cannot be built, has no input, or is refused.
    """
    try:
        return alone(model_class, watch)
    except Verdict as verdict:
        if verdict.status != "unbuildable":
            raise
        found = _within(model_class, row, watch)
        if found is None:
            raise
        return found


def _within(model_class: type, row: dict, watch: Watch) -> tuple | None:
    """What `subject` returns, of the class inside the first whole that calls it with something that is felt."""
    best, whole = None, None
    for eager, path, call, config in islice(inside(model_class), RECIPES):
        if whole is None or whole[0] is not eager:
            whole = eager, counterpart(type(eager), config, eager)
        part, model = (each.get_submodule(path) for each in whole)
        try:
            run(part, call)
        except Exception:  # noqa: BLE001 - it needs what the call left out, a cache for instance
            continue
        felt = control_error(model, call, watch)
        if best is None or felt > best[0]:
            best = felt, part, model, "other", call, config
            row["inside"] = f"{type(eager).__name__}.{path}"
        if felt >= CONTROL:
            break
    forget(watch)
    return best and best[1:]


def alone(model_class: type, watch: Watch) -> tuple:
    """What `subject` returns, of the class by itself."""
    left_out = OVERRIDES.get(model_class.__name__, {}).get("left_out")
    if left_out is not None:
        raise Verdict("unbuildable", left_out)
    try:
        config = tiny_config(model_class.config_class, model_class.__name__)
        eager, config = _built(model_class, config)
    except Exception as error:  # noqa: BLE001
        raise Verdict("unbuildable", short(error)) from error
    model = counterpart(model_class, config, eager)
    # On the CPU, where an index out of range is an exception; on a GPU it would be the end of the process.
    refused, best = [], None
    for kind, inputs in islice(accepted_inputs(eager, config, refused), RECIPES):
        felt = control_error(model, inputs, watch)
        if best is None or felt > best[0]:
            best = felt, kind, inputs
        if felt >= CONTROL:
            break  # inputs on which attention matters, or the comparison would prove little
    forget(watch)
    if best is None:
        if model_class.forward is torch.nn.Module.forward:
            raise Verdict("unbuildable", "it has no forward")
        why = refused[0] if refused else "none of its parameters is known"
        raise Verdict("unbuildable", f"no input was found that its forward takes: {why}")
    return eager, model, *best[1:], config


def _built(model_class: type, config) -> tuple:
    """(eager model, config): of a part of the config where the class names the whole's for its own."""
    torch.manual_seed(0)
    try:
        return build(model_class, config, "eager"), config
    except AttributeError:
        for part in parts_of(config):
            try:
                return build(model_class, part, "eager"), part
            except Exception:  # noqa: BLE001 - not this part, then
                continue
        raise


def counterpart(model_class: type, config, eager):
    """The same model on flashcore, with the same weights."""
    try:
        model = build(model_class, config, "flashcore")
    except Exception as error:  # noqa: BLE001
        raise Verdict("refused" if is_refusal(error) else "wrong", short(error)) from error
    switch_on(eager)
    try:
        model.load_state_dict(eager.state_dict())
    except RuntimeError as error:
        raise Verdict("unbuildable", short(error)) from error
    return model
