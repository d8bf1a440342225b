"""Graphs and PEFT: an adapter that is switched, scaled, merged or removed is not replayed as it was before."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("4.57"):
    pytest.skip("graphed needs 4.57", allow_module_level=True)

import flashcore_hf
from flashcore_hf.model_state import ModelState

from .compare import greedy
from .models import model_pair, prompts

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore::flashcore_kernels.FlashcoreFallbackWarning", "error::flashcore_hf.graphs.FlashcoreGraphWarning"
)


@pytest.fixture
def pair(recorded):
    """(plain, graphed) with two adapters, "default" and "other", that both change what is written."""
    models = []
    for model in (model_pair("llama")[1], model_pair("llama")[1]):
        torch.manual_seed(3)
        config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj", "up_proj"])
        model = peft.get_peft_model(model, config).eval()
        model.add_adapter("other", config)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_" in name:
                    parameter.normal_(0.0, 0.3)
        models.append(model)
    models[1].load_state_dict(models[0].state_dict())
    flashcore_hf.graphed(models[1])
    return models


CHANGES = {
    "another adapter": lambda model: model.set_adapter("other"),
    "both": lambda model: model.base_model.set_adapter(["default", "other"]),
    "none": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "scaled": lambda model: [
        module.set_scale("default", 0.1) for module in model.modules() if hasattr(module, "set_scale")
    ],
    "unloaded": lambda model: model.base_model.unload(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_between_texts(change, pair):
    plain, model = pair
    ids, mask = prompts(2, 9, "left")
    before = greedy(plain, ids, mask, 8)
    assert torch.equal(greedy(model, ids, mask, 8), before)
    for each in pair:
        CHANGES[change](each)
    if change == "unloaded":  # in place; the wrapper is of no use any more
        plain, model = (each.base_model.model for each in pair)
    after = greedy(plain, ids, mask, 8)
    assert torch.equal(greedy(model, ids, mask, 8), after)
    assert change == "merged" or not torch.equal(before, after)


def test_back_and_forth(pair, recorded):
    """Each state is recorded once; merging and unmerging moves weights, which the old graph must not read."""
    plain, model = pair
    ids, mask = prompts(2, 9)
    first = greedy(model, ids, mask, 8)
    for _ in range(2):
        with plain.disable_adapter(), model.disable_adapter():
            bare = greedy(model, ids, mask, 8)
            assert torch.equal(bare, greedy(plain, ids, mask, 8)) and not torch.equal(bare, first)
        assert torch.equal(greedy(model, ids, mask, 8), first)
    assert recorded["recorded"] == 2
    for each in pair:
        each.merge_adapter()
        each.unmerge_adapter()
        with torch.no_grad():
            for module in each.modules():
                if hasattr(module, "get_base_layer"):  # as some of PEFT's layers and backends merge
                    module.get_base_layer().weight.data = module.get_base_layer().weight.data * 0.5
    assert torch.equal(greedy(model, ids, mask, 8), greedy(plain, ids, mask, 8))


def test_amid_a_text(pair):
    plain, model = pair
    ids, mask = prompts(2, 9)
    texts = []
    for each in pair:

        class Switch(transformers.LogitsProcessor):
            def __init__(self, model):
                self.model, self.calls = model, 0

            def __call__(self, input_ids, scores):
                self.calls += 1
                self.model.set_adapter("other" if self.calls % 4 > 1 else "default")
                return scores

        texts.append(greedy(each, ids, mask, 16, logits_processor=[Switch(each)]))
        each.set_adapter("default")
    assert torch.equal(*texts) and not torch.equal(texts[0], greedy(plain, ids, mask, 16))


def test_weights_that_move_are_noticed(recorded):
    """As `model.to()` moves them; a value that changes in place is read anew by every replay anyway."""
    _, plain = model_pair("llama")
    model = flashcore_hf.graphed(copy.deepcopy(plain))
    ids, mask = prompts(2, 9)
    first = greedy(model, ids, mask, 8)
    state = model.forward.graphed_steps.state
    assert isinstance(state, ModelState) and not state.adapters
    number = state.number
    with torch.no_grad():
        for each in (plain, model):
            each.model.layers[0].mlp.up_proj.weight.mul_(-1)
    assert torch.equal(greedy(model, ids, mask, 8), greedy(plain, ids, mask, 8)) and state.number == number
    with torch.no_grad():
        for each in (plain, model):
            weight = each.model.layers[0].mlp.up_proj.weight
            weight.data = -weight.data
    assert torch.equal(greedy(model, ids, mask, 8), first) and state.number != number
    assert recorded["recorded"] == 2


def test_without_that_the_old_adapter_is_replayed(pair, monkeypatch):
    """The negative control."""
    monkeypatch.setattr(ModelState, "current", lambda self: 0)
    _, model = pair
    ids, mask = prompts(2, 9)
    first = greedy(model, ids, mask, 8)
    model.set_adapter("other")
    replayed = greedy(model, ids, mask, 8)
    flashcore_hf.graphed(model, False)
    assert not torch.equal(replayed, greedy(model, ids, mask, 8)) and not torch.equal(replayed, first)
