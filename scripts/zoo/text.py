"""Text encoders, and decoders that people use as embedders."""

from .case import Entry, Workload, config_of
from .inputs import text

_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def _padded(batch: int, length: int, side: str = "right") -> Workload:
    return Workload(f"B{batch} S{length} padded", batch, length, text(side))


def _full(batch: int, length: int) -> Workload:
    return Workload(f"B{batch} S{length}", batch, length, text())


def _entry(name: str, model_class: str, config, *workloads: Workload) -> Entry:
    return Entry(name, "text", model_class, config, list(workloads))


TEXT = [
    _entry("bert-base", "BertModel", config_of("BertConfig"),
           _padded(64, 512), _full(64, 512), _padded(256, 128), _full(1, 128)),
    _entry("roberta-large", "RobertaModel",
           config_of("RobertaConfig", vocab_size=50265, max_position_embeddings=514, pad_token_id=1, **_LARGE),
           _padded(32, 384)),
    _entry("xlm-r-large", "XLMRobertaModel",
           config_of("XLMRobertaConfig", vocab_size=250002, max_position_embeddings=514, pad_token_id=1, **_LARGE),
           _full(32, 512), _padded(32, 512)),
    _entry("distilbert-base", "DistilBertModel", config_of("DistilBertConfig"), _padded(128, 64)),
    _entry("electra-base", "ElectraModel",
           config_of("ElectraConfig", embedding_size=768, hidden_size=768, intermediate_size=3072,
                     num_attention_heads=12), _padded(64, 256)),
    _entry("albert-xlarge", "AlbertModel",
           config_of("AlbertConfig", hidden_size=2048, num_attention_heads=16, intermediate_size=8192,
                     num_hidden_layers=24), _padded(32, 256)),
    _entry("ernie-base", "ErnieModel", config_of("ErnieConfig"), _full(64, 384)),
    _entry("esm2-650m", "EsmModel",
           config_of("EsmConfig", vocab_size=33, hidden_size=1280, num_hidden_layers=33, num_attention_heads=20,
                     intermediate_size=5120, position_embedding_type="rotary", pad_token_id=1, mask_token_id=32,
                     token_dropout=False, max_position_embeddings=1026), _padded(8, 1022)),
    _entry("modernbert-base", "ModernBertModel", config_of("ModernBertConfig"), _padded(16, 4096), _padded(64, 512)),
    _entry("eurobert-210m", "EuroBertModel",
           config_of("EuroBertConfig", hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                     num_key_value_heads=12, intermediate_size=3072), _padded(16, 2048)),
    _entry("qwen3-embedding-0.6b", "Qwen3Model",
           config_of("Qwen3Config", vocab_size=151669, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                     num_attention_heads=16, num_key_value_heads=8, head_dim=128),
           _padded(32, 2048), _padded(64, 128, "left")),
    _entry("embeddinggemma-300m", "Gemma3TextModel",
           config_of("Gemma3TextConfig", hidden_size=768, intermediate_size=1152, num_hidden_layers=24,
                     num_attention_heads=3, num_key_value_heads=1, head_dim=256, sliding_window=512,
                     use_bidirectional_attention=True, query_pre_attn_scalar=256), _padded(16, 2048)),
]  # fmt: skip
