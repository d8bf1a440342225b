"""Keys and values that somebody assigns to a layer of FlashCoreCache: what an eviction keeps, say."""

import torch

from .quantize import dequantize, head_scales


def assign(layer, name: str, states: torch.Tensor) -> None:
    """Have a FlashCoreLayer hold `states` in place of what it shows; another number of tokens waits for its partner.

    Args:
        name: "keys" or "values".
        states: `[B, Hkv, n, D or Dv]`; see FlashCoreLayer.keys.

    Raises:
        ValueError: it does not fit a sliding layer, max_length, or scales; or it requires a gradient.
    """
    if not isinstance(states, torch.Tensor) or states.dim() != 4:
        raise ValueError(f"{name} of a FlashCoreCache's layer must be a tensor [B, Hkv, n, D]; reset() empties it")
    held = layer.length - layer._visible()
    if layer.is_sliding and states.shape[2] != held:
        raise ValueError(
            f"{states.shape[2]} {name} were assigned to a sliding layer (window {layer.sliding_window}) that shows "
            f"{held}: its window counts positions, so none can be left out or added. Leave such layers as they are"
        )
    pair = {"keys": layer.keys, "values": layer.values, name: states}
    if any(part is None or part.shape[2] != states.shape[2] for part in pair.values()):
        layer._assigned[name] = states  # until its partner comes
    else:
        _replace(layer, *pair.values())


def _replace(layer, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Hold these tokens, in place of what the layer showed until now."""
    # Copies, as they may be views of the very slots that are written.
    keys = _in_models_dtype(layer, keys, layer.key_scale).clone()
    values = _in_models_dtype(layer, values, layer.value_scale).clone()
    before, scale = (layer.length, layer.base), layer.key_scale
    layer.length = first = layer._visible()
    if not layer.is_sliding:
        layer.base = 0
    try:
        layer._check(keys, values)
    except ValueError:
        layer.length, layer.base = before
        raise
    layer._assigned = {}
    layer.reserve(keys.shape[2])
    if layer.fp8 and not (layer._scaled and layer.key_scale is scale):
        layer.key_scale.copy_(head_scales(keys))
        layer.value_scale.copy_(head_scales(values))
        layer._scaled = True
    layer._write(keys, values, first - layer.base)
    layer.length = first + keys.shape[2]


def _in_models_dtype(layer, states: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """e4m3 with the layer's scales, exactly as the model's dtype; others as they are."""
    if states.dtype != torch.float8_e4m3fn:
        return states
    if scale is None or states.shape[:2] != scale.shape:
        raise ValueError(
            f"keys or values {list(states.shape)} in float8_e4m3fn were assigned, and this FlashCoreCache has no "
            "scales for as many sequences and heads. Assign them in the model's dtype"
        )
    return dequantize(states, scale, layer.dtype)
