"""Which keywords of a layer's call attention may leave unread, and which it must not.

Whatever a caller hands to a model travels through Transformers' layers to the attention function. Most of it is for
others. What is not known to be so may change the answer, and is an error.
"""

import torch

# Known to be for others, whatever they hold.
_FOR_OTHERS = frozenset(
    # Positions are in query and key already, and which keys exist is in the mask.
    "position_ids cache_position position_embeddings token_type_ids mm_token_type_ids layer_idx past_key_values "
    "past_key_value cache "
    # What the model is asked to return.
    "use_cache output_hidden_states output_router_logits return_dict return_loss logits_to_keep num_logits_to_keep "
    # Ours is deterministic always, and finds the longest document by itself. The bounds of packed documents are
    # heeded; which document a token belongs to says the same once more.
    "deterministic max_length_q max_length_k max_seqlen max_seqlen_q max_seqlen_k seq_idx "
    # Losses: Trainer's and Transformers' own, TRL's, Liger's.
    "labels shift_labels num_items_in_batch ignore_index vocab_size loss_weights label_smoothing fused_lm_head "
    "completion_mask assistant_masks loss_mask skip_logits return_token_accuracy use_token_scaling accum_dtype "
    # PEFT's choice of adapters, which its layers have read.
    "adapter_names alora_offsets task_ids "
    # Serving: which logits are wanted, and how they are processed.
    "logits_indices logits_processor_args "
    # Tuning of another backend's kernels, and which of them.
    "kernel_options target_dtype "
    # Inputs, of which the hidden states are made already, and what tokenizers return beside them.
    "input_ids inputs_embeds encoder_hidden_states encoder_attention_mask special_tokens_mask offset_mapping length "
    "num_truncated_tokens overflow_to_sample_mapping pixel_values pixel_values_videos pixel_attention_mask "
    "image_sizes image_position_ids image_grid_thw video_grid_thw grid_thw spatial_shapes second_per_grid_ts "
    "video_second_per_grid input_features feature_attention_mask audio_feature_lengths use_audio_in_video".split()
)

# Continuous batching's: they say where keys and values are kept. Attention reads them where `serving` has taken a cache
# over, and refuses them else.
PAGED = frozenset("read_index write_index block_table page_table k_cache v_cache cache_seqlens".split())

# What other backends' functions take and what changes the answer.
_OF_ATTENTION = PAGED | frozenset(
    "attn_mask attn_bias key_padding_mask block_mask score_mask score_mod mask_mod alibi alibi_slopes learnable_sink "
    "window_size attention_chunk use_top_left_mask softmax_scale scale dropout_p seqused_q seqused_k cu_seqlens "
    "cu_seqlens_q cu_seqlens_k cumulative_seqlens_q cumulative_seqlens_k rotary_cos rotary_sin q_descale k_descale "
    "v_descale".split()
)

# What attention reads itself: the parameters of `attention.flashcore_attention`.
READ = frozenset(
    "module query key value attention_mask scaling dropout is_causal sliding_window softcap s_aux sinks position_bias "
    "indices block_indices cu_seq_lens_q cu_seq_lens_k head_mask output_attentions flashcore_pages".split()
)

_passing = set(_FOR_OTHERS)


def allow_argument(name: str) -> None:
    """Let a keyword that flashcore does not know pass unread through attention, in every model of this process.

    For what your own model or trainer sends through Transformers' layers for others to read. Allowing a name again
    changes nothing; there is no way back but a new process.

    Args:
        name: the keyword, as the error about it spells it.

    Raises:
        ValueError: attention reads this keyword, or it changes the answer in backends that do. Ignoring it would be
            wrong.
        TypeError: `name` is not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"allow_argument takes the name of one keyword, and got a {type(name).__name__}")
    if name in READ:
        raise ValueError(
            f"allow_argument('{name}') was asked for, and flashcore reads '{name}' itself: there is nothing to allow"
        )
    if name in _OF_ATTENTION:
        raise ValueError(
            f"allow_argument('{name}') was asked for, and '{name}' changes what attention computes: it cannot be "
            "ignored. Load the model with attn_implementation='eager' or 'sdpa', or leave it out"
        )
    _passing.add(name)


def passing_arguments() -> frozenset[str]:
    """The keywords that pass unread, those of `allow_argument` included."""
    return frozenset(_passing)


def refuse_unknown(kwargs: dict) -> None:
    """Raise for a keyword that may change the answer, unless it is switched off (None or False).

    Raises:
        NotImplementedError: the message names the keyword, what it holds, and the way out.
    """
    for name, argument in kwargs.items():
        if argument is None or argument is False:
            continue
        if name not in _passing:
            raise NotImplementedError(_refusal(name, argument))
        if name == "cache" and type(argument).__name__ == "PagedAttentionCache":
            raise NotImplementedError(_refusal(name, argument))


def _refusal(name: str, argument) -> str:
    what = f"flashcore got the attention argument '{name}' ({describe(argument)})"
    if name in PAGED or name == "cache":
        return (
            f"{what}, which is one of continuous batching's, from a cache that flashcore has not taken over: it knows "
            "the one of model.generate_batch() and model.init_continuous_batching() alone. Call "
            "model.set_attn_implementation('sdpa') before."
        )
    if name in _OF_ATTENTION:
        return (
            f"{what}, which changes what attention computes and is not supported. Load this model with "
            "attn_implementation='eager' or 'sdpa'."
        )
    return (
        f"{what}, which it does not know and would have to ignore. Load this model with attn_implementation='eager' "
        f"or 'sdpa'; or, if attention need not heed it, call flashcore_hf.allow_argument(\"{name}\") once."
    )


def describe(argument) -> str:
    """What an argument is, in a few words: a tensor by shape and dtype, a container by its type and length."""
    if isinstance(argument, torch.Tensor):
        return f"a tensor of shape {list(argument.shape)}, {str(argument.dtype).removeprefix('torch.')}"
    if isinstance(argument, (bool, int, float)):
        return repr(argument)
    kind = type(argument).__name__
    if isinstance(argument, str):
        return f"{argument!r}" if len(argument) <= 40 else f"a str of {len(argument)} characters"
    if isinstance(argument, (list, tuple, set, frozenset, dict)):
        return f"a {kind} of {len(argument)}"
    return f"a {kind}"
