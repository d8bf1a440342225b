"""Vision towers and audio encoders."""

from .case import Entry, Workload, config_of
from .inputs import images, spectrogram, wave

_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_BASE_AUDIO = {"conv_bias": True, "feat_extract_norm": "layer", "do_stable_layer_norm": True, **_LARGE}


def _vision(name: str, model_class: str, config, *batches: int, frames: int = 0) -> Entry:
    workloads = [Workload(f"B{batch}", batch, 0, images(frames)) for batch in batches]
    return Entry(name, "vision", model_class, config, workloads)


VISION = [
    _vision("vit-large-224", "ViTModel", config_of("ViTConfig", image_size=224, patch_size=16, **_LARGE), 64, 1),
    _vision("deit-base-384", "DeiTModel", config_of("DeiTConfig", image_size=384), 32),
    _vision("dinov2-large-518", "Dinov2Model",
            config_of("Dinov2Config", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518,
                      patch_size=14), 16),
    _vision("dinov3-vitb16-512", "DINOv3ViTModel",
            config_of("DINOv3ViTConfig", hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                      intermediate_size=3072, image_size=512, num_register_tokens=4), 32),
    _vision("clip-vit-large-336", "CLIPVisionModel",
            config_of("CLIPVisionConfig", image_size=336, patch_size=14, projection_dim=768, **_LARGE), 32),
    _vision("siglip-so400m-384", "SiglipVisionModel",
            config_of("SiglipVisionConfig", hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
                      num_attention_heads=16, image_size=384, patch_size=14), 32),
    _vision("ijepa-huge-224", "IJepaModel",
            config_of("IJepaConfig", hidden_size=1280, num_hidden_layers=32, num_attention_heads=16,
                      intermediate_size=5120, patch_size=14, image_size=224), 32),
    _vision("beit-base-384", "BeitModel",
            config_of("BeitConfig", image_size=384, use_relative_position_bias=True), 32),
    _vision("videomae-base", "VideoMAEModel", config_of("VideoMAEConfig"), 8, frames=16),
]  # fmt: skip


def _audio(name: str, model_class: str, config, *workloads: Workload) -> Entry:
    return Entry(name, "audio", model_class, config, list(workloads))


AUDIO = [
    _audio("whisper-large-v3 encoder", "whisper.modeling_whisper.WhisperEncoder",
           config_of("WhisperConfig", d_model=1280, encoder_layers=32, encoder_attention_heads=20,
                     encoder_ffn_dim=5120, num_mel_bins=128), Workload("B8", 8, 0, spectrogram("input_features"))),
    _audio("wav2vec2-large", "Wav2Vec2Model", config_of("Wav2Vec2Config", apply_spec_augment=False, **_BASE_AUDIO),
           Workload("B16 15 s padded", 16, 240000, wave(True))),
    _audio("hubert-large", "HubertModel", config_of("HubertConfig", apply_spec_augment=False, **_BASE_AUDIO),
           Workload("B8 30 s", 8, 480000, wave(False))),
    _audio("ast-base", "ASTModel", config_of("ASTConfig"), Workload("B16", 16, 0, spectrogram("input_values"))),
    _audio("moonshine-base", "MoonshineModel",
           config_of("MoonshineConfig", hidden_size=416, intermediate_size=1664, encoder_num_hidden_layers=8,
                     decoder_num_hidden_layers=8, encoder_num_attention_heads=8, decoder_num_attention_heads=8),
           Workload("B16 20 s padded", 16, 320000, wave(True, decoder=64))),
]  # fmt: skip
