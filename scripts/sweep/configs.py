"""A small configuration for any model class, made from its own default one.

Widths become W, depths two layers (one of each kind of layer where there are more kinds), and head counts small ones
with the same ratio and parity. Names of configuration fields are regular enough for a table of patterns; what is not
regular stands in overrides.py.
"""

import math
import re

from transformers import PretrainedConfig

from .overrides import OVERRIDES

VOCABULARY = 160
FIRST_SPECIAL = 100  # token ids from here on are special ones (images, audio), and prompts stay below
HEAD_DIM = 16
WINDOW = 6

_WIDTH = re.compile(
    r"(^|_)(hidden_size|hidden_dim|d_model|n_embd|embed_dim|embedding_dim|embedding_size|projection_dim|proj_dim|"
    r"out_hidden_size|output_dim|word_embed_proj_dim|projection_size|model_dim|dim_model|attention_hidden_size|"
    r"input_feat_size|lru_width|hidden_size_global|encoder_dim|decoder_dim|projector_hidden_size|vit_dim|"
    r"projector_input_dim|projector_output_dim|adapter_input_size|adapter_in_dim|adapter_out_dim|condition_dim|"
    r"contrastive_hidden_size|encoder_hidden_dim|attention_dim|output_proj_dims|cross_hidden_size)$|^dim$"
)
_INNER = re.compile(
    r"(^|_)(intermediate_size|ffn_dim|d_ff|mlp_dim|ffn_hidden_size|n_inner|dff|intermediate_size_mlp|"
    r"feed_forward_hidden_size|intermediate_dim|ffn_inner_dim|feedforward_dim)$"
)
_LAYERS = re.compile(r"(^|_)(num_hidden_layers|num_layers|n_layers?|depth|layers|num_blocks|num_decoder_layers)$")
_HEADS = re.compile(r"(^|_)(num_attention_heads|attention_heads|n_heads?|num_heads|heads)$")
_KV_HEADS = re.compile(r"(^|_)(num_key_value_heads|num_kv_heads|num_key_value_attention_heads|kv_n_heads)$")
_HEAD_DIM = re.compile(r"^(head_dim|swa_head_dim|global_head_dim|attention_head_dim|d_kv|kv_channels|v_head_dim_swa|"
                       r"query_pre_attn_scalar|cross_head_dim|attention_head_size|dim_head)$")  # fmt: skip
_EXPERTS = re.compile(r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$")
_TOKEN = re.compile(r"_token_(id|index)$|^(image|video|audio)_token$|_token_ids?$")
_SMALL = {
    "vocab_size": VOCABULARY, "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_top_k": 2,
    "moe_k": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1, "num_expert_group": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "qk_head_dim": 24,
    "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "expert_ffn_hidden_size": 32, "first_k_dense_replace": 1, "sliding_window": WINDOW,
    "sliding_window_size": WINDOW, "attention_chunk_size": WINDOW, "local_attention": WINDOW,
    "attention_window_size": WINDOW, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_head_dim": 16, "linear_num_heads": 4, "mamba_n_heads": 8, "mamba_d_head": 16,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "ssm_state_size": 8,
    "mamba_d_ssm": 128, "mamba_chunk_size": 8, "mamba_dt_rank": 8, "n_mamba_heads": 2, "attn_layer_period": 2,
    "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "index_n_heads": 2,
    "index_head_dim": 16, "index_topk": 4, "index_block_size": 4, "index_topk_blocks": 2, "index_kpool": 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0,
    "num_frames": 4,
    "altup_num_inputs": 2, "laurel_rank": 8, "zero_expert_num": 2, "image_size": 32, "pretrain_image_size": 32,
    "patch_size": 8, "num_mel_bins": 16, "n_mel_bins": 16, "mel_dim": 16, "max_source_positions": 20,
    "codebook_size": 64, "num_codebooks": 4, "max_window_layers": 1, "no_rope_layer_interval": 2,
    "conv_depthwise_kernel_size": 5, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
    "subsampling_conv_channels": 16, "fpn_hidden_size": 64, "num_query_tokens": 4, "num_queries": 8,
    "type_vocab_size": 2, "base_channels": 32, "resolution": 32, "num_filters": 8, "upsample_groups": 16,
    "vector_quantization_hidden_dimension": 16, "codebook_dim": 16, "encoder_hash_byte_group_vocab": 500,
    "embedding_rank": 16, "gated_norm_rank": 8, "hc_lowrank": 16, "o_lora_rank": 16, "o_groups": 2,
    "router_hidden_size": 16, "mamba_ngroups": 1, "adapter_rank": 8, "pooler_output_size": 64,
    "global_pointer_head_size": 16, "layer_group_size": 2, "num_image_tokens": 16, "downsample_hidden_size": 64,
    "xvector_output_dim": 32, "classifier_proj_size": 32, "num_position_embeddings": 64, "share_expert_dim": 32,
}  # fmt: skip
_STAGES = ("depths", "num_heads", "num_attention_heads", "embed_dim_per_stage", "blocks_per_stage")
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")
_KEPT = ("num_feat_extract_layers",)
# Fields whose default, None, is no model that works.
_UNSET = {"head_dim": HEAD_DIM, "num_experts_per_tok": 2, "n_routed_experts": 4, "v_head_dim": 12}
_INITIALISERS = ("initializer_range", "init_std", "initializer_std", "init_range")


def head_counts(heads: int, kv_heads: int | None) -> tuple[int, int]:
    """Few heads with the ratio and parity of many: 14 on 2 becomes 7 on 1, 32 on 8 becomes 8 on 2, 25 becomes 5."""
    ratio = heads // kv_heads if kv_heads and heads % kv_heads == 0 else 1
    if ratio == 1:
        few = next((n for n in (3, 5, 7) if heads % 2 and heads % n == 0), min(heads, 4))
        return few, few
    if ratio > 8:
        ratio = next((n for n in (3, 5, 7) if ratio % 2 and ratio % n == 0), 4)
    few_kv = 1 if kv_heads == 1 or ratio > 4 else 2
    return ratio * few_kv, few_kv


def tiny_config(config_class: type, class_name: str = "") -> PretrainedConfig:
    """A small instance of `config_class`, with initializer_range about sqrt(2 / hidden_size).

    Raises: whatever the class raises on values that do not fit together.
    """
    override = OVERRIDES.get(getattr(config_class, "model_type", ""), {})
    default = config_class(**override.get("before", {}))
    changes = _shrunk(default, _width(default), _TokenIds())
    return config_class(**_merge(changes, OVERRIDES.get(class_name, {}).get("config", {})))


def parts_of(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The configs inside a config, at any depth."""
    inner = [value for value in _fields(config).values() if isinstance(value, PretrainedConfig)]
    return inner + [part for config in inner for part in parts_of(config)]


def _merge(changes: dict, more: dict) -> dict:
    out = dict(changes)
    for key, value in more.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if nested else value
    return out


def _fields(config: PretrainedConfig) -> dict:
    return {name: value for name, value in vars(config).items() if not name.startswith("_")}


def _width(config: PretrainedConfig) -> int:
    """One width for all parts of a composite model: a multiple of its text model's heads."""
    text = config
    for name in ("thinker_config", "text_config", "language_config", "llm_config", "decoder"):
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            text = getattr(part, "text_config", part)
            break
    heads, _ = head_counts(*_head_fields(_fields(text)))
    return 64 if 64 % heads == 0 else HEAD_DIM * heads


def _head_fields(fields: dict) -> tuple[int, int | None]:
    def first(pattern):
        return next((v for k, v in fields.items() if pattern.search(k) and isinstance(v, int) and v > 0), None)

    return first(_HEADS) or 4, first(_KV_HEADS)


class _TokenIds:
    """Hands out distinct special token ids."""

    def __init__(self):
        self.next = FIRST_SPECIAL

    def __call__(self) -> int:
        self.next += 1
        return min(self.next, VOCABULARY - 1)


def _shrunk(config: PretrainedConfig, width: int, token_ids: _TokenIds) -> dict:
    """What to pass to the config's class for a small one: changed fields alone, so that derived ones are derived."""
    fields = _fields(config)
    # Models in stages have lists of widths and heads that fit one another: they are small enough by their depths.
    staged = any(isinstance(fields.get(name), (list, tuple)) for name in _STAGES)
    heads, kv_heads = head_counts(*_head_fields(fields))
    if width % heads:
        heads, kv_heads = 4, min(kv_heads, 4)
    changes = {}
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            inner = value.__class__(**_with_levels({**_chosen(value), **_shrunk(value, width, token_ids)}))
            changes[name] = {**inner.to_dict(), "model_type": inner.model_type}
            for general in ("_name_or_path", "output_attentions"):  # DBRX's parts take nothing that they do not know
                changes[name].pop(general, None)
        elif name in _INITIALISERS and isinstance(value, float):
            changes[name] = math.sqrt(2 / width)
        elif re.search(r"dropout|drop_rate|layerdrop|drop_path", name) and isinstance(value, float):
            changes[name] = 0.0
        elif re.search(r"layer_?scale", name) and isinstance(value, float) and value <= 0.01:
            changes[name] = 0.5  # or the layers would say next to nothing
        elif value is None and name in _UNSET:
            changes[name] = _UNSET[name]
        elif name == "image_size" and isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
            changes[name] = [_SMALL[name]] * 2
        elif isinstance(value, (list, tuple)) and value and name.endswith("_in_channels") and not staged:
            if all(each == fields.get("d_model", fields.get("hidden_size")) for each in value):
                changes[name] = [width] * len(value)
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        else:
            if staged and "proj" not in name and (_WIDTH.search(name) or _HEADS.search(name) or _LAYERS.search(name)):
                continue
            small = _small(name, value, width, heads, kv_heads, token_ids)
            if small is not None and small != value:
                changes[name] = small
    if "qk_rope_head_dim" in fields and fields.get("head_dim") == fields["qk_rope_head_dim"]:
        changes["head_dim"] = _SMALL["qk_rope_head_dim"]  # there it means the rotated part
    changes |= _layer_lists(fields, changes)
    override = OVERRIDES.get(config.model_type, {})
    changes |= _ropes(fields, changes.get("head_dim") or width // heads, override.get("mrope", False))
    return _merge({**override.get("before", {}), **changes}, override.get("config", {}))


def _chosen(config: PretrainedConfig) -> dict:
    """What the whole model chose for its part beyond the part's own defaults, such as a backbone's name and levels."""
    try:
        default = config.__class__(**OVERRIDES.get(config.model_type, {}).get("before", {}))
    except Exception:  # noqa: BLE001 - a part that only the whole can make
        return {}
    own = _fields(default)
    chosen = {
        name: value for name, value in _fields(config).items()
        if not isinstance(value, PretrainedConfig) and (name not in own or own[name] != value)
        and name not in ("stage_names", "transformers_version", "model_type")
    }  # fmt: skip
    levels = getattr(config, "out_indices", None)
    if levels is not None and levels != getattr(default, "out_indices", None):
        chosen["out_indices"] = list(levels)
    return chosen


def _with_levels(changes: dict) -> dict:
    """A backbone of identical layers whose features are taken at some of them: one layer for each."""
    name = next((name for name in _DEPTHS if name in changes), None)
    levels = changes.get("out_indices")
    if name is None or not levels or max(levels) <= changes[name]:
        return changes
    return {**changes, name: len(levels), "out_indices": list(range(1, len(levels) + 1))}


def _small(name: str, value: int, width: int, heads: int, kv_heads: int, token_ids: _TokenIds) -> int | None:
    """The small value of one integer field, or None to leave it."""
    if name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id"):
        # Of generic tokens only those that lie beyond the small vocabulary are moved.
        return None if value < FIRST_SPECIAL else {"pad_token_id": 0, "bos_token_id": 1}.get(name, 2)
    if _TOKEN.search(name):
        return token_ids()
    if name in _KEPT:
        return None
    if name in _SMALL:
        return min(_SMALL[name], value) if value > 0 else None
    if value <= 2:
        return None
    if _HEADS.search(name):
        return heads
    if _KV_HEADS.search(name):
        return kv_heads
    if _HEAD_DIM.search(name):
        return HEAD_DIM
    if _LAYERS.search(name):
        return 2
    if _EXPERTS.search(name):
        return 4
    if _INNER.search(name):
        return 96
    if _WIDTH.search(name):
        return width
    if name.endswith("vocab_size"):
        return min(value, VOCABULARY)
    if re.search(r"max_(2d_)?position_embeddings|^n_positions$|max_target_positions|max_seq_len$", name):
        return min(value, 256)
    return None


def _layer_lists(fields: dict, changes: dict) -> dict:
    """Lists with an entry a layer keep one layer of each kind, at least two layers."""
    depth_name = next((name for name in _DEPTHS if name in fields), None)
    depth = fields.get(depth_name)
    lists = {
        name: value for name, value in fields.items()
        if isinstance(value, (list, tuple)) and len(value) == depth and depth > 3 and not name.endswith("_scales")
    }  # fmt: skip
    if not lists:
        return {}
    kinds: dict[tuple, int] = {}
    for layer, kind in enumerate(zip(*lists.values())):
        kinds.setdefault(tuple(map(str, kind)), layer)
    layers = sorted(kinds.values())[:6]
    if len(layers) == 1:
        layers = [layers[0], layers[0]]
    return {depth_name: len(layers), **{name: [value[i] for i in layers] for name, value in lists.items()}}


def _ropes(fields: dict, head_dim: int, mrope: bool) -> dict:
    """Rotary sections and factors are lists over half a head. `mrope`: their default stands in the model's code."""
    changes = {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name)
        if mrope and name in fields:
            rope = {"rope_type": "default", "rope_theta": 10000.0, **(rope or {}), "mrope_section": [16, 24, 24]}
        if isinstance(rope, dict) and any(isinstance(v, (list, tuple)) for v in _leaves(rope)):
            changes[name] = _small_rope(rope, head_dim)
    return changes


def _leaves(rope: dict) -> list:
    return [leaf for value in rope.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]


def _small_rope(rope: dict, head_dim: int) -> dict:
    half = int(head_dim * rope.get("partial_rotary_factor", 1.0)) // 2
    out = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            out[name] = _small_rope(value, head_dim)
        elif name == "mrope_section":
            third = max(half // 3, 1)
            out[name] = [half - 2 * third, third, third] if len(value) == 3 else value
        elif name in ("short_factor", "long_factor"):
            out[name] = list(value)[:half]
        else:
            out[name] = value
    return out
