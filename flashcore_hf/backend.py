"""The name, and what makes Transformers accept it: two registries, and a check that reads "flash" in every name.

`enable()` notes what stood in each place before it, `disable()` puts exactly that back. Where somebody else has put
something on top of ours since, theirs stays, and ours below it does nothing but call on.
"""

import functools
import warnings

from . import compat, serving
from .attention import flashcore_attention
from .masks import flashcore_mask
from .models import NAME, refuse_model

_MISSING = object()
_warned_version = False
_enabled = False
_undo: list[tuple] = []  # (mapping or class, key or attribute, what stood there or _MISSING, ours)


def enable() -> None:
    """Register the attention and mask functions under "flashcore", and let Transformers accept the name.

    Before 4.53 Transformers goes on refusing the name, and says what to call instead: see `legacy`. Calling it again
    changes nothing.
    """
    global _enabled
    if _enabled:
        return
    _enabled = True
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
        _patch(model_class, "set_attn_implementation", _set_everywhere)
    else:
        _patch(model_class, "_autoset_attn_implementation", _refuse_in_autoset)
    if compat.continuous_batching() is not None:
        mixin, manager = compat.continuous_batching()
        _patch(mixin, "init_continuous_batching", _served_batching)
        _patch(manager, "start", _checked_start)
        if serving.why_not() is None:
            _patch(mixin, "generate_batch", _raising_generate_batch)
            _patch(manager, "_create_batch_processor", _taken_over)
            _patch(manager, "stop", _stopped_at_once)
            if compat.VERSION < (5, 22):
                # Continuous batching puts this before the name there.
                _register(compat.attention_registry(), f"paged|{NAME}", flashcore_attention)


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
    global _enabled
    _enabled = False
    while _undo:
        place, key, before, ours = _undo.pop()
        in_dict = isinstance(place, dict)
        if (place if in_dict else vars(place)).get(key) is not ours:
            continue  # somebody else's is there now
        if in_dict:
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
    patched = {key for place, key, _, _ in _undo if not isinstance(place, dict)}
    for attribute in (
        "_check_and_adjust_attn_implementation",
        "set_attn_implementation",
        "_autoset_attn_implementation",
    ):
        if hasattr(compat.PreTrainedModel, attribute):
            report[f"PreTrainedModel.{attribute}"] = "patched" if attribute in patched else "not patched"
    return report


def _register(registry: dict, name: str, function) -> None:
    _undo.append((registry, name, registry.get(name, _MISSING), function))
    registry[name] = function


def _patch(owner: type, attribute: str, wrapper) -> None:
    before = vars(owner).get(attribute, _MISSING)
    ours = wrapper(before)
    _undo.append((owner, attribute, before, ours))
    setattr(owner, attribute, ours)


def _accept_name(original):
    """Transformers 5 takes every name with "flash" in it for a FlashAttention to import; ours it only needs to find."""

    @functools.wraps(original)
    def _check_and_adjust_attn_implementation(self, attn_implementation, is_init_check=False, *args, **kwargs):
        if _enabled and attn_implementation in (NAME, f"paged|{NAME}"):
            refuse_model(type(self))
            if attn_implementation not in compat.attention_registry():
                attn_implementation = NAME  # from 5.22 on the prefix means nothing
            return self.get_correct_attn_implementation(attn_implementation, is_init_check)
        return original(self, attn_implementation, is_init_check, *args, **kwargs)

    return _check_and_adjust_attn_implementation


def _ours_makes_any_mask(original):
    """Where masks are made, "flash" in a name means that chunked ones are refused; ours takes them.

    In the models themselves it means packed images (`cu_seq_lens_q`), which ours takes too, so there it stays.
    """

    @functools.wraps(original)
    def is_flash_attention_requested(config=None, *args, **kwargs):
        if _enabled and config is not None and config._attn_implementation == NAME:
            return False
        return original(config, *args, **kwargs)

    return is_flash_attention_requested


def _set_everywhere(original):
    """Transformers only logs that a model cannot be switched, and goes on with the old implementation.

    It also leaves out parts that have a copy of a model's config, such as T5's encoder and decoder: up to 5.17 all of
    them, and in 5.23 and 5.24 those of a T5 within another model. They follow here, to our name and away from it. A
    part that cannot be served is refused, as it is where a model is loaded; then all is as it was.
    """

    @functools.wraps(original)
    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        if not _enabled:
            return original(self, attn_implementation, *args, **kwargs)
        if attn_implementation == NAME:
            refuse_model(type(self))
        parts = [part for part in self.modules() if isinstance(part, compat.PreTrainedModel)]
        before = [part.config._attn_implementation for part in parts]
        original(self, attn_implementation, *args, **kwargs)
        for part, old in zip(parts, before):
            wanted = part.config._attn_implementation
            if wanted != old or isinstance(attn_implementation, str):
                for copied in part.modules():
                    if isinstance(copied, compat.PreTrainedModel) and type(copied.config) is type(part.config):
                        if NAME in (wanted, copied.config._attn_implementation):
                            copied.config._attn_implementation_internal = wanted
        try:
            for part in parts:
                if part.config._attn_implementation == NAME:
                    refuse_model(type(part))
        except ValueError:
            for part, old in zip(parts, before):
                part.config._attn_implementation_internal = old
            raise

    return set_attn_implementation


def _refuse_in_autoset(original):
    """Transformers 4.53 accepts any registered name for any model, and older ones have another way in."""

    @functools.wraps(original.__func__)
    def _autoset_attn_implementation(cls, config, *args, **kwargs):
        if _enabled and getattr(config, "_attn_implementation_internal", None) == NAME:
            if not compat.HAS_INTERFACE:
                raise ValueError(
                    f'attn_implementation="{NAME}" needs Transformers 4.53 or newer, and this is '
                    f'{compat.transformers.__version__}. Here, load the model with attn_implementation="sdpa" and call '
                    "flashcore_hf.replace_attention_with_flashcore(model), for LLaMA, Mistral and Qwen2."
                )
            refuse_model(cls)
        return original.__func__(cls, config, *args, **kwargs)

    return classmethod(_autoset_attn_implementation)


def _served_batching(original):
    """What cannot work is said here, to the caller: the model runs in a thread of its own, whose errors reach a log."""

    @functools.wraps(original)
    def init_continuous_batching(self, *args, **kwargs):
        ours = _enabled and serving.is_ours(self)
        if ours:
            serving.check(self)
        manager = original(self, *args, **kwargs)
        if ours:
            serving.made(manager)
        return manager

    return init_continuous_batching


def _checked_start(original):
    """A manager from before the model was switched to ours, or before this was enabled."""

    @functools.wraps(original)
    def start(self, *args, **kwargs):
        if _enabled and serving.is_ours(self.model):
            serving.check(self.model)
        return original(self, *args, **kwargs)

    return start


def _raising_generate_batch(original):
    """It logs what the serving thread ran into, and answers what there is."""

    @functools.wraps(original)
    def generate_batch(self, inputs, *args, **kwargs):
        if not (_enabled and serving.is_ours(self)):
            return original(self, inputs, *args, **kwargs)
        with serving.watched() as managers:
            answers = original(self, inputs, *args, **kwargs)
        serving.raise_what_failed(self, managers, answers, len(inputs))
        return answers

    return generate_batch


def _taken_over(original):
    """The batch processor of a model of ours reads pages."""

    @functools.wraps(original)
    def _create_batch_processor(self, *args, **kwargs):
        processor = original(self, *args, **kwargs)
        if _enabled and serving.is_ours(self.model):
            serving.take_over(self, processor)
        return processor

    return _create_batch_processor


def _stopped_at_once(original):
    """The end of each generate_batch()."""

    @functools.wraps(original)
    def stop(self, block=True, timeout=None, keep_for_next_session=False, *args, **kwargs):
        arguments = (block, timeout, keep_for_next_session, *args)
        if not (_enabled and serving.is_ours(self.model)):
            return original(self, *arguments, **kwargs)
        with serving.stopped_at_once(self, keep_for_next_session):
            return original(self, *arguments, **kwargs)

    return stop
