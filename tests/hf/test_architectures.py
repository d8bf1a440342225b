"""One model of each kind beside eager, and beside itself with the kind's feature taken away, which must show.

The models are built as the sweep over all architectures builds them (scripts/sweep), which runs every class.
"""

import sys
from pathlib import Path

import pytest
import torch
import transformers

from flashcore_hf import backend, compat, models

from .models import skip_without_config

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from sweep import CONTROL, TOLERANCE  # noqa: E402
from sweep.configs import tiny_config  # noqa: E402
from sweep.inputs import padding  # noqa: E402
from sweep.running import accepted_inputs, build, largest_error, run, switch_on, tensors  # noqa: E402


def without(*names: str):
    """The feature goes with its argument."""
    return lambda query, key, mask, kwargs: (mask, {k: v for k, v in kwargs.items() if k not in names})


def causal(query, key, mask, kwargs):
    """Everything becomes causal, also what reads an encoder or an image."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    return torch.ones(num_queries, num_keys).tril(num_keys - num_queries).bool()[None, None], kwargs


def everything(query, key, mask, kwargs):
    """No window, no chunk, no padding."""
    return None, {**kwargs, "is_causal": False, "sliding_window": None}


def sharper(query, key, mask, kwargs):
    """Scores half as large again."""
    return mask, {**kwargs, "scaling": 1.5 * kwargs["scaling"]}


# Kind -> (class, what takes its feature away). Versions that lack a class skip it.
KINDS = {
    "position bias": ("T5ForConditionalGeneration", without("position_bias")),
    "position bias, another family": ("UMT5ForConditionalGeneration", without("position_bias")),
    "scaling of its own": ("WhisperForConditionalGeneration", without("scaling")),
    "cross-attention": ("BartForConditionalGeneration", causal),
    "encoder": ("BertModel", causal),
    "encoder, another family": ("RobertaModel", causal),
    "encoder with a window": ("ModernBertModel", everything),
    "image encoder": ("ViTModel", causal),
    "text and image encoders": ("CLIPModel", everything),
    "text and image encoders, another family": ("SiglipModel", causal),
    "MLA head sizes": ("DeepseekV2ForCausalLM", sharper),
    "sinks": ("GptOssForCausalLM", without("s_aux")),
    "sinks of each query": ("Inkling2ForCausalLM", without("sinks")),
    "softcap": ("Gemma2ForCausalLM", without("softcap")),
    "chunked attention": ("Llama4ForCausalLM", causal),
    "packed images": ("Qwen2VisionTransformerPretrainedModel", without("cu_seq_lens_q", "cu_seq_lens_k")),
    "packed images with a window": ("Qwen2_5_VisionTransformerPretrainedModel", without("cu_seq_lens_q")),
    "chosen keys": ("DeepseekV32ForCausalLM", without("indices")),
    "a mask that is added to": ("DeepseekV4ForCausalLM", causal),
    "a mask that is read": ("DogeForCausalLM", causal),
    "shared keys and values": ("Gemma4ForCausalLM", everything),
    "linear attention beside": ("Qwen3NextForCausalLM", everything),
    "state space beside": ("FalconH1ForCausalLM", everything),
    "queries chosen, and a mask that is added to, or none": ("InformerModel", causal),
    "no mask, and not causal whatever the layer says": ("BridgeTowerModel", causal),
}


@pytest.fixture
def registry(monkeypatch):
    """Puts a function that changes attention's mask and keywords before flashcore's."""

    def install(change):
        function = compat.attention_registry()[backend.NAME]

        def changed(module, query, key, value, attention_mask=None, **kwargs):
            attention_mask, kwargs = change(query, key, attention_mask, kwargs)
            return function(module, query, key, value, attention_mask, **kwargs)

        monkeypatch.setitem(compat.attention_registry(), backend.NAME, changed)

    return install


def pair(class_name: str, **changes):
    """(eager, flashcore, kind of inputs, inputs) of a class, or a skip where this version lacks it."""
    model_class = getattr(transformers, class_name, None)
    if model_class is None:
        from transformers.models import qwen2_5_vl, qwen2_vl  # their towers are not exported

        for package in (qwen2_vl, qwen2_5_vl):
            module = getattr(package, f"modeling_{package.__name__.rpartition('.')[2]}")
            model_class = model_class or getattr(module, class_name, None)
    if model_class is None:
        pytest.skip(f"Transformers {transformers.__version__} has no {class_name}")
    skip_without_config(model_class.config_class)
    config = tiny_config(model_class.config_class, class_name)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    eager = build(model_class, config, "eager")
    try:
        model = build(model_class, config, "flashcore")
    except ValueError as error:
        if "was asked for" not in str(error) and "GPT-OSS model does not" not in str(error):  # the latter is 5.0's
            raise
        pytest.skip(f"refused by Transformers {transformers.__version__}'s source: {class_name}")
    switch_on(eager)
    model.load_state_dict(eager.state_dict())
    refused = []
    kind, inputs = next(accepted_inputs(eager, config, refused), (None, None))
    assert inputs is not None, refused
    return eager, model, kind, inputs


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind, registry):
    class_name, change = KINDS[kind]
    if kind.startswith("packed images") and compat.VERSION < (5, 0):
        pytest.skip("before 5.0 only flash_attention_2 gets them packed; others get one call an image")
    eager, model, kind_of_inputs, inputs = pair(class_name)
    if kind_of_inputs == "text" and "attention_mask" in inputs:
        mask = padding("right")
        inputs = {**inputs, "attention_mask": mask, "input_ids": inputs["input_ids"] * mask}

    def answers(model):
        outputs = tensors(run(model, inputs))
        mask = inputs.get("attention_mask")
        return [t * mask[..., None] if mask is not None and t.shape[:2] == mask.shape and t.dim() == 3 else t
                for t in outputs]  # fmt: skip

    expected = answers(eager)
    assert largest_error(expected, answers(model)) <= TOLERANCE
    registry(change)
    assert largest_error(expected, answers(model)) > CONTROL


def test_gpt_oss_is_not_swapped_for_another_kernel():
    """Transformers replaces any "flash" name by FA3 for models that name compatible implementations."""
    _, model, _, _ = pair("GptOssForCausalLM")
    assert model.config._attn_implementation == backend.NAME


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["bool", "additive"])
def test_a_users_own_mask(dtype):
    """A prefix that sees itself whole, as prefix-LMs do; eager takes the additive form alone."""
    eager, model, _, inputs = pair("LlamaForCausalLM")
    ids = inputs["input_ids"]
    length = ids.shape[1]
    seen = torch.ones(length, length).tril().bool()
    seen[:5, :5] = True
    seen = seen[None, None].expand(len(ids), 1, -1, -1)
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = eager(ids, attention_mask=additive).logits
        got = model(ids, attention_mask=seen if dtype == torch.bool else additive).logits
        control = model(ids).logits
    assert largest_error([expected], [got]) <= TOLERANCE
    assert largest_error([expected], [control]) > CONTROL


@pytest.mark.skipif(not hasattr(compat.masking_utils, "blockwise_overlay"), reason="no block_sequence_ids before 5.17")
def test_image_tokens_see_their_block():
    """Gemma 3: the tokens of one image see each other in both directions (`block_sequence_ids`)."""
    from transformers.masking_utils import create_causal_mask

    eager, model, _, inputs = pair("Gemma3ForCausalLM")
    ids = inputs["input_ids"]
    blocks = torch.full_like(ids, -1)
    blocks[:, 2:6], blocks[:, 8:11] = 0, 1
    for each in (eager, model):
        each.config.layer_types = ["full_attention"] * len(each.config.layer_types)

    def logits(each, blocks):
        embeddings = each.get_input_embeddings()(ids)
        mask = create_causal_mask(
            config=each.config, inputs_embeds=embeddings, attention_mask=None, past_key_values=None,
            position_ids=None, block_sequence_ids=blocks,
        )  # fmt: skip
        masks = {"full_attention": mask, "sliding_attention": mask}
        with torch.no_grad():
            return each(ids, attention_mask=masks).logits

    expected = logits(eager, blocks)
    assert largest_error([expected], [logits(model, blocks)]) <= TOLERANCE
    assert largest_error([expected], [logits(model, None)]) > CONTROL


class TestRefused:
    """Classes that trip over "flash" in the name, or run attention of their own: an error at load with what to do."""

    @pytest.mark.parametrize(
        "class_name",
        ["FalconForCausalLM", "GPTJForCausalLM", "GPTNeoForCausalLM", "BarkSemanticModel", "BloomForCausalLM",
         "GitForCausalLM", "SamModel", "XGLMForCausalLM"],
    )  # fmt: skip
    def test_by_name_with_the_alternative(self, class_name):
        model_class = getattr(transformers, class_name)
        if models.uses_interface(model_class):
            pytest.skip(f"Transformers {transformers.__version__} looks its attention up")
        config = tiny_config(model_class.config_class, class_name)
        with pytest.raises(ValueError, match=f'"flashcore" was asked for {class_name[:3]}.*"sdpa" or "eager"'):
            model_class._from_config(config, attn_implementation="flashcore")

    def test_the_part_that_can_is_named(self):
        """GOT-OCR's vision tower runs its own attention; its language model takes flashcore alone."""
        model_class = getattr(transformers, "GotOcr2ForConditionalGeneration", None)
        if model_class is None:
            pytest.skip("no GOT-OCR in this version")
        config = tiny_config(model_class.config_class)
        with pytest.raises(ValueError, match="text_config"):
            model_class._from_config(config, attn_implementation="flashcore")
        config = tiny_config(model_class.config_class)
        model = model_class._from_config(config, attn_implementation={"text_config": "flashcore"})
        assert model.config.text_config._attn_implementation == "flashcore"
        assert model.config.vision_config._attn_implementation != "flashcore"

    def test_what_is_causal_under_eager_alone(self):
        """The Decision Transformer up to 5.0, once it is given a mask; later ones run."""
        model_class = transformers.DecisionTransformerModel
        config = tiny_config(model_class.config_class)
        if compat.VERSION <= (5, 0):
            with pytest.raises(ValueError, match="causal under eager alone.*5.4 and newer.*eager"):
                model_class._from_config(config, attn_implementation="flashcore")
        elif compat.VERSION >= (5, 4):
            model_class._from_config(config, attn_implementation="flashcore")

    @pytest.mark.parametrize("class_name", ["SiglipTextModel", "PixtralVisionModel"])
    def test_where_a_flash_name_loses_the_mask(self, class_name):
        """SigLIP's text model forgot padding in silence up to 4.57, Pixtral's tower mixed images from 5.0 to 5.17."""
        model_class = getattr(transformers, class_name)
        config = tiny_config(model_class.config_class)
        versions = {"SiglipTextModel": ((4, 54), (4, 57)), "PixtralVisionModel": ((5, 0), (5, 17))}
        first, last = versions[class_name]
        forgets = first <= compat.VERSION <= last
        if forgets:
            with pytest.raises(ValueError, match="forgets its mask.*newer versions"):
                model_class._from_config(config, attn_implementation="flashcore")
        elif not (5, 17) < compat.VERSION < (5, 23):  # in between nobody looked
            model = model_class._from_config(config, attn_implementation="flashcore")
            assert model.config._attn_implementation == "flashcore"

    def test_prefix_lm_of_hrm(self):
        model_class = getattr(transformers, "HrmTextForCausalLM", None)
        if model_class is None:
            pytest.skip("no HRM in this version")
        with pytest.raises(ValueError, match="prefix_lm=True.*sdpa"):
            model_class._from_config(tiny_config(model_class.config_class), attn_implementation="flashcore")
