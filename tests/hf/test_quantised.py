"""Quantised weights of torchao and bitsandbytes under us: the tokens of eager attention, with graphs and without."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

if Version(transformers.__version__) < Version("5.4"):
    pytest.skip("what these libraries' newest releases need", allow_module_level=True)

import flashcore_hf

from .compare import greedy
from .models import model_pair, prompts

pytestmark = pytest.mark.filterwarnings(
    "ignore::flashcore_kernels.FlashcoreFallbackWarning", "error::flashcore_hf.graphs.FlashcoreGraphWarning"
)


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


def torchao_int4():
    pytest.importorskip("mslk")  # whose kernels it calls
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int4WeightOnlyConfig(group_size=32))


def bitsandbytes_8bit(**options):
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_8bit=True, **options)


def bitsandbytes_8bit_without_outliers():
    return bitsandbytes_8bit(llm_int8_threshold=0.0)


def bitsandbytes_4bit():
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


@pytest.fixture
def load(tmp_path):
    """(eager, flashcore) of one small model, loaded with weights of a kind."""
    _, plain = model_pair("llama", seed=1, hidden_size=128, intermediate_size=128, head_dim=32)
    plain.save_pretrained(tmp_path)

    def loaded(config, device: str = "cpu", dtype=torch.float32):
        return [
            AutoModelForCausalLM.from_pretrained(
                tmp_path, quantization_config=config, attn_implementation=name, dtype=dtype, device_map=device
            ).eval()
            for name in ("eager", "flashcore")
        ]

    loaded.plain = plain
    return loaded


@pytest.mark.parametrize(
    "kind", [torchao_int8, bitsandbytes_8bit_without_outliers, bitsandbytes_4bit], ids=lambda kind: kind.__name__
)
def test_tokens(kind, load, recorded):
    eager, model = load(kind())
    ids, mask = prompts(2, 9, "left")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.int8 or type(weight) is not torch.nn.Parameter  # they are quantised
    expected = greedy(eager, ids, mask, 12)
    assert torch.equal(greedy(model, ids, mask, 12), expected)
    flashcore_hf.graphed(model)
    assert torch.equal(greedy(model, ids, mask, 12), expected)
    assert recorded == {"recorded": 1, "replayed": 11}


def test_outliers_are_looked_for_on_the_host(load, recorded):
    eager, model = load(bitsandbytes_8bit())
    flashcore_hf.graphed(model)
    ids, mask = prompts(2, 9)
    with pytest.warns(flashcore_hf.graphs.FlashcoreGraphWarning, match="llm_int8_threshold=0.0"):
        answer = greedy(model, ids, mask, 6)
    assert torch.equal(answer, greedy(eager, ids, mask, 6)) and not recorded
