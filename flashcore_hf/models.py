"""What is known of single models, and of no others: which masks they take, and which are refused.

What holds for all models stands in `masks`, `attention` and `backend`.
"""

import functools
import inspect
import re
import sys

import torch
from transformers import PreTrainedModel

from .compat import VERSION

NAME = "flashcore"

# Models that hand the mask from the mask function to the attention function as it is, and so get a KeyRange wherever
# they run. Others may read or slice it, and get a RangeMask, or where that cannot be a dense mask. Every entry was run
# beside eager by scripts/sweep_architectures.py, and its code read for uses of the mask in Transformers 4.53 to 5.24.
KEY_RANGE_MODELS = frozenset(
    (
        "afmoe apertus apertus1p5_text arcee aria_text axk1 bailing_hybrid bamba bitnet codegen cohere cohere2 "
        "cohere2_moe cwm dbrx deepseek_v2 deepseek_v3 dory dots1 emu3_text_model ernie4_5 ernie4_5_moe exaone4 "
        "exaone_moe falcon_h1 flex_olmo flint fuyu gemma gemma2 gemma3_text gemma3n_text gemma4_text "
        "gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt_neox gpt_oss gptj granite granite_swa granitemoe "
        "granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax "
        "inkling2_text inkling_text jais2 jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama "
        "longcat_flash mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3 mistral mistral4 mixtral "
        "modernbert-decoder nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe persimmon phi phi3 phimoe "
        "qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 solar_open "
        "stablelm starcoder2 vaultgemma youtu zamba2 zaya"
    ).split()
)

# Models that add the mask to scores, or terms to the mask, in code of their own, and so need eager's additive one.
ADDITIVE_MASK_MODELS = frozenset({"bigbird_pegasus", "deepseek_v4", "informer"})

# Models whose masks have the wrong length (up to 5.22; Informer's between its layers) and only work because eager
# leaves out what hides nothing; None then means that everything is seen. BEiT adds its position bias, one for the whole
# batch, to whatever mask there is: that would make one for each image of it, and round it as a number between 1 and 2.
MAYBE_NO_MASK_MODELS = frozenset({"beit", "bridgetower", "bridgetower_text_model", "informer"})

# Files whose layers are, or by default seem, causal where no mask means that everything is seen; eager does not ask.
NEVER_CAUSAL_FILES = frozenset({"modeling_bridgetower", "modeling_chinese_clip", "modeling_kosmos2"})


# Encoder-decoders whose decoder takes the source's keys and values from its cache after the first token, and knows by
# the 2-D attention_mask which of them exist, so that the cache may have more slots than the source positions. Every
# entry generates beside eager in tests/hf/test_graphs_encoder_decoder.py.
MASKED_SOURCE_MODELS = frozenset("bart blenderbot blenderbot-small marian mbart mt5 pegasus plbart t5 umt5".split())


def masks_its_source(model) -> bool:
    """Whether an encoder-decoder is one of Transformers' own in MASKED_SOURCE_MODELS."""
    config = model.config
    return type(model).__module__.startswith("transformers.") and config.model_type in MASKED_SOURCE_MODELS


# Arguments about images that Transformers hands on to every step of some models, which read them with the prompt alone:
# later steps have their positions already.
_OF_THE_PROMPT = frozenset({"image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids"})
_POSITIONS_FROM_PROMPT = frozenset({"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"})


def unread_in_steps(model_type: str, kwargs: dict) -> frozenset[str]:
    """Arguments of a one-token step that this model's forward does not read, whatever they hold.

    Args:
        model_type: of the text decoder.
    """
    known = model_type in _POSITIONS_FROM_PROMPT and kwargs.get("position_ids") is not None
    return _OF_THE_PROMPT if known else frozenset()


def takes_key_range(config) -> bool:
    """Whether this model hands masks on unread: it is one of Transformers' own, and of a type that we know."""
    return type(config).__module__.startswith("transformers.") and config.model_type in KEY_RANGE_MODELS


def takes_no_mask(config) -> bool:
    """Whether this model's mask function may answer None where nothing is hidden."""
    return getattr(config, "model_type", None) in MAYBE_NO_MASK_MODELS


def wants_additive_mask(config) -> bool:
    """Whether this model does arithmetic with its mask, and so needs eager's."""
    model_type = getattr(config, "model_type", None)
    return model_type in ADDITIVE_MASK_MODELS or (model_type == "gemma4_audio" and _gemma4_audio_adds())


@functools.cache
def _gemma4_audio_adds() -> bool:
    """Whether this Transformers' Gemma 4 hears with an additive mask; 5.17 still negates a bool one."""
    return "finfo(mask_4d.dtype)" in inspect.getsource(sys.modules["transformers.models.gemma4.modeling_gemma4"])


def is_never_causal(module: torch.nn.Module) -> bool:
    """Whether a layer sees everything where there is no mask, whatever it says of itself."""
    return type(module).__module__.rpartition(".")[2] in NEVER_CAUSAL_FILES


# Files of encoder-decoders that add a bias for the distance of two tokens, and zeros where a token reads the source.
_BIASED_FILES = frozenset(f"transformers.models.{name}.modeling_{name}" for name in ("t5", "mt5", "umt5"))


def bias_is_zero(module: torch.nn.Module) -> bool:
    """Whether the position bias of this layer's call is all zeros: in T5's attention to the source, from 5.17 on.

    As a dense mask it would cost a kernel that reads it, in place of one that knows which positions exist.
    """
    return (
        type(module).__module__ in _BIASED_FILES
        and VERSION >= (5, 17)
        and module.is_decoder
        and not module.is_causal
        and not module.has_relative_attention_bias
    )


@functools.cache
def offers_sdpa(layer_class: type) -> bool:
    """Whether the models of the file that defines a layer can be had with `sdpa`.

    Where they cannot, nobody has asked their layers whether they are causal: the decoders of BigBird-Pegasus, NLLB-MoE
    and Pegasus-X say no, and are.
    """
    models = [
        each
        for each in vars(sys.modules[layer_class.__module__]).values()
        if isinstance(each, type) and issubclass(each, PreTrainedModel) and each is not PreTrainedModel
    ]
    return not models or any(model._supports_sdpa for model in models)


@functools.cache
def uses_interface(model_class: type) -> bool:
    """Whether the model's attention goes through Transformers' registry of attention functions.

    Read from the source of the file that defines the class, as Transformers itself does: a file with attention classes
    of its own that never asks the registry runs its own attention whatever the name says, and so does one that chooses
    among classes in a table by the name, but for the classes beside it that say they take any backend and
    FlashAttention (DeepSeek-OCR 2's text model). A file without attention classes (composite models) says nothing, and
    the models inside are asked for themselves.
    """
    module = sys.modules.get(model_class.__module__)
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return False
    if re.search(r"_CLASSES\[\s*config\._attn_implementation", source):
        names = ("_supports_attention_backend", "_supports_flash_attn")
        return "ALL_ATTENTION_FUNCTIONS" in source and all(getattr(model_class, name, False) for name in names)
    has_attention = re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE) is not None
    return not has_attention or "ALL_ATTENTION_FUNCTIONS" in source


def _drops_mask(model_class: type) -> bool:
    """Models that forget their mask, and say it in no other way, where a name has "flash" in it.

    SigLIP's text models before 5.0 forget padding; Pixtral's tower in 5.0 to 5.17 what keeps images apart.
    """
    source = inspect.getsource(sys.modules[model_class.__module__])
    if model_class.__name__ in ("SiglipTextModel", "Siglip2TextModel"):
        return '"flash" in self.config._attn_implementation' in source
    if model_class.__name__ == "PixtralVisionModel":
        return "is_flash_attention_requested(self.config)" in source and "cu_seq_lens_q" not in source
    return False


def _causal_in_eager_alone(model_class: type) -> bool:
    """The Decision Transformer before 5.4: `eager` adds what is causal to the padding mask that it is given."""
    source = inspect.getsource(sys.modules[model_class.__module__])
    return (
        model_class.__name__.startswith("DecisionTransformer")
        and "module.bias[" in source
        and "create_causal_mask" not in source
    )


def refuse_model(model_class: type) -> None:
    """Raise where attention of a class of models would not be right under our name.

    Raises:
        ValueError: says what is supported, and what to do.
    """
    if _causal_in_eager_alone(model_class):
        raise ValueError(
            f'attn_implementation="{NAME}" was asked for {model_class.__name__}, which in this Transformers is causal '
            "under eager alone once it is given a mask. Supported is this model in Transformers 5.4 and newer. Load it "
            'with attn_implementation="eager".'
        )
    if _drops_mask(model_class):
        raise ValueError(
            f'attn_implementation="{NAME}" was asked for {model_class.__name__}, which in this Transformers forgets '
            'its mask for every name with "flash" in it. Supported are newer versions of Transformers, and the other '
            'parts of a model that holds this one: attn_implementation={"text_config": "flashcore"} (or '
            '"vision_config"). Load this one with attn_implementation="sdpa" or "eager".'
        )
    if not uses_interface(model_class):
        raise ValueError(
            f'attn_implementation="{NAME}" was asked for {model_class.__name__}, which does not use Transformers\' '
            "attention interface: its attention would run as it always does, and misread the masks. Supported are "
            "models whose attention is looked up in ALL_ATTENTION_FUNCTIONS (LLaMA, Mistral, Qwen, Gemma and most "
            'newer ones). Load this one with attn_implementation="sdpa" or "eager"; where it is a part of a larger '
            'model, name the part that can: attn_implementation={"text_config": "flashcore"}.'
        )
