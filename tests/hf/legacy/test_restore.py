"""Replacing changes one instance; restoring gives it back bit for bit."""

import copy
import pickle

import pytest
import torch
import transformers
from flashcore_kernels import path_counts
from transformers import AutoModelForCausalLM

from flashcore_hf import compat
from flashcore_hf.legacy import helper as legacy
from flashcore_hf.legacy.classes import is_stand_in
from flashcore_hf.legacy.helper import attention_replaced, replace_attention_with_flashcore, restore_attention

from ..compare import TOLERANCE, logit_error
from ..models import prompts, tiny_config

pytestmark = pytest.mark.usefixtures("through_torch")
OLD = not compat.HAS_INTERFACE
every_model = pytest.mark.parametrize("model_type", legacy.MODEL_TYPES)


def loaded(model_type: str = "llama", implementation: str = "sdpa"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(model_type), attn_implementation=implementation).eval()


def state(model) -> list:
    """All there is to a model, in a form that can be compared: classes, attributes, configurations, tensors."""
    everything = [model.config.to_dict(), model.config._attn_implementation, model.generation_config.to_dict()]
    for name, module in model.named_modules():
        everything.append((name, type(module), repr(module)))
        for key, attribute in vars(module).items():
            if key in ("_parameters", "_buffers"):
                attribute = {
                    k: (id(t), None if t is None else t.detach().numpy().tobytes()) for k, t in attribute.items()
                }
            elif key == "_modules":
                attribute = {k: id(m) for k, m in attribute.items()}
            elif not isinstance(attribute, (int, float, str, dict, set, type(None))):
                attribute = id(attribute)
            everything.append((name, key, attribute))
    return everything


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids, mask = prompts(2, 9, "left")
    return model(ids, attention_mask=mask).logits


def replaced(model) -> bool:
    """Whether the model's attention goes through flashcore, by what serves a call."""
    path_counts.clear()
    logits(model)
    return path_counts.total() == 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@every_model
def test_restored_model_is_the_model(model_type, implementation):
    model = loaded(model_type, implementation)
    before, answer = state(model), logits(model)
    assert replace_attention_with_flashcore(model) is model
    assert state(model) != before and replaced(model)
    once = state(model)
    replace_attention_with_flashcore(model)
    assert state(model) == once
    for _ in range(2):
        assert restore_attention(model) is model
        assert state(model) == before
    assert torch.equal(logits(model), answer) and not replaced(model)


@every_model
def test_save_and_reload(model_type, tmp_path):
    """The same files before, while and after; and what is loaded from them is a plain model."""
    model = loaded(model_type)
    folders = [tmp_path / name for name in ("before", "while", "after")]
    model.save_pretrained(folders[0])
    replace_attention_with_flashcore(model).save_pretrained(folders[1])
    restore_attention(model).save_pretrained(folders[2])
    for folder in folders[1:]:
        assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in folders[0].iterdir())
        for file in folders[0].iterdir():
            assert (folder / file.name).read_bytes() == file.read_bytes(), file.name
    again = AutoModelForCausalLM.from_pretrained(folders[2], attn_implementation="sdpa").eval()
    assert not replaced(again) and torch.equal(logits(again), logits(model))


@pytest.mark.skipif(not OLD, reason="set_attn_implementation changes the configuration, shared or not")
@every_model
def test_nothing_but_the_instance_changes(model_type):
    """Not another model made of the same configuration object, nor Transformers' classes, nor the next model."""
    modeling = getattr(transformers.models, model_type)
    modeling = getattr(modeling, f"modeling_{model_type}")
    classes = {name: dict(vars(kind)) for name, kind in vars(modeling).items() if isinstance(kind, type)}
    functions = dict(vars(modeling))
    config = tiny_config(model_type)
    one, other = (getattr(modeling, f"{model_type.capitalize()}ForCausalLM")(config).eval() for _ in range(2))
    before = state(other)
    replace_attention_with_flashcore(one)
    assert replaced(one) and not replaced(other) and state(other) == before
    assert not replaced(loaded(model_type))
    assert vars(modeling) == functions
    assert {name: dict(vars(kind)) for name, kind in vars(modeling).items() if isinstance(kind, type)} == classes
    replace_attention_with_flashcore(other)
    restore_attention(one)
    assert replaced(other) and not replaced(one)


def test_context_manager():
    model = loaded()
    before = state(model)
    with attention_replaced(model) as inside:
        assert inside is model and replaced(model)
        with attention_replaced(model):
            assert replaced(model)
        assert replaced(model)
    assert state(model) == before
    with pytest.raises(KeyError), attention_replaced(model):
        raise KeyError
    assert state(model) == before
    replace_attention_with_flashcore(model)
    with attention_replaced(model):
        pass
    assert replaced(model)


def test_a_model_that_was_not_replaced():
    model = loaded()
    before = state(model)
    assert restore_attention(model) is model and state(model) == before


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["", "pickled"]
)
@every_model
def test_copies(model_type, copied):
    """A copy of a replaced model is replaced, and restoring one of the two leaves the other."""
    model = replace_attention_with_flashcore(loaded(model_type))
    answer = logits(model)
    twin = copied(model)
    restore_attention(model)
    assert replaced(twin) and not replaced(model) and torch.equal(logits(twin), answer)
    restore_attention(twin)
    assert not replaced(twin)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    attention = twin.model.layers[0].self_attn
    assert attention.config is twin.model.config


@every_model
def test_a_part_and_other_heads(model_type):
    """The decoder alone, and a model inside another module."""
    eager, decoder = loaded(model_type, "eager").model, loaded(model_type).model
    replace_attention_with_flashcore(decoder)
    ids, mask = prompts(2, 9, "left")
    with torch.no_grad():
        got, expected = (each(ids, attention_mask=mask).last_hidden_state for each in (decoder, eager))
    assert ((got - expected).abs() * mask[..., None]).max() < TOLERANCE * expected.abs().max()
    assert type(decoder).__name__ == type(eager).__name__
    model = loaded(model_type)
    replace_attention_with_flashcore(torch.nn.ModuleDict({"inner": model}))
    assert replaced(model)


@pytest.mark.parametrize("hooks", ["before", "after"])
@every_model
def test_hooks_of_accelerate(model_type, hooks):
    """They keep a forward on each module; a class that is put beneath them must still be the one that runs."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    eager, model = loaded(model_type, "eager"), loaded(model_type)
    answer = logits(model)
    if hooks == "after":
        replace_attention_with_flashcore(model)
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    if hooks == "before":
        replace_attention_with_flashcore(model)
    ids, mask = prompts(2, 9, "left")
    assert replaced(model) and logit_error(eager, model, ids, mask) < TOLERANCE
    restore_attention(model)
    assert not replaced(model) and torch.equal(logits(model), answer)
    remove_hook_from_module(model, recurse=True)
    assert not replaced(model) and torch.equal(logits(model), answer)
    assert not any(map(is_stand_in, model.modules()))


@pytest.mark.skipif(OLD, reason="this Transformers has no attention interface")
class TestInterface:
    def test_sets_and_restores_the_implementation(self):
        for implementation in ("eager", "sdpa"):
            model = loaded("llama", implementation)
            replace_attention_with_flashcore(model)
            assert model.config._attn_implementation == "flashcore" and not any(map(is_stand_in, model.modules()))
            restore_attention(model)
            assert model.config._attn_implementation == implementation

    def test_loaded_with_flashcore(self):
        """There is nothing to replace, so there is nothing to restore."""
        model = loaded("llama", "flashcore")
        before = state(model)
        replace_attention_with_flashcore(model)
        restore_attention(model)
        assert state(model) == before and replaced(model)

    def test_each_part_gets_its_own_back(self):
        from ..test_backend import llava_config

        wanted = {"text_config": "sdpa", "vision_config": "eager"}
        model = transformers.LlavaForConditionalGeneration._from_config(llava_config(), attn_implementation=wanted)
        parts = [part for part in model.modules() if isinstance(part, transformers.PreTrainedModel)]
        before = [part.config._attn_implementation for part in parts]
        assert {"sdpa", "eager"} <= set(before)
        replace_attention_with_flashcore(model)
        assert {part.config._attn_implementation for part in parts} == {"flashcore"}
        restore_attention(model)
        assert [part.config._attn_implementation for part in parts] == before
