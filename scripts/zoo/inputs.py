"""Inputs of every kind of model, as makers for `Workload.inputs`: row i is the same in every batch."""

import inspect

import torch

from .case import Inputs

FIRST_TOKEN = 3


def lengths_of(batch: int, longest: int) -> list[int]:
    """Lengths of padded rows: the first has all tokens, the second a third, the others a quarter and more."""
    spread = [longest, longest // 3]
    generator = torch.Generator().manual_seed(0)
    spread += torch.randint(longest // 4, longest + 1, (max(batch - 2, 0),), generator=generator).tolist()
    return [max(1, length) for length in spread[:batch]]


def text(padded: str | None = None, decoder: int = 0, **more):
    """Tokens, and a mask as tokenizers give it, padded on the "left" or "right" or not.

    Args:
        decoder: tokens for the decoder of an encoder-decoder, 0 for none.
        more: further keywords of forward, the same for every batch.
    """

    def make(model, batch: int, length: int) -> Inputs:
        ids = token_rows(_vocabulary(model), batch, length)
        inputs = {"input_ids": ids, "attention_mask": _mask(padded, batch, length)}
        if decoder:
            inputs["decoder_input_ids"] = token_rows(_vocabulary(model), batch, min(decoder, length), seed=1)
        return {**inputs, **more}

    return make


def images(frames: int = 0):
    """pixel_values `[B, C, side, side]` as the configuration says, or `[B, frames, C, side, side]` of a video."""

    def make(model, batch: int, length: int) -> Inputs:
        channels, side = model.config.num_channels, model.config.image_size
        side = side if isinstance(side, (list, tuple)) else (side, side)
        count = (getattr(model.config, "num_frames", frames),) if frames else ()
        return {"pixel_values": noise_rows(batch, *count, channels, *side)}

    return make


def spectrogram(name: str, decoder: int = 0):
    """Mel features: `[B, bins, 2 * positions]` for Whisper, `[B, frames, bins]` for the others."""

    def make(model, batch: int, length: int) -> Inputs:
        config = model.config
        if hasattr(config, "max_source_positions"):
            shape = config.num_mel_bins, 2 * config.max_source_positions
        else:
            shape = config.max_length, config.num_mel_bins
        inputs = {name: noise_rows(batch, *shape)}
        if decoder:
            inputs["decoder_input_ids"] = token_rows(config.vocab_size, batch, decoder)
        return inputs

    return make


def wave(padded: bool, decoder: int = 0):
    """Sound of `length` samples, and which of them exist."""

    def make(model, batch: int, length: int) -> Inputs:
        length = max(length, 3200)
        mask = _mask("right" if padded else None, batch, length)
        inputs = {"input_values": noise_rows(batch, length) * mask, "attention_mask": mask}
        if decoder:
            inputs["decoder_input_ids"] = token_rows(model.config.vocab_size, batch, decoder)
        return inputs

    return make


def image_and_text(pixels, padded: str | None = None, prefix: bool = False):
    """Tokens with one image among them in each row, as many as the model makes of an image.

    Args:
        pixels: (config, batch) -> the image's inputs.
        padded: where shorter rows are padded.
        prefix: all tokens see each other, as PaliGemma has it; else token types say which are the image's.
    """

    def make(model, batch: int, length: int) -> Inputs:
        config = model.config
        token = getattr(config, "image_token_id", None)
        token = config.image_token_index if token is None else token
        count, vocabulary = _image_tokens(model, pixels(config, 1)), min(_vocabulary(model), token)
        ids = token_rows(vocabulary, batch, max(length, count + 8))
        mask = _mask(padded, batch, ids.shape[1] - count)
        # Padding is text: the image stands behind it on the left, before it on the right.
        first = 4 if padded == "right" else ids.shape[1] - count - 4
        ids[:, first : first + count] = token
        mask = torch.cat([mask[:, :first], mask.new_ones(batch, count), mask[:, first:]], 1)
        inputs = {"input_ids": ids, "attention_mask": mask, **pixels(config, batch)}
        takes = inspect.signature(model.forward).parameters
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in takes:
                inputs[name] = torch.zeros_like(ids) if prefix else (ids == token).long()
        return inputs

    return make


def square_image(config, batch: int) -> Inputs:
    """pixel_values `[B, C, side, side]` of the vision part."""
    side = config.vision_config.image_size
    side = side if isinstance(side, (list, tuple)) else (side, side)
    return {"pixel_values": noise_rows(batch, 3, *side)}


def image_in_list(config, batch: int) -> Inputs:
    """pixel_values `[B, 1, C, side, side]`: one image a row, of the list that each row may have."""
    return {"pixel_values": square_image(config, batch)["pixel_values"][:, None]}


def patches(grid: int):
    """Images as rows of patches: pixel_values `[B * grid * grid, C * frames * patch * patch]` and image_grid_thw."""

    def make(config, batch: int) -> Inputs:
        vision = config.vision_config
        channels = getattr(vision, "in_channels", None) or getattr(vision, "in_chans", 3)
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        side = grid if vision.hidden_size > 128 else 4
        pixels = noise_rows(batch, side * side, width).flatten(0, 1)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, side, side]] * batch)}

    return make


def token_rows(vocabulary: int, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """int64 `[batch, length]`, ordinary tokens."""
    rows = [
        torch.randint(FIRST_TOKEN, vocabulary, (length,), generator=torch.Generator().manual_seed(1000 * seed + row))
        for row in range(batch)
    ]
    return torch.stack(rows)


def noise_rows(batch: int, *shape: int) -> torch.Tensor:
    """float32 `[batch, *shape]`, standard normal; large batches repeat the first eight rows."""
    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(row)) for row in range(min(batch, 8))]
    return torch.stack([rows[row % len(rows)] for row in range(batch)])


def _mask(padded: str | None, batch: int, length: int) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.int64)
    if padded:
        for row, kept in zip(mask, lengths_of(batch, length)):
            row[slice(0, length - kept) if padded == "left" else slice(kept, length)] = 0
    return mask


def _vocabulary(model) -> int:
    config = model.config
    return getattr(config, "vocab_size", None) or config.get_text_config().vocab_size


@torch.no_grad()
def _image_tokens(model, one: Inputs) -> int:
    """How many tokens stand for one image: what the model's own image features are."""
    names = inspect.signature(model.get_image_features).parameters
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    moved = {
        name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else value.dtype)
        for name, value in one.items()
        if name in names or name == "pixel_values"
    }
    features = model.get_image_features(**moved)
    features = getattr(features, "pooler_output", features)
    features = features if isinstance(features, (list, tuple)) else [features]
    return sum(part.shape[:-1].numel() for part in features)
