"""Inputs that a model class may take, as recipes tried in turn until the reference accepts one."""

import inspect
from collections.abc import Iterator

import torch

from .configs import FIRST_SPECIAL
from .overrides import OVERRIDES

BATCH, LENGTH, DECODER_LENGTH, ENCODER_LENGTH = 3, 13, 7, 11


def parameters_of(model: torch.nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of the model's forward by name."""
    return dict(inspect.signature(model.forward).parameters)


def token_ids(batch: int = BATCH, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    """int64 `[batch, length]`, ordinary tokens alone."""
    return torch.randint(3, FIRST_SPECIAL, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(kind: str | None, batch: int = BATCH, length: int = LENGTH) -> torch.Tensor:
    """int64 `[batch, length]`: row i lacks 2 * i tokens on the left or the right."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        if kind == "left":
            mask[row, : 2 * row] = 0
        elif kind == "right":
            mask[row, length - 2 * row :] = 0
    return mask


def noise(*shape: int, seed: int = 2) -> torch.Tensor:
    """float32 of `shape`, standard normal."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def recipes(model, config) -> Iterator[tuple[str, dict[str, torch.Tensor | bool]]]:
    """(kind, inputs) pairs, likeliest first; kind is "text" where ids may be padded and generated on."""
    takes = parameters_of(model)
    special = OVERRIDES.get(type(model).__name__, {}).get("inputs")
    if special is not None:
        yield "other", special(config)
        return
    text = _text(takes, config)
    decoder = {}
    if "decoder_input_ids" in takes:
        decoder["decoder_input_ids"] = token_ids(2, DECODER_LENGTH, seed=5)
    if text and model.main_input_name == "input_ids":
        yield "text", text
    for shapes in _media(takes, config).values():
        for more in shapes:
            yield "other", {**more, **decoder}
            if "input_ids" in takes:
                ids = token_ids(2, LENGTH)
                yield "other", {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
    if text and model.main_input_name != "input_ids":
        yield "text", text
    if text and "use_cache" in takes:
        yield "text", {**text, "use_cache": False}
    width = _first(config, "hidden_size", "d_model", "embed_dim", "hidden_dim") or 64
    for name in ("inputs_embeds", "hidden_states", "input_embeds"):
        if name in takes:
            yield "other", {name: noise(2, LENGTH, width), **decoder}
            yield "other", {name: noise(2, LENGTH, width), "attention_mask": torch.ones(2, LENGTH, dtype=torch.int64)}


def _text(takes: dict, config) -> dict[str, torch.Tensor] | None:
    if "input_ids" not in takes:
        return None
    inputs = {"input_ids": token_ids()}
    if "attention_mask" in takes:
        inputs["attention_mask"] = padding(None)
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = token_ids(BATCH, DECODER_LENGTH, seed=5)
    elif "encoder_hidden_states" in takes and _attends_across(takes, config):
        width = _first(config, "cross_attention_hidden_size", "hidden_size", "d_model") or 64
        inputs["encoder_hidden_states"] = noise(BATCH, ENCODER_LENGTH, width)
        if "encoder_attention_mask" in takes:
            inputs["encoder_attention_mask"] = padding("right", BATCH, ENCODER_LENGTH)
    return inputs


def _attends_across(takes: dict, config) -> bool:
    required = takes["encoder_hidden_states"].default is inspect.Parameter.empty
    return (
        required
        or bool(getattr(config, "add_cross_attention", False))
        or bool(getattr(config, "is_encoder_decoder", False))
    )


def _first(config, *names: str):
    """The first of these fields that the config, its vision part or its audio part has."""
    parts = [config]
    for part in ("vision_config", "audio_config", "encoder_config", "backbone_config", "thinker_config", "text_config"):
        inner = getattr(config, part, None)
        if inner is not None and not isinstance(inner, dict):
            parts.append(inner)
            parts += [x for x in (getattr(inner, "vision_config", None), getattr(inner, "audio_config", None)) if x]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _media(takes: dict, config) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Shapes that images, videos, features and waves may have, by the parameter that takes them."""
    found: dict[str, list[dict[str, torch.Tensor]]] = {}
    channels = _first(config, "num_channels", "in_channels", "in_chans", "num_input_channels") or 3
    side = _first(config, "image_size", "img_size") or 32
    patch = _first(config, "patch_size", "spatial_patch_size") or 8
    temporal = _first(config, "temporal_patch_size") or 1
    mel = _first(config, "num_mel_bins", "n_mel_bins", "feature_size", "input_feat_per_channel", "mel_dim", "input_dim",
                 "feature_projection_input_dim", "input_feat_size", "input_size") or 16  # fmt: skip
    frames = 2 * (_first(config, "max_source_positions") or 20)
    if "grid_thw" in takes or "image_grid_thw" in takes:
        grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
        patches = noise(48, channels * temporal * patch * patch)
        name = "grid_thw" if "grid_thw" in takes else "image_grid_thw"
        first = "hidden_states" if "hidden_states" in takes else "pixel_values"
        found["grid"] = [{first: patches, name: grid}]
        if first == "hidden_states":
            found["grid"].append({first: noise(48, _first(config, "hidden_size") or 64), name: grid})
    if "pixel_values" in takes:
        image = noise(2, channels, side, side)
        found["pixel_values"] = [
            {"pixel_values": image},
            {"pixel_values": noise(2, channels, 64, 64)},
            {"pixel_values": noise(2, channels, 256, 256)},
            {"pixel_values": noise(2, 2, channels, side, side)},
        ]
        if "spatial_shapes" in takes:
            shapes = torch.tensor([[4, 4], [4, 3]])
            seen = torch.ones(2, 16, dtype=torch.int64)
            seen[1, 12:] = 0
            naflex = {"pixel_values": noise(2, 16, channels * patch * patch), "spatial_shapes": shapes}
            name = "pixel_attention_mask" if "pixel_attention_mask" in takes else "attention_mask"
            found["pixel_values"].insert(0, {**naflex, name: seen})
        if "image_sizes" in takes:
            found["pixel_values"].append({"pixel_values": image, "image_sizes": torch.tensor([[side, side]] * 2)})
        if "pixel_position_ids" in takes:
            rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
            where = torch.stack([columns, rows], -1).reshape(1, 16, 2).repeat(2, 1, 1)
            found["pixel_values"].insert(
                0, {"pixel_values": noise(2, 16, channels * patch * patch), "pixel_position_ids": where}
            )
    if "pixel_values_videos" in takes or "pixel_values" in takes and "Video" in type(config).__name__:
        count = _first(config, "num_frames", "frames_per_clip") or 4
        name = "pixel_values_videos" if "pixel_values_videos" in takes else "pixel_values"
        found["videos"] = [{name: noise(1, count, channels, side, side)}]
    if "flattened_patches" in takes:
        width = channels * patch * patch
        patches = noise(2, 9, width + 2)
        patches[..., :2] = torch.arange(1, 10)[:, None].float() % 4
        found["patches"] = [{"flattened_patches": patches, "attention_mask": torch.ones(2, 9)}]
    if "input_features" in takes:
        shapes = [(2, mel, frames), (2, frames, mel), (2, 80, 3000), (2, 3000, 80), (2, mel, 3000), (2, 1, 64, mel)]
        found["features"] = [{"input_features": noise(*shape)} for shape in shapes]
        for name in ("attention_mask", "input_features_mask", "feature_attention_mask"):
            if name in takes:
                found["features"] += [
                    {"input_features": noise(*shape), name: torch.ones(2, frames, dtype=torch.bool)}
                    for shape in ((2, mel, frames), (2, frames, mel))
                ]
        if "feature_lens" in takes:
            found["features"].append(
                {"input_features": noise(mel, 2 * frames), "feature_lens": torch.tensor([frames, frames])}
            )
    if "input_values" in takes:
        shapes = [(2, 4000), (2, 1, 4000), (2, 1, 9600), (2, side, mel), (2, frames, mel), (2, channels, side, side)]
        found["values"] = [{"input_values": noise(*shape)} for shape in shapes]
    if "past_values" in takes:
        length = _first(config, "context_length", "seq_length") or 32
        inputs = _first(config, "num_input_channels") or 1
        found["series"] = [{"past_values": noise(2, length, inputs)}, {"past_values": noise(2, length)}]
        if "freq" in takes:
            found["series"].insert(0, {"past_values": noise(2, length), "freq": torch.zeros(2, 1, dtype=torch.int64)})
    if "audio_codes" in takes:
        found["codes"] = [{"audio_codes": torch.randint(0, 60, (2, _first(config, "num_quantizers") or 4, 9))}]
    return found
