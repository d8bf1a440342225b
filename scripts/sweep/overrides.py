"""What the patterns of configs.py do not get right, by model_type or class name, with the reason where it is not plain.

`before`: keywords of the default configuration, where that cannot be made without; `config`: keywords of the small one;
`mrope`: whether rotary sections must be made; `inputs`: a function from the config to the inputs of a forward;
`reference_defect`: (version, why) before which eager is not what the model means.
"""

# The last two layers read the keys and values of the first two.
_SHARED_KV = {"config": {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
                         "layer_types": ["sliding_attention", "full_attention"] * 2}}  # fmt: skip
# The rotary sections' default is that of head_dim 128, in the code instead of the configuration.
_MROPE = {"mrope": True}
_MLA_HEAD_DIM = {"config": {"head_dim": 8}}

OVERRIDES: dict[str, dict] = {
    **{name: _MROPE for name in (
        "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "glm4v_text", "glm4v_moe_text", "glm_ocr_text",
        "paddleocr_vl_text", "glm_image_text", "qwen2_5_omni_talker", "glm46v_text", "keye_text",
    )},
    "gemma3n_text": {"config": {**_SHARED_KV["config"], "intermediate_size": [96] * 4, "altup_num_inputs": 2,
                                "activation_sparsity_pattern": [0.0] * 4}},
    "gemma4_text": _SHARED_KV,
    "axk1": _MLA_HEAD_DIM,
    "deepseek_v3": _MLA_HEAD_DIM,
    "longcat_flash": _MLA_HEAD_DIM,
    "youtu": _MLA_HEAD_DIM,
    "mistral4": _MLA_HEAD_DIM,
    # Without these there is no attention layer among two.
    "bamba": {"config": {"attn_layer_indices": [1]}},
    "granitemoehybrid": {"config": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2}},
    "recurrent_gemma": {"config": {"num_hidden_layers": 3}},
    "Qwen3OmniMoeAudioEncoder": {"reference_defect": (
        (5, 0), "eager and sdpa get no cu_seqlens before 5.0 and attend across chunks; FlashAttention and we do not"
    )},
    "gpt_neo": {"config": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}},
    "zamba": {"config": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
                         "attention_hidden_size": 128, "attention_head_dim": 32, "mamba_dt_rank": 4}},
    "zamba2": {"config": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
                          "attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 8,
                          "mamba_headdim": 16, "chunk_size": 8}},
    "lfm2_moe": {"config": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}},
    # A third of the head is rotated, in pairs; layers with a window have twice as many KV heads.
    "mimo_v2_flash": {"config": {"head_dim": 24, "v_head_dim": 16, "num_key_value_heads": 2}},
    "cohere_compass_text": {"config": {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}}},
    "kimi_k25": {"config": {"text_config": {"head_dim": 8}}},
    "dots1": {"config": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
                         "topk_group": 1}},
    "esm": {"before": {"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1}},
    "informer": {"before": {"prediction_length": 4}, "config": {"context_length": 16, "lags_sequence": [1, 2, 3]}},
    "time_series_transformer": {"before": {"prediction_length": 4},
                                "config": {"context_length": 16, "lags_sequence": [1, 2, 3]}},
    "mamba2": {"config": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 8}},
    "mobilebert": {"config": {"embedding_size": 64, "true_hidden_size": 64, "intra_bottleneck_size": 64,
                              "hidden_size": 64, "trigram_input": False, "use_bottleneck": False}},
    "gemma4_assistant": {"before": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0,
                                             "vocab_size_per_layer_input": 0}}},
    "sapiens2": {"config": {"image_size": 32}},
    "efficientloftr": {"config": {"hidden_size": 256}},
    "lw_detr_vit": {"config": {"image_size": 64, "num_windows": 4}},
    "dbrx": {"config": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
                        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2}}},
    "deepseek_v2": {"config": {"num_experts_per_tok": 2, "head_dim": 8}},
    "csm_depth_decoder_model": {"config": {"num_codebooks": 32, "max_position_embeddings": 33}},
    "xmod": {"config": {"default_language": "en_XX"}},
    "nemotron": {"config": {"num_key_value_heads": 2}},
    "qwen4_exp_text": {"config": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
                                  "indexer_budget": 4, "indexer_compress_ratio": 1}},
}  # fmt: skip
