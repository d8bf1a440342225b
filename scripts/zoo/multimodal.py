"""Vision-language models, one image among the tokens of each row; both of their parts have fewer layers."""

from .case import Entry, Workload, config_of
from .inputs import image_and_text, image_in_list, patches, square_image

_CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6,
         "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768}  # fmt: skip
_SIGLIP = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 7,
           "num_attention_heads": 16, "patch_size": 14, "vision_use_head": False}  # fmt: skip
_LLAMA_7B = {"model_type": "llama", "vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008,
             "num_hidden_layers": 8, "num_attention_heads": 32, "num_key_value_heads": 32}  # fmt: skip
_GEMMA_2B = {"model_type": "gemma", "vocab_size": 257216, "hidden_size": 2048, "intermediate_size": 16384,
             "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256}  # fmt: skip
_GEMMA3_4B = {"vocab_size": 262208, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 6,
              "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024}  # fmt: skip
_SMOL_LM = {"model_type": "llama", "vocab_size": 49280, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 6, "num_attention_heads": 32, "num_key_value_heads": 32}  # fmt: skip
_QWEN25_VL_3B = {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 9,
                 "num_attention_heads": 16, "num_key_value_heads": 2,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0,
                                     "mrope_section": [16, 24, 24]}}  # fmt: skip
_QWEN25_VISION = {"depth": 8, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
                  "fullatt_block_indexes": [1, 3, 5, 7]}  # fmt: skip
_QWEN2_1B = {"model_type": "qwen2", "vocab_size": 151674, "hidden_size": 1536, "intermediate_size": 8960,
             "num_hidden_layers": 7, "num_attention_heads": 12, "num_key_value_heads": 2}  # fmt: skip


def _entry(name: str, model_class: str, config, batch: int, length: int, pixels, prefix: bool = False) -> Entry:
    padded = None if prefix else "left"
    what = f"B{batch} S{length} {'prefix' if prefix else 'left-padded'}"
    workload = Workload(what, batch, length, image_and_text(pixels, padded, prefix))
    return Entry(name, "vision-language", model_class, config, [workload])


VISION_LANGUAGE = [
    _entry("llava-1.5-7b 1/4 of the layers", "LlavaForConditionalGeneration",
           config_of("LlavaConfig", vision_config=_CLIP, text_config=_LLAMA_7B, image_token_index=32000),
           8, 1024, square_image),
    _entry("qwen2.5-vl-3b 1/4 of the layers", "Qwen2_5_VLForConditionalGeneration",
           config_of("Qwen2_5_VLConfig", text_config=_QWEN25_VL_3B, vision_config=_QWEN25_VISION,
                     image_token_id=151655, video_token_id=151656, vision_start_token_id=151652,
                     vision_end_token_id=151653), 4, 2048, patches(64)),
    _entry("paligemma-3b 1/3 of the layers", "PaliGemmaForConditionalGeneration",
           config_of("PaliGemmaConfig", vision_config={**_SIGLIP, "image_size": 448}, text_config=_GEMMA_2B,
                     image_token_index=257152, projection_dim=2048), 8, 1152, square_image, True),
    _entry("gemma-3-4b 1/5 of the layers", "Gemma3ForConditionalGeneration",
           config_of("Gemma3Config", vision_config={**_SIGLIP, "image_size": 896, "num_hidden_layers": 5},
                     text_config=_GEMMA3_4B, mm_tokens_per_image=256, image_token_index=262144), 4, 2048, square_image),
    _entry("smolvlm-2b 1/4 of the layers", "SmolVLMForConditionalGeneration",
           config_of("SmolVLMConfig", text_config=_SMOL_LM, scale_factor=3, image_token_id=49190,
                     vision_config={"model_type": "smolvlm_vision", "hidden_size": 1152, "intermediate_size": 4304,
                                    "num_hidden_layers": 7, "num_attention_heads": 16, "image_size": 384,
                                    "patch_size": 14}), 8, 1024, image_in_list),
    _entry("internvl3-2b 1/4 of the layers", "InternVLForConditionalGeneration",
           config_of("InternVLConfig", text_config=_QWEN2_1B, image_token_id=151667,
                     vision_config={"model_type": "internvl_vision", "hidden_size": 1024, "num_hidden_layers": 6,
                                    "num_attention_heads": 16, "intermediate_size": 4096, "image_size": [448, 448],
                                    "patch_size": [14, 14]}), 8, 1024, square_image),
]  # fmt: skip
