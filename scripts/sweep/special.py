"""Tensors for inputs: general ones, what a forward needs beside its main one, and signatures that one class has."""

import torch

from .configs import FIRST_SPECIAL

BATCH, LENGTH = 3, 13


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


def first_field(config, *names: str):
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


def _features_length(config, inputs: dict) -> int:
    return max(inputs["input_features"].shape[1:]) if "input_features" in inputs else LENGTH


# By parameter, from the config and the inputs so far: what has no default.
NEEDED = {
    "input_features_mask": lambda config, inputs: torch.ones(2, _features_length(config, inputs), dtype=torch.int64),
    "qformer_input_ids": lambda config, inputs: token_ids(
        inputs["pixel_values"].shape[0] if "pixel_values" in inputs else BATCH, 6
    ),
    "past_values_padding": lambda config, inputs: torch.zeros_like(inputs["past_values"], dtype=torch.int64),
    "input_values": lambda config, inputs: noise(2, 1, 3200),
    "mask": lambda config, inputs: torch.ones(2, _features_length(config, inputs), dtype=torch.bool),
    "chunk_sample_lengths": lambda config, inputs: 160 * torch.tensor([_features_length(config, inputs)] * 2),
    "merge_sizes": lambda config, inputs: torch.ones(2, dtype=torch.int64),
}


def _boxes(batch: int, length: int) -> torch.Tensor:
    """float32 `[batch, length, 4]`: corners in [0, 1], the second one after the first."""
    corners = torch.rand(batch, length, 2, 2, generator=torch.Generator().manual_seed(3))
    return corners.sort(dim=2).values.reshape(batch, length, 4)


def _text(batch: int = 2, length: int = LENGTH) -> dict[str, torch.Tensor]:
    ids = token_ids(batch, length)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _decision(config) -> list[dict]:
    steps = 9
    return [{
        "states": noise(2, steps, config.state_dim), "actions": noise(2, steps, config.act_dim, seed=3),
        "rewards": noise(2, steps, 1, seed=4), "returns_to_go": noise(2, steps, 1, seed=5),
        "timesteps": torch.arange(steps).repeat(2, 1), "attention_mask": torch.ones(2, steps, dtype=torch.int64),
    }]  # fmt: skip


def _idefics(config) -> list[dict]:
    side = config.vision_config.image_size
    seen = torch.ones(2, LENGTH, 2, dtype=torch.int64)
    return [{**_text(), "pixel_values": noise(2, 2, 3, side, side), "image_attention_mask": seen}]


def _udop(config) -> list[dict]:
    return [{**_text(), "bbox": _boxes(2, LENGTH), "decoder_input_ids": token_ids(2, 7, seed=5)}]


def _kosmos2(config) -> list[dict]:
    side, where = config.vision_config.image_size, torch.zeros(2, LENGTH, dtype=torch.int64)
    where[:, 2 : 2 + config.latent_query_num] = 1
    return [{**_text(), "pixel_values": noise(2, 3, side, side), "image_embeds_position_mask": where}]


def _codebooks(channels: int, last: bool):
    """Text and the codes that are generated: channels last, or as rows of the batch."""
    ids = token_ids(2, 7 * channels, seed=5) % 60
    return [{**_text(), "decoder_input_ids": ids.reshape(2, 7, channels) if last else ids.reshape(2 * channels, 7)}]


def _clipseg(config) -> list[dict]:
    side = config.vision_config.image_size
    return [{**_text(), "pixel_values": noise(2, 3, side, side)}]


def _pi0(config) -> list[dict]:
    side = config.vlm_config.vision_config.image_size
    drawn = {"state": noise(2, config.max_state_dim), "noise": noise(2, config.chunk_size, config.max_action_dim),
             "timestep": torch.tensor([0.3, 0.8])}  # fmt: skip
    count = (side // config.vlm_config.vision_config.patch_size) ** 2
    ids = torch.cat([torch.full((2, count), config.vlm_config.image_token_id), token_ids(2, 5)], 1)
    image = {"pixel_values": noise(2, 1, 3, side, side), "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool)}
    return [{**drawn, **image, "input_ids": ids, "attention_mask": torch.ones_like(ids)}]


# By class name, from the config: lists of inputs to try.
SPECIAL = {
    "DecisionTransformerModel": _decision,
    "IdeficsModel": _idefics,
    "IdeficsForVisionText2Text": _idefics,
    "UdopForConditionalGeneration": _udop,
    "UdopEncoderModel": _udop,
    "Kosmos2ForConditionalGeneration": _kosmos2,
    "DiaForConditionalGeneration": lambda config: _codebooks(config.decoder_config.num_channels, True),
    "MusicgenForConditionalGeneration": lambda config: _codebooks(config.decoder.num_codebooks, False),
    "MusicgenMelodyForConditionalGeneration": lambda config: _codebooks(config.decoder.num_codebooks, False),
    "CLIPSegForImageSegmentation": _clipseg,
    "PI0ForConditionalGeneration": _pi0,
    "MoshiDepthDecoder": lambda config: [
        {"input_ids": token_ids(2, config.num_codebooks - 1), "last_hidden_state": noise(2, 1, config.input_size)}
    ],
}
