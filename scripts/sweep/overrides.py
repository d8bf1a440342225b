"""What the patterns of configs.py do not get right, by model_type or class name, with the reason where it is not plain.

`before`: keywords of the default configuration, where that cannot be made without; `config`: keywords of the small one;
`mrope`: whether rotary sections must be made; `left_out`: why a class is not checked by design;
`reference_defect`: (version, why) before which eager is not what the model means.
"""

# The last two layers read the keys and values of the first two.
_SHARED_KV = {"config": {"num_hidden_layers": 4, "num_kv_shared_layers": 2,
                         "layer_types": ["sliding_attention", "full_attention"] * 2}}  # fmt: skip
# The rotary sections' default is that of head_dim 128, in the code instead of the configuration.
_MROPE = {"mrope": True}
_MLA_HEAD_DIM = {"config": {"head_dim": 8}}
_DRAFT = {"left_out": "a draft model: it reads the cache of the model that it drafts for"}
_SESSION = {"left_out": "it runs on a session that keeps the frames of a video; its parts are checked by themselves"}
# The default is a vision transformer of full size, which timm builds by name.
_TIMM_VIT = {"vision_config": {"model_type": "timm_wrapper", "architecture": "vit_pe_core_base_patch16_224",
                               "model_args": {"embed_dim": 64, "num_heads": 4, "img_size": [32, 32], "depth": 2,
                                              "global_pool": "", "use_post_transformer_norm": False,
                                              "init_values": 0.1, "ref_feat_shape": [2, 2]}}}  # fmt: skip
_REPVIT = {"model_type": "timm_wrapper", "architecture": "repvit_m1.dist_in1k",
           "model_args": {"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}}  # fmt: skip
_MUSICGEN = {"before": {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"},
                        "decoder": {"model_type": "musicgen_decoder"}}}  # fmt: skip
_CODES = range(110, 142)  # token ids of an image's codes

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
    "sapiens2": {"config": {"image_size": 32, "num_key_value_heads_per_layer": [4, 2]}},
    "efficientloftr": {"config": {"hidden_size": 256, "num_attention_heads": 8}},
    "lw_detr_vit": {"config": {"image_size": 64, "num_windows": 4}},
    "dbrx": {"config": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
                        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2}}},
    "deepseek_v2": {"config": {"num_experts_per_tok": 2, "head_dim": 8}},
    "csm_depth_decoder_model": {"config": {"num_codebooks": 32, "max_position_embeddings": 33}},
    "xmod": {"config": {"default_language": "en_XX"}},
    "nemotron": {"config": {"num_key_value_heads": 2}},
    "Gemma4AssistantForCausalLM": _DRAFT,
    "Gemma4UnifiedAssistantForCausalLM": _DRAFT,
    "MuseGlimmerAssistantModel": _DRAFT,
    "Sam2VideoModel": _SESSION,
    "Sam3VideoModel": _SESSION,
    "Sam3TrackerVideoModel": _SESSION,
    "EdgeTamVideoModel": _SESSION,
    "blip-2": {"config": {"image_token_index": 150}},
    "instructblip": {"config": {"image_token_index": 150}},
    "instructblipvideo": {"config": {"video_token_index": 150}},
    "BridgeTowerForContrastiveLearning": {"config": {"contrastive_hidden_size": 64, "logit_scale_init_value": 2.6}},
    "chameleon": {"config": {
        "vq_config": {"num_embeddings": len(_CODES)},
        "vocabulary_map": {"<image>": 101} | {
            "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z": token
            for code, token in enumerate(_CODES)}}},
    "emu3": {"config": {
        "vq_config": {"codebook_size": len(_CODES)},
        "vocabulary_map": {"<image>": 101, "<|extra_200|>": 102} | {
            f"<|visual token {code:06d}|>": token for code, token in enumerate(_CODES)}}},
    "diffusion_gemma_text": {"config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "diffusion_gemma": {"before": {"vision_config": {"model_type": "gemma4_vision"}}, "config": {"canvas_length": 8}},
    "musicgen": _MUSICGEN,
    "musicgen_melody": {"before": {**_MUSICGEN["before"], "decoder": {"model_type": "musicgen_melody_decoder"}}},
    "deepseek_ocr2_text": {"config": {"mlp_layer_types": ["dense", "sparse"], "n_group": 1, "topk_group": 1}},
    "dpt": {"config": {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]}},
    "clipseg": {"config": {"extract_layers": [0, 1]}},
    "clap_audio_model": {"config": {"num_mel_bins": 64}},
    # Height and width take turns, so theirs are of one length.
    "ernie4_5_vl_moe_text": {"config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                            "mrope_section": [3, 3, 2]}}},
    "edgetam_vision_model": {"config": {"backbone_config": _REPVIT,
                                        "backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]]}},
    "edgetam_prompt_encoder": {"config": {"patch_size": 16}},
    "sam3_tracker": {"config": {"vision_config": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}}},
    "sam2_vision_model": {"config": {"backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]]}},
    "sam2_prompt_encoder": {"config": {"patch_size": 16}},
    "phi4_multimodal_audio": {"config": {"nemo_conv_channels": 64, "ext_pw_out_channel": 64,
                                         "depthwise_separable_out_channel": 64}},
    "lw_detr": {"config": {"projector_scale_factors": [1.0]}},
    "kosmos-2": {"config": {"latent_query_num": 4}},
    "step3p5": {"config": {"sliding_window": 6}},
    "esmc": {"config": {"vocab_size": 160}},
    "rt_detr_resnet": {"config": {"depths": [1, 1, 1, 1]}},
    "resnet": {"config": {"depths": [1, 1, 1, 1]}},
    "fun_asr_nano": {"config": {"adaptor_config": {"intermediate_size": 16}}},
    "molmo2_adapter": {"config": {"vision_feature_layer": [1, 0]}},
    "molmo2_vision": {"config": {"image_size": [32, 32], "num_position_embeddings": 16}},
    "pix2struct_text_model": {"config": {"initializer_range": 0.18}},
    "qwen3_omni_moe_talker_text": {"config": {"shared_expert_intermediate_size": 32}},
    "Blip2TextModelWithProjection": {"config": {"qformer_config": {"use_qformer_text_input": True}}},
    # A mask head's channels, a width and a channel a head, come in groups of eight.
    **{name: {"config": {"encoder_attention_heads": 8, "decoder_attention_heads": 8}}
       for name in ("DetrForSegmentation", "ConditionalDetrForSegmentation")},
    "perception_lm": {"config": _TIMM_VIT},
    "pe_video_encoder": {"config": _TIMM_VIT},
    "hunyuan_vl_text": _MROPE,
    "granite4_vision": {"config": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"}},
    "moonshine_streaming": {"config": {"num_key_value_heads": 4}},
    "openai_privacy_filter": {"config": {"num_key_value_heads": 1}},
    "align_vision_model": {"config": {"width_coefficient": 0.2, "depth_coefficient": 0.4}},
    "llama4_vision_model": {"config": {"intermediate_size": 256}},
    "mllama_vision_model": {"config": {"intermediate_layers_indices": [0, 1]}},
    "gptj": {"config": {"rotary_dim": 8}},
    "codegen": {"config": {"rotary_dim": 8}},
    "layoutlmv3": {"config": {"coordinate_size": 8, "shape_size": 16}},
    "dory": {"config": {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1,
                        "layer_types": ["sliding_attention", "full_attention"] * 2}},
    "muse_spark": {"config": {"audio_config": {"out_hidden_size": 64}}},
    "qwen4_exp_text": {"config": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
                                  "indexer_budget": 4, "indexer_compress_ratio": 1}},
}  # fmt: skip
