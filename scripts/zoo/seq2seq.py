"""Encoder-decoders: a forward, and generate() with the default cache."""

from .case import Entry, Workload, config_of
from .inputs import spectrogram, text

TOKENS = 32


def _entry(name: str, model_class: str, config, *workloads: Workload) -> Entry:
    return Entry(name, "seq2seq", model_class, config, list(workloads))


def _forward(batch: int, length: int, decoder: int) -> Workload:
    return Workload(f"B{batch} S{length}:{decoder} padded", batch, length, text("right", decoder))


def _generate(*batches: int, length: int = 512, inputs=None) -> list[Workload]:
    return [
        Workload(f"generate B{batch}" + ("" if inputs else f" S{length} padded"), batch, length,
                 inputs or text("right", decoder=4), TOKENS)
        for batch in batches
    ]  # fmt: skip


_T5_LARGE = {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16, "d_kv": 64}

SEQ2SEQ = [
    _entry("whisper-large-v3", "WhisperForConditionalGeneration",
           config_of("WhisperConfig", vocab_size=51866, d_model=1280, encoder_layers=32, encoder_attention_heads=20,
                     encoder_ffn_dim=5120, decoder_layers=32, decoder_attention_heads=20, decoder_ffn_dim=5120,
                     num_mel_bins=128, max_target_positions=448),
           *_generate(1, 16, inputs=spectrogram("input_features", decoder=4))),
    _entry("t5-large encoder", "T5EncoderModel", config_of("T5Config", **_T5_LARGE),
           Workload("B16 S512 padded", 16, 512, text("right"))),
    _entry("t5-large", "T5ForConditionalGeneration", config_of("T5Config", **_T5_LARGE), *_generate(1, 16)),
    _entry("bart-large", "BartForConditionalGeneration", config_of("BartConfig", vocab_size=50265),
           _forward(16, 1024, 256), *_generate(16, length=1024)),
    _entry("pegasus-large", "PegasusForConditionalGeneration",
           config_of("PegasusConfig", vocab_size=96103, encoder_layers=16, decoder_layers=16),
           _forward(8, 1024, 128), *_generate(1)),
    _entry("nllb-200-distilled-600m", "M2M100ForConditionalGeneration",
           config_of("M2M100Config", vocab_size=256206, encoder_layers=12, decoder_layers=12),
           *_generate(16, length=128)),
    _entry("opus-mt-base", "MarianMTModel",
           config_of("MarianConfig", vocab_size=58101, decoder_vocab_size=58101, d_model=512, encoder_layers=6,
                     decoder_layers=6, encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=2048,
                     decoder_ffn_dim=2048, pad_token_id=58100, decoder_start_token_id=58100),
           _forward(64, 128, 64), *_generate(32, length=64)),
]  # fmt: skip
