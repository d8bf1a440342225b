"""Inputs that a model class may take, as recipes tried in turn until the reference accepts one."""

import inspect
from collections.abc import Iterator

import torch

from flashcore_hf.compat import CACHE_NAME

from .configs import VOCABULARY
from .special import BATCH, LENGTH, NEEDED, SPECIAL, first_field, noise, padding, token_ids

DECODER_LENGTH, ENCODER_LENGTH = 7, 11


def parameters_of(model: torch.nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of the model's forward by name."""
    return dict(inspect.signature(model.forward).parameters)


def recipes(model, config) -> Iterator[tuple[str, dict]]:
    """(kind, inputs) pairs, likeliest first; kind is "text" where ids may be padded and generated on."""
    takes = parameters_of(model)
    special = SPECIAL.get(type(model).__name__)
    if special is not None:
        for inputs in special(config):
            yield "other", inputs
        return
    needed = [name for name, parameter in takes.items()
              if parameter.default is inspect.Parameter.empty and name in NEEDED]  # fmt: skip
    for kind, inputs in _by_parameter(model, config, takes):
        yield kind, {**{name: NEEDED[name](config, inputs) for name in needed if name not in inputs}, **inputs}


def _by_parameter(model, config, takes: dict) -> Iterator[tuple[str, dict]]:
    text = _text(takes, config)
    decoder = {}
    if "decoder_input_ids" in takes:
        decoder["decoder_input_ids"] = token_ids(2, DECODER_LENGTH, seed=5)
    if text and model.main_input_name == "input_ids":
        yield "text", text
    for shapes in media(takes, config).values():
        for more in shapes:
            yield "other", {**more, **decoder}
            if "input_ids" in takes:
                ids = token_ids(2, LENGTH)
                yield "other", {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more, **decoder}
    if text and model.main_input_name != "input_ids":
        yield "text", text
    if text and "use_cache" in takes:
        yield "text", {**text, "use_cache": False}
    for ask in image_prompts(model, config):
        yield "other", {**ask, **{name: ids[:1] for name, ids in decoder.items()}}
    width = first_field(config, "hidden_size", "d_model", "embed_dim", "hidden_dim") or 64
    for name in ("inputs_embeds", "hidden_states", "input_embeds"):
        if name in takes:
            yield "other", {name: noise(2, LENGTH, width), **decoder}
            yield "other", {name: noise(2, LENGTH, width), "attention_mask": torch.ones(2, LENGTH, dtype=torch.int64)}
            if (given := first_field(config, "input_size")) is not None:
                yield "other", {name: noise(2, LENGTH, given)}


def image_prompts(model, config) -> Iterator[dict[str, torch.Tensor]]:
    """Tokens with an image among them, one sequence, where the model says how many tokens it makes of it."""
    takes = parameters_of(model)
    names = ("image_token_id", "image_token_index", "image_patch_id", "media_placeholder_token_id")
    token = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    if token is None or "pixel_values" not in takes or not hasattr(model, "get_image_features"):
        return
    for shapes in media(takes, config).values():
        for more in shapes:
            if "pixel_values" not in more:
                continue
            more = {**more, **{name: NEEDED[name](config, more) for name in takes if name in NEEDED}}
            try:
                asked = inspect.signature(model.get_image_features).parameters
                with torch.no_grad():
                    features = model.get_image_features(**{name: more[name] for name in more if name in asked})
            except Exception:  # noqa: BLE001 - the next shape may do
                continue
            # What takes the image's place in the text is the pooler's output, where there is one.
            pooled = [t.shape[:-1].numel() for t in _floats(getattr(features, "pooler_output", features))]
            every = [t.shape[:-1].numel() for t in _floats(features)]
            for count in dict.fromkeys((sum(pooled), max(every, default=0))):
                ids = torch.cat([token_ids(1, 4), torch.full((1, count), token), token_ids(1, 5, seed=7)], 1)
                ask = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
                for name in ("token_type_ids", "mm_token_type_ids"):
                    if name in takes:
                        ask[name] = (ids == token).long()
                yield ask


def _floats(value) -> list[torch.Tensor]:
    """Floating-point tensors in a tensor, list or output."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    if hasattr(value, "values"):
        value = list(value.values())
    return [t for part in value for t in _floats(part)] if isinstance(value, (list, tuple)) else []


def _text(takes: dict, config) -> dict[str, torch.Tensor] | None:
    if "input_ids" not in takes:
        return None
    inputs = {"input_ids": token_ids()}
    eos = getattr(config, "eos_token_id", None)
    if CACHE_NAME not in takes and isinstance(eos, int) and eos < VOCABULARY:
        inputs["input_ids"][:, LENGTH - 5] = eos  # some pool there; it is no padding on either side
    if "attention_mask" in takes:
        inputs["attention_mask"] = padding(None)
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = token_ids(BATCH, DECODER_LENGTH, seed=5)
    elif "encoder_hidden_states" in takes and _attends_across(takes, config):
        width = first_field(config, "cross_attention_hidden_size", "hidden_size", "d_model") or 64
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


def media(takes: dict, config) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Shapes that images, videos, features and waves may have, by what takes them."""
    found = {**_patches(takes, config), **_pixels(takes, config), **_audio(takes, config), **_series(takes, config)}
    return {name: shapes for name, shapes in found.items() if shapes}


def _image_sizes(config) -> tuple[int, int, int]:
    """(channels, side of an image, side of a patch)."""
    channels = first_field(config, "num_channels", "in_channels", "in_chans", "num_input_channels") or 3
    side = first_field(config, "image_size", "img_size") or 32
    return channels, side, first_field(config, "patch_size", "spatial_patch_size") or 8


def _patches(takes: dict, config) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Images that come as patches, with the grid of each image or the place of each patch."""
    channels, _, patch = _image_sizes(config)
    found = {}
    temporal = first_field(config, "temporal_patch_size", "patch_temporal") or 1
    if "grid_thw" in takes or "image_grid_thw" in takes:
        grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
        name = "grid_thw" if "grid_thw" in takes else "image_grid_thw"
        main = "hidden_states" if "hidden_states" in takes else "pixel_values"
        shapes = [(48, channels * temporal * patch * patch), (48, channels, patch, patch),
                  (1, 48, channels, patch, patch), (12, 2 * patch, 2 * patch, channels)]  # fmt: skip
        if main == "hidden_states":
            shapes.insert(1, (48, first_field(config, "hidden_size") or 64))
        found["grid"] = [{main: noise(*shape), name: grid} for shape in shapes]
    if "pixel_values" in takes and "spatial_shapes" in takes:
        seen = torch.ones(2, 16, dtype=torch.int64)
        seen[1, 12:] = 0
        name = "pixel_attention_mask" if "pixel_attention_mask" in takes else "attention_mask"
        found["naflex"] = [{"pixel_values": noise(2, 16, channels * patch * patch),
                            "spatial_shapes": torch.tensor([[4, 4], [4, 3]]), name: seen}]  # fmt: skip
    if "pixel_values" in takes and "target_sizes" in takes:
        found["strip"] = [{"pixel_values": noise(1, channels, patch, 32 * patch),
                           "target_sizes": torch.tensor([[4, 4], [4, 4]])}]  # fmt: skip
    if "pixel_values" in takes and "pixel_position_ids" in takes:
        rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        where = torch.stack([columns, rows], -1).reshape(1, 16, 2).repeat(2, 1, 1)
        found["placed"] = [{"pixel_values": noise(2, 16, channels * patch * patch), "pixel_position_ids": where}]
    if "flattened_patches" in takes:
        patches = noise(2, 9, (first_field(config, "patch_embed_hidden_size") or channels * patch * patch) + 2)
        patches[..., :2] = torch.arange(1, 10)[:, None].float() % 4
        found["flattened"] = [{"flattened_patches": patches, "attention_mask": torch.ones(2, 9)}]
    return found


def _pixels(takes: dict, config) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Whole images, tiles and videos."""
    channels, side, patch = _image_sizes(config)
    found = {}
    if "pixel_values" in takes:
        image = noise(2, channels, side, side)
        found["images"] = [
            {"pixel_values": image},
            {"pixel_values": noise(2, channels, 64, 64)},
            {"pixel_values": noise(2, channels, 256, 256)},
            {"pixel_values": noise(2, 2, channels, side, side)},
            {"pixel_values": noise(2, side // patch * (side // patch), channels * patch * patch)},
        ]
        size = getattr(config, "image_size", None)
        if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] != size[1]:
            found["images"].insert(0, {"pixel_values": noise(2, channels, *size)})
        if "aspect_ratio_ids" in takes:
            found["images"].insert(0, {
                "pixel_values": noise(2, 1, 4, channels, side, side),
                "aspect_ratio_ids": torch.tensor([[1], [6]]),
                "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]], [[1, 1, 1, 1]]]),
            })  # fmt: skip
        if "image_sizes" in takes:
            found["images"].append({"pixel_values": image, "image_sizes": torch.tensor([[side, side]] * 2)})
    for name in ("image", "images"):
        if name in takes:
            found[name] = [{name: noise(2, channels, side, side)}]
    count = first_field(config, "num_frames", "frames_per_clip")
    name = "pixel_values_videos" if "pixel_values_videos" in takes else "pixel_values"
    if name in takes and (count or name == "pixel_values_videos"):
        frames = count or 4
        found["videos"] = [
            {name: noise(1, frames, channels, side, side)}, {name: noise(frames, channels, side, side)},
        ]  # fmt: skip
    return found


def _audio(takes: dict, config) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Spectral features, waves, and codes."""
    mel = first_field(config, "num_mel_bins", "n_mel_bins", "feature_size", "input_feat_per_channel", "mel_dim",
                      "input_dim", "feature_projection_input_dim", "input_feat_size", "input_size") or 16  # fmt: skip
    frames = 2 * (first_field(config, "max_source_positions") or 20)
    found = {}
    if "input_features" in takes:
        shapes = [(2, mel, frames), (2, frames, mel), (2, 80, 3000), (2, 3000, 80), (2, mel, 3000), (2, 1, 64, mel),
                  (2, 64, 128), (2, 64, 80), (2, 400, mel), (2, 7 * mel, frames), (2, frames, 7 * mel),
                  (2, 128, 400), (2, 32, 64), (2, 32, 160)]  # fmt: skip
        found["features"] = [{"input_features": noise(*shape)} for shape in shapes]
        for name in ("attention_mask", "input_features_mask", "feature_attention_mask", "mask"):
            if name in takes:
                found["features"] += [
                    {"input_features": noise(*shape), name: torch.ones(2, frames, dtype=torch.bool)}
                    for shape in ((2, mel, frames), (2, frames, mel), (2, frames, 7 * mel))
                ]
        if "feature_lens" in takes:
            found["features"].append(
                {"input_features": noise(mel, 2 * frames), "feature_lens": torch.tensor([frames, frames])}
            )
    if "audio_mel" in takes:
        seen = torch.zeros(2, 64, dtype=torch.bool)
        found["mel"] = [{"audio_mel": noise(2, 64, width), "audio_mel_mask": seen} for width in (mel, 128)]
    if "input_values" in takes:
        channels, side, _ = _image_sizes(config)
        shapes = [(2, 4000), (2, 1, 4000), (2, 1, 19200), (2, side, mel), (2, frames, mel), (2, channels, side, side),
                  (2, 9600), (2, first_field(config, "max_length") or 64, mel)]  # fmt: skip
        found["values"] = [{"input_values": noise(*shape)} for shape in shapes]
    if "audio_codes" in takes:
        found["codes"] = [{"audio_codes": torch.randint(0, 60, (2, first_field(config, "num_quantizers") or 4, 9))}]
    return found


def _series(takes: dict, config) -> dict[str, list[dict[str, torch.Tensor]]]:
    """Time series."""
    if "past_values" not in takes:
        return {}
    length = first_field(config, "context_length", "seq_length") or 32
    inputs = first_field(config, "num_input_channels") or 1
    found = [{"past_values": noise(2, length, inputs)}, {"past_values": noise(2, length)}]
    if "freq" in takes:
        found.insert(0, {"past_values": noise(2, length), "freq": torch.zeros(2, 1, dtype=torch.int64)})
    if "past_time_features" in takes:
        past, future = length + max(config.lags_sequence), config.prediction_length
        found.insert(0, {
            "past_values": noise(2, past), "past_observed_mask": torch.ones(2, past),
            "past_time_features": noise(2, past, config.num_time_features),
            "future_values": noise(2, future, seed=4),
            "future_time_features": noise(2, future, config.num_time_features, seed=5),
        })  # fmt: skip
    return {"series": found}
