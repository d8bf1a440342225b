"""The same kernels on Transformers 4.40 to 4.52: one call on a loaded model, and one that takes it back.

    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="sdpa")
    replace_attention_with_flashcore(model)

LLaMA, Mistral and Qwen2 are known. The instance is changed and nothing else: its attention modules and the decoder
around them get classes that are derived from their own (see classes.py). Weights, caches and the model's
configuration stay as they are. From 4.53 on, where Transformers has an interface for all of this, the same calls set
the model's attention implementation instead, so that code written once runs everywhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers

from .. import compat
from ..models import NAME, uses_interface
from .classes import family, is_stand_in, original_class, replace_class, restore_class

__all__ = [
    "attention_replaced",
    "replace_attention_with_flashcore",
    "replace_llama_attention_with_flashcore",
    "replace_mistral_attention_with_flashcore",
    "replace_qwen2_attention_with_flashcore",
    "restore_attention",
]

MODEL_TYPES = ("llama", "mistral", "qwen2")
# On 4.53 and newer: what restoring puts back, [(configuration, implementation)], kept on the model, whose copies then
# have copies of it.
_BEFORE = "_attention_before_flashcore"


def replace_attention_with_flashcore(model: torch.nn.Module) -> torch.nn.Module:
    """Let the attention of a loaded model run through flashcore. A second call changes nothing.

    On 4.40 to 4.52 `model.config._attn_implementation` goes on saying what the model was loaded with.

    Args:
        model: a LLaMA, Mistral or Qwen2 with any head, or something that holds one, loaded with
            attn_implementation="sdpa" or "eager"; from 4.53 on any model that uses the attention interface.

    Returns:
        the model itself.

    Raises:
        TypeError: it is no torch.nn.Module.
        ValueError: its attention is of no kind that is known, or was replaced by something else already. The message
            says what works. The model is as it was.
    """
    return _replace(model, MODEL_TYPES)


def replace_llama_attention_with_flashcore(model: torch.nn.Module) -> torch.nn.Module:
    """`replace_attention_with_flashcore` for LLaMA; a model without one raises a ValueError."""
    return _replace(model, ("llama",))


def replace_mistral_attention_with_flashcore(model: torch.nn.Module) -> torch.nn.Module:
    """`replace_attention_with_flashcore` for Mistral, its window included; a model without one raises a ValueError."""
    return _replace(model, ("mistral",))


def replace_qwen2_attention_with_flashcore(model: torch.nn.Module) -> torch.nn.Module:
    """`replace_attention_with_flashcore` for Qwen2; a model without one raises a ValueError."""
    return _replace(model, ("qwen2",))


def restore_attention(model: torch.nn.Module) -> torch.nn.Module:
    """Undo `replace_attention_with_flashcore`: bit for bit the model that it was given. Others stay as they are.

    Returns:
        the model itself.
    """
    _check_module(model)
    for config, implementation in vars(model).pop(_BEFORE, ()):
        config._attn_implementation_internal = implementation
    for module in model.modules():
        if is_stand_in(module):
            restore_class(module)
    return model


@contextmanager
def attention_replaced(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """While this holds, the model's attention runs through flashcore; then it is as it was before."""
    _check_module(model)
    was_replaced = _BEFORE in vars(model) or any(map(is_stand_in, model.modules()))
    replace_attention_with_flashcore(model)
    try:
        yield model
    finally:
        if not was_replaced:
            restore_attention(model)


def _replace(model: torch.nn.Module, model_types: tuple[str, ...]) -> torch.nn.Module:
    _check_module(model)
    if compat.HAS_INTERFACE:
        _set_implementation(model, model_types)
        return model
    # All of it is checked before any of it is changed.
    for module, model_type in _to_replace(model, model_types):
        replace_class(module, model_type)
    return model


def _to_replace(model: torch.nn.Module, model_types: tuple[str, ...]) -> list[tuple[torch.nn.Module, str]]:
    """The modules of `model` that get another class, each with its model type."""
    families = [family(model_type) for model_type in model_types]
    decoders = [
        (module, known) for module in model.modules() for known in families if original_class(module) is known.decoder
    ]
    if not decoders:
        raise ValueError(_not_known(model, model_types))
    found = []
    for decoder, known in decoders:
        attentions = [layer.self_attn for layer in decoder.layers]
        heads = [head for head in model.modules() if type(head) is known.head and head.model is decoder]
        for module in (*heads, decoder, *attentions):
            if not is_stand_in(module):
                found.append((module, known.model_type))
        for attention in attentions:
            _check_attention(attention, known.attentions, decoder)
    return found


def _check_attention(attention: torch.nn.Module, known: tuple[type, ...], decoder: torch.nn.Module) -> None:
    """An attention module must be one of `known` as Transformers has it, and nobody else's by now."""
    what = f"flashcore was to replace the attention of a {type(decoder).__name__}"
    implementation = decoder.config._attn_implementation
    if implementation not in ("eager", "sdpa"):
        raise ValueError(f'{what} that was loaded with "{implementation}". Load it with "sdpa" or "eager".')
    kind = original_class(attention)
    if kind not in known:
        raise ValueError(
            f"{what} whose layers have a {kind.__name__} of {kind.__module__}. Only "
            f"{' and '.join(each.__name__ for each in known)} of Transformers itself can be replaced."
        )
    # A forward on the instance hides that of the class. The one that accelerate's hooks keep is the class's own.
    hiding = vars(attention).get("_old_forward", vars(attention).get("forward"))
    if hiding is not None and getattr(hiding, "__func__", None) is not type(attention).forward:
        raise ValueError(f"{what}, and something else has done so already: {hiding!r}. Undo that first.")


def _set_implementation(model: torch.nn.Module, model_types: tuple[str, ...]) -> None:
    """What replacing comes to on 4.53 and newer."""
    parts = [part for part in model.modules() if isinstance(part, compat.PreTrainedModel)]
    named = model_types is not MODEL_TYPES
    if not parts or (named and not any(part.config.model_type in model_types for part in parts)):
        raise ValueError(_not_known(model, model_types))
    before = [(config, config._attn_implementation_internal) for config in _configurations(parts)]
    if all(implementation == NAME for _, implementation in before):
        return
    vars(model).setdefault(_BEFORE, before)
    inside = set()
    try:
        for part in parts:
            if part not in inside:
                inside.update(part.modules())
                _set_on_whole(part)
    except Exception:
        restore_attention(model)
        raise


def _set_on_whole(model: torch.nn.Module) -> None:
    """`model.set_attn_implementation("flashcore")`, also in 4.53, which does not have it."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(NAME)
        return
    if not uses_interface(type(model)):
        raise ValueError(_not_known(model, MODEL_TYPES))
    for part in model.modules():
        if isinstance(part, compat.PreTrainedModel) and uses_interface(type(part)):
            part.config._attn_implementation = NAME


def _configurations(parts: list[torch.nn.Module]) -> list:
    """Every configuration of the parts once, those inside others included."""
    found, pending = {}, [part.config for part in parts]
    while pending:
        config = pending.pop()
        if id(config) not in found:
            found[id(config)] = config
            pending += [inner for key in config.sub_configs if (inner := getattr(config, key, None)) is not None]
    return list(found.values())


def _check_module(model) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"a loaded model is needed, a torch.nn.Module; got {type(model).__name__}")


def _not_known(model: torch.nn.Module, model_types: tuple[str, ...]) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", "unknown")
    what = f"flashcore was to replace the attention of a {type(model).__name__} (model type {model_type})"
    if model_types is not MODEL_TYPES:
        return f"{what}, and this call is for {model_types[0]}. replace_attention_with_flashcore(model) is for all."
    if compat.HAS_INTERFACE:
        return f"{what}, and found no model in it that uses Transformers' attention interface."
    return (
        f"{what}. On Transformers {transformers.__version__} that can be done for the model types "
        f"{', '.join(MODEL_TYPES)}, as on 4.40 to 4.52, where the model is of Transformers' own classes. Most other "
        'models work with attn_implementation="flashcore" on 4.53 and newer.'
    )
