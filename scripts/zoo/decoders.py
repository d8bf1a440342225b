"""Decoders without their output layer and with few layers: the ratio between backends is that of all layers."""

from .case import Entry, Workload, config_of
from .inputs import text

LAYERS = 4


def _long(length: int, batch: int = 1) -> Workload:
    return Workload(f"B{batch} S{length}", batch, length, text(use_cache=False))


def _left(batch: int, length: int) -> Workload:
    return Workload(f"B{batch} S{length} left-padded", batch, length, text("left", use_cache=False))


def _entry(name: str, model_class: str, config: str, fields: dict, *workloads: Workload, layers: int = LAYERS) -> Entry:
    made = config_of(config, num_hidden_layers=layers, **fields)
    return Entry(f"{name} {layers} layers", "decoders", model_class, made, list(workloads))


def _shape(vocabulary: int, width: int, inner: int, heads: int, kv_heads: int, **more) -> dict:
    return {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "max_position_embeddings": 32768, **more}  # fmt: skip


DECODERS = [
    _entry("llama-3.1-8b", "LlamaModel", "LlamaConfig", _shape(128256, 4096, 14336, 32, 8),
           _long(8192), _left(8, 2048), _long(16384)),
    _entry("llama-3.2-1b", "LlamaModel", "LlamaConfig", _shape(128256, 2048, 8192, 32, 8),
           _long(4096, 4), _left(16, 512)),
    _entry("mistral-7b", "MistralModel", "MistralConfig", _shape(32000, 4096, 14336, 32, 8, sliding_window=4096),
           _long(16384), _left(4, 2048)),
    _entry("qwen2.5-7b", "Qwen2Model", "Qwen2Config", _shape(152064, 3584, 18944, 28, 4), _long(8192), _left(8, 1024)),
    _entry("qwen3-8b", "Qwen3Model", "Qwen3Config", _shape(151936, 4096, 12288, 32, 8, head_dim=128), _left(8, 2048)),
    _entry("gemma-2-9b", "Gemma2Model", "Gemma2Config", _shape(256000, 3584, 14336, 16, 8, head_dim=256),
           _long(8192), _left(4, 2048)),
    _entry("gemma-3-1b", "Gemma3TextModel", "Gemma3TextConfig",
           _shape(262144, 1152, 6912, 4, 1, head_dim=256, sliding_window=512), _left(8, 2048), layers=6),
    _entry("phi-3-mini", "Phi3Model", "Phi3Config", _shape(32064, 3072, 8192, 32, 32, sliding_window=2047),
           _long(8192), _left(8, 1024)),
    _entry("gpt-oss-20b, 4 of 32 experts,", "GptOssModel", "GptOssConfig",
           _shape(201088, 2880, 2880, 64, 8, head_dim=64, num_local_experts=4, num_experts_per_tok=2), _left(4, 2048)),
    _entry("gpt-neox-20b", "GPTNeoXModel", "GPTNeoXConfig",
           {"vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 64},
           _left(8, 2048), layers=2),
    _entry("gpt2-xl", "GPT2Model", "GPT2Config", {"hidden_size": 1600, "num_attention_heads": 25}, _left(16, 1024)),
    _entry("opt-6.7b", "OPTModel", "OPTConfig",
           {"vocab_size": 50272, "hidden_size": 4096, "ffn_dim": 16384, "num_attention_heads": 32}, _left(8, 2048)),
    _entry("olmo-2-7b", "Olmo2Model", "Olmo2Config", _shape(100352, 4096, 11008, 32, 32), _left(8, 2048)),
    _entry("granite-3-8b", "GraniteModel", "GraniteConfig",
           _shape(49155, 4096, 12800, 32, 8, attention_multiplier=0.0078125), _left(8, 2048)),
    _entry("starcoder2-7b", "Starcoder2Model", "Starcoder2Config",
           _shape(49152, 4608, 18432, 36, 4, sliding_window=4096), _long(8192)),
    _entry("deepseek-v3, 8 experts,", "DeepseekV3Model", "DeepseekV3Config",
           {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 2}, _left(2, 2048), layers=2),
]  # fmt: skip
