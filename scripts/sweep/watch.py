"""What stands between a model and flashcore's attention function: counts, and a scale that is wrong on purpose."""

import math
from collections import Counter
from contextlib import contextmanager

import torch
from flashcore_kernels import path_counts

import flashcore_hf  # noqa: F401
from flashcore_hf import backend, compat
from flashcore_hf.range_mask import RangeMask

from .running import largest_error, run, tensors


class Watch:
    """Stands in the registry before the attention function: counts masks by kind, and can make the scale wrong."""

    def __init__(self, function):
        self.function = function
        self.masks: Counter[str] = Counter()
        self.scale = 1.0

    def __call__(self, module, query, key, value, attention_mask=None, **kwargs):
        kind = "no_mask"
        if kwargs.get("cu_seq_lens_q") is not None:
            kind = "key_range"
        elif attention_mask is not None:
            is_range = isinstance(attention_mask, RangeMask) or attention_mask.dtype == torch.int32
            is_range = is_range or attention_mask.dim() == 2
            kind = "key_range" if is_range else "dense_mask"
        self.masks[kind] += 1
        if self.scale != 1.0:
            kwargs["scaling"] = (kwargs.get("scaling") or query.shape[-1] ** -0.5) * self.scale
        return self.function(module, query, key, value, attention_mask, **kwargs)


def install_watch() -> Watch:
    """Put a Watch before flashcore's attention function."""
    registry = compat.attention_registry()
    if not isinstance(registry[backend.NAME], Watch):
        registry[backend.NAME] = Watch(registry[backend.NAME])
    return registry[backend.NAME]


def forget(watch: Watch) -> None:
    """Counts begin anew."""
    watch.masks.clear()
    path_counts.clear()


def control_error(model, inputs: dict, watch: Watch) -> float:
    """How far outputs move when the softmax scale is wrong by half; infinite where the model cannot run."""
    try:
        right = tensors(run(model, inputs))
        with wrong_scale(watch):
            return largest_error(right, tensors(run(model, inputs)))
    except Exception:  # noqa: BLE001 - the checks say what it was
        return math.inf


def paths(watch: Watch) -> dict[str, int]:
    """Attention calls by kernel, and by the kind of mask that they came with."""
    kernels = {name.removeprefix("flashcore_"): count for name, count in sorted(path_counts.items())}
    return {**kernels, **dict(sorted(watch.masks.items()))}


@contextmanager
def wrong_scale(watch: Watch):
    """Attention scores 1.5 times as large as they should be."""
    watch.scale = 1.5
    try:
        yield
    finally:
        watch.scale = 1.0
