"""A class that only its whole model can build or feed, compared inside that: the same calls that the whole makes."""

import importlib
import inspect
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .configs import tiny_config
from .running import accepted_inputs, build, run, switch_on


def wholes(part: type) -> Iterator[type]:
    """Other model classes of the part's file: base models first, then those with heads."""
    module = importlib.import_module(part.__module__)
    found = [
        member for name, member in vars(module).items()
        if isinstance(member, type) and issubclass(member, PreTrainedModel) and member is not part
        and member.__module__ == module.__name__ and not name.endswith("PreTrainedModel")
        and getattr(member, "config_class", None) is not None
    ]  # fmt: skip
    yield from sorted(found, key=lambda member: not member.__name__.endswith("Model"))


def path_to(part: type, whole: torch.nn.Module) -> str | None:
    """The name of the first submodule of exactly this class, or None."""
    return next((name for name, module in whole.named_modules() if name and type(module) is part), None)


def inside(part: type) -> Iterator[tuple[torch.nn.Module, str, dict, object]]:
    """(eager whole, path of the part in it, what the whole calls the part with, config), for each whole and input."""
    for whole in wholes(part):
        try:
            config = tiny_config(whole.config_class, whole.__name__)
            torch.manual_seed(0)
            eager = build(whole, config, "eager")
        except Exception:  # noqa: BLE001 - the next whole may do
            continue
        path = path_to(part, eager)
        if path is None:
            continue
        switch_on(eager)
        for _, inputs in accepted_inputs(eager, config):
            call = recorded(eager, path, inputs)
            if call is not None:
                yield eager, path, call, config


def recorded(whole: torch.nn.Module, path: str, inputs: dict) -> dict | None:
    """The arguments by name of the first call of the submodule at `path`; None where the whole does not call it."""
    part, calls = whole.get_submodule(path), []

    def keep(module, args, kwargs):
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        more = next((bound.pop(name) for name in ("kwargs", "super_kwargs") if name in bound), {})
        calls.append({**bound, **more})

    handle = part.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        run(whole, inputs)
    except Exception:  # noqa: BLE001 - what it called until then is what counts
        pass
    finally:
        handle.remove()
    if not calls:
        return None
    # A cache would be another one in the next call: the part makes its own, or does without.
    return {name: value for name, value in calls[0].items() if not isinstance(value, Cache)}
