"""The name, and what makes Transformers accept it: two registries, and a check that reads "flash" in every name.

`enable()` notes what stood in each place before it, `disable()` puts exactly that back.
"""

import functools
import re
import sys
import warnings
from inspect import getsource

from . import compat
from .attention import flashcore_attention
from .masks import flashcore_mask

NAME = "flashcore"

_MISSING = object()
_warned_version = False
_undo: list[tuple] = []  # (mapping or class, key or attribute, what stood there or _MISSING)


def enable() -> None:
    """Register the attention and mask functions under "flashcore", and let Transformers accept the name.

    Before 4.53 Transformers goes on refusing the name, and says what to call instead: see `legacy`. Calling it again
    changes nothing.
    """
    if _undo:
        return
    _warn_of_untested_version()
    if compat.attention_registry() is not None:
        _register(compat.attention_registry(), NAME, flashcore_attention)
    if compat.HAS_INTERFACE:
        _register(compat.mask_registry(), NAME, flashcore_mask)
    if hasattr(compat.masking_utils, "is_flash_attention_requested"):
        _patch(compat.masking_utils, "is_flash_attention_requested", _ours_makes_any_mask)
    model_class = compat.PreTrainedModel
    if hasattr(model_class, "_check_and_adjust_attn_implementation"):
        _patch(model_class, "_check_and_adjust_attn_implementation", _accept_name)
        _patch(model_class, "set_attn_implementation", _refuse_before_setting)
    else:
        _patch(model_class, "_autoset_attn_implementation", _refuse_in_autoset)


def _warn_of_untested_version() -> None:
    global _warned_version
    version = compat.untested_version()
    if version is not None and not _warned_version:
        _warned_version = True
        warnings.warn(
            f"flashcore was tested with Transformers up to {compat.NEWEST_TESTED}, and this is {version}. "
            "`python -m flashcore_hf parity` compares it with eager here; `pytest -m newest` says what is new for "
            "attention backends.",
            stacklevel=3,
        )


def disable() -> None:
    """Put back every registry entry and function as it was before `enable()`. Calling it again changes nothing.

    Models that were loaded with "flashcore" can no longer run; `model.set_attn_implementation("sdpa")` moves them.
    """
    while _undo:
        place, key, before = _undo.pop()
        if isinstance(place, dict):
            if before is _MISSING:
                place.pop(key, None)
            else:
                place[key] = before
        elif before is _MISSING:
            delattr(place, key)
        else:
            setattr(place, key, before)


def status() -> dict[str, str]:
    """What is registered and patched, name -> "registered" / "patched" / "not ...", for `env`."""
    report = {}
    for label, registry in (("attention", compat.attention_registry()), ("mask", compat.mask_registry())):
        if registry is not None:
            report[f"{label} function"] = "registered" if NAME in registry else "not registered"
    patched = {key for place, key, _ in _undo if not isinstance(place, dict)}
    for attribute in (
        "_check_and_adjust_attn_implementation",
        "set_attn_implementation",
        "_autoset_attn_implementation",
    ):
        if hasattr(compat.PreTrainedModel, attribute):
            report[f"PreTrainedModel.{attribute}"] = "patched" if attribute in patched else "not patched"
    return report


def _register(registry: dict, name: str, function) -> None:
    _undo.append((registry, name, registry.get(name, _MISSING)))
    registry[name] = function


def _patch(owner: type, attribute: str, wrapper) -> None:
    before = vars(owner).get(attribute, _MISSING)
    _undo.append((owner, attribute, before))
    setattr(owner, attribute, wrapper(before))


def _accept_name(original):
    """Transformers 5 takes every name with "flash" in it for a FlashAttention to import; ours it only needs to find."""

    @functools.wraps(original)
    def _check_and_adjust_attn_implementation(self, attn_implementation, is_init_check=False, *args, **kwargs):
        if attn_implementation == NAME:
            _refuse_without_interface(type(self))
            return self.get_correct_attn_implementation(attn_implementation, is_init_check)
        return original(self, attn_implementation, is_init_check, *args, **kwargs)

    return _check_and_adjust_attn_implementation


def _ours_makes_any_mask(original):
    """Where masks are made, "flash" in a name means that chunked ones are refused; ours takes them.

    In the models themselves it means packed images (`cu_seq_lens_q`), which ours takes too, so there it stays.
    """

    @functools.wraps(original)
    def is_flash_attention_requested(config=None, *args, **kwargs):
        if config is not None and config._attn_implementation == NAME:
            return False
        return original(config, *args, **kwargs)

    return is_flash_attention_requested


def _refuse_before_setting(original):
    """Transformers only logs that a model cannot be switched, and goes on with the old implementation."""

    @functools.wraps(original)
    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        if attn_implementation == NAME:
            _refuse_without_interface(type(self))
        return original(self, attn_implementation, *args, **kwargs)

    return set_attn_implementation


def _refuse_in_autoset(original):
    """Transformers 4.53 accepts any registered name for any model, and older ones have another way in."""

    @functools.wraps(original.__func__)
    def _autoset_attn_implementation(cls, config, *args, **kwargs):
        if getattr(config, "_attn_implementation_internal", None) == NAME:
            if not compat.HAS_INTERFACE:
                raise ValueError(
                    f'attn_implementation="{NAME}" needs Transformers 4.53 or newer, and this is '
                    f'{compat.transformers.__version__}. Here, load the model with attn_implementation="sdpa" and call '
                    "flashcore_hf.replace_attention_with_flashcore(model), for LLaMA, Mistral and Qwen2."
                )
            _refuse_without_interface(cls)
        return original.__func__(cls, config, *args, **kwargs)

    return classmethod(_autoset_attn_implementation)


@functools.cache
def uses_interface(model_class: type) -> bool:
    """Whether the model's attention goes through Transformers' registry of attention functions.

    Read from the source of the file that defines the class, as Transformers itself does: a file with attention classes
    of its own that never asks the registry runs its own attention whatever the name says, and so does one that chooses
    among classes in a table by the name, but for the classes beside it that say they take any backend and
    FlashAttention (DeepSeek-OCR 2's text model). A file without attention classes (composite models) says nothing, and
    the models inside are asked for themselves.
    """
    module = sys.modules.get(model_class.__module__)
    try:
        source = getsource(module)
    except (OSError, TypeError):
        return False
    if re.search(r"_CLASSES\[\s*config\._attn_implementation", source):
        names = ("_supports_attention_backend", "_supports_flash_attn")
        return "ALL_ATTENTION_FUNCTIONS" in source and all(getattr(model_class, name, False) for name in names)
    has_attention = re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE) is not None
    return not has_attention or "ALL_ATTENTION_FUNCTIONS" in source


def _drops_mask(model_class: type) -> bool:
    """Models that forget their mask, and say it in no other way, where a name has "flash" in it.

    SigLIP's text models before 5.0 forget padding; Pixtral's tower in 5.0 to 5.17 what keeps images apart.
    """
    source = getsource(sys.modules[model_class.__module__])
    if model_class.__name__ in ("SiglipTextModel", "Siglip2TextModel"):
        return '"flash" in self.config._attn_implementation' in source
    if model_class.__name__ == "PixtralVisionModel":
        return "is_flash_attention_requested(self.config)" in source and "cu_seq_lens_q" not in source
    return False


def _causal_in_eager_alone(model_class: type) -> bool:
    """The Decision Transformer before 5.4: `eager` adds what is causal to the padding mask that it is given."""
    source = getsource(sys.modules[model_class.__module__])
    return (
        model_class.__name__.startswith("DecisionTransformer")
        and "module.bias[" in source
        and "create_causal_mask" not in source
    )


def _refuse_without_interface(model_class: type) -> None:
    if _causal_in_eager_alone(model_class):
        raise ValueError(
            f'attn_implementation="{NAME}" was asked for {model_class.__name__}, which in this Transformers is causal '
            "under eager alone once it is given a mask. Supported is this model in Transformers 5.4 and newer. Load it "
            'with attn_implementation="eager".'
        )
    if _drops_mask(model_class):
        raise ValueError(
            f'attn_implementation="{NAME}" was asked for {model_class.__name__}, which in this Transformers forgets '
            'its mask for every name with "flash" in it. Supported are newer versions of Transformers, and the other '
            'parts of a model that holds this one: attn_implementation={"text_config": "flashcore"} (or '
            '"vision_config"). Load this one with attn_implementation="sdpa" or "eager".'
        )
    if not uses_interface(model_class):
        raise ValueError(
            f'attn_implementation="{NAME}" was asked for {model_class.__name__}, which does not use Transformers\' '
            "attention interface: its attention would run as it always does, and misread the masks. Supported are "
            "models whose attention is looked up in ALL_ATTENTION_FUNCTIONS (LLaMA, Mistral, Qwen, Gemma and most "
            'newer ones). Load this one with attn_implementation="sdpa" or "eager"; where it is a part of a larger '
            'model, name the part that can: attn_implementation={"text_config": "flashcore"}.'
        )
