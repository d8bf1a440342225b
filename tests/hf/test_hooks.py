"""A switch that did not take hold is an error: Transformers renames what the hooks reach for, as 5.24 did."""

import copy
import inspect
import io
import pickle
import types

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    GenerationMixin,
    LlamaForCausalLM,
)

from .compare import cache_of, greedy, named
from .models import model_pair, prompts

if Version(transformers.__version__) < Version("4.57"):
    pytest.skip("FlashCoreCache needs 4.57", allow_module_level=True)

import flashcore_hf
from flashcore_hf import compat, hooks
from flashcore_hf.cache.flashcore_cache import FlashCoreCache

pytestmark = [
    pytest.mark.usefixtures("through_torch"),
    pytest.mark.filterwarnings("ignore::flashcore_hf.graphs.FlashcoreGraphWarning"),
]
SWITCHES = {"cache": flashcore_hf.use_flashcore_cache, "graphs": flashcore_hf.graphed}
both = pytest.mark.parametrize("switch", SWITCHES)


@pytest.fixture
def model():
    return model_pair("llama")[1]


def renamed(function, old: str, new: str):
    """The function, calling a method by another name."""
    plain = inspect.unwrap(function)
    code = plain.__code__
    assert old in code.co_names
    code = code.replace(co_names=tuple(new if name == old else name for name in code.co_names))
    other = types.FunctionType(code, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
    other.__kwdefaults__ = plain.__kwdefaults__
    return torch.no_grad()(other)


class Later(LlamaForCausalLM):
    """LLaMA on a Transformers whose generate() makes its cache in a method of another name."""

    generate = renamed(GenerationMixin.generate, hooks.PREPARE, "_make_cache")

    def _make_cache(self, *args, **kwargs):
        return getattr(GenerationMixin, hooks.PREPARE)(self, *args, **kwargs)


def later(model):
    model.__class__ = Later
    return model


@both
def test_a_method_of_another_name(model, switch):
    ids, mask = prompts(2, 9)
    expected = greedy(model, ids, mask, 4)
    SWITCHES[switch](later(model))
    with pytest.raises(RuntimeError, match="did not take hold: generate\\(\\) did not call _prepare_cache") as caught:
        greedy(model, ids, mask, 4)
    assert transformers.__version__ in str(caught.value) and hooks.SWITCHES[switch].off in str(caught.value)
    SWITCHES[switch](model, False)  # the way out
    assert torch.equal(greedy(model, ids, mask, 4), expected)


@both
def test_no_method_at_all(model, switch, monkeypatch):
    monkeypatch.delattr(GenerationMixin, hooks.PREPARE)
    with pytest.raises(RuntimeError, match=f"not in Transformers {transformers.__version__}"):
        SWITCHES[switch](model)


@both
def test_a_cache_of_another_name(model, switch, monkeypatch):
    """What 5.24 did, seen by a flashcore that knows the older name alone, or the newer alone."""
    other = "past_key_values" if compat.CACHE_NAME == "cache" else "cache"
    monkeypatch.setattr(compat, "CACHE_NAME", other)
    monkeypatch.setattr(compat, "CACHE_NAMES", (other,))
    SWITCHES[switch](model)
    with pytest.raises(RuntimeError, match=f"did not take hold: generate\\(\\) calls its cache '.*, and '{other}' was"):
        greedy(model, *prompts(2, 9), 4)


def test_no_cache_where_one_was_made(model, monkeypatch):
    """It would be somewhere that we do not look."""
    monkeypatch.setattr(compat, "FORWARD_MAKES_CACHE", False)
    monkeypatch.setattr(GenerationMixin, hooks.PREPARE, lambda self, config, model_kwargs, *args: None)
    flashcore_hf.use_flashcore_cache(model)
    with pytest.raises(RuntimeError, match="made no cache"):
        greedy(model, *prompts(2, 9), 4)


def test_a_cache_that_the_forward_does_not_use(model, monkeypatch):
    """A forward that takes another name, and makes a cache of its own."""
    prepare = LlamaForCausalLM.prepare_inputs_for_generation

    def without(self, *args, **kwargs):
        inputs = prepare(self, *args, **kwargs)
        return {**inputs, compat.CACHE_NAME: DynamicCache(), "input_ids": args[0]}

    monkeypatch.setattr(LlamaForCausalLM, "prepare_inputs_for_generation", without)
    flashcore_hf.use_flashcore_cache(model)
    with pytest.raises(RuntimeError, match="did not use the cache that it was given"):
        greedy(model, *prompts(1, 4), 2)


def test_graphs_whose_forward_is_passed_by(model):
    """generate() that calls another forward."""
    flashcore_hf.graphed(model)
    inner = copy.copy(model)
    inner.__dict__ = {name: value for name, value in vars(model).items() if name not in ("forward", "generate")}
    vars(model)["generate"].before = types.MethodType(
        lambda self, *args, **kwargs: (hooks.reached(model, hooks.PREPARE), inner.generate(*args, **kwargs))[1], model
    )
    with pytest.raises(RuntimeError, match="graphed.* did not call forward of this object"):
        greedy(model, *prompts(1, 4), 2)


def test_a_forward_whose_cache_has_another_name(model, monkeypatch):
    """Also in a loop of one's own, and before a step has run without its graph."""
    from flashcore_hf import step

    flashcore_hf.graphed(model)
    monkeypatch.setattr(step, "CACHE_NAMES", ("kv",))
    with pytest.raises(RuntimeError, match="forward\\(\\) got a cache as"), torch.no_grad():
        model(prompts(1, 4)[0], **named(FlashCoreCache(model.config)))


WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "beams": {"num_beams": 2, "num_return_sequences": 2},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "no cache": {"use_cache": False},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "dynamic": {"cache_implementation": "dynamic"},
    "one token": {"max_new_tokens": 1},
    "a loop of one's own": {"custom_generate": lambda model, input_ids, **kwargs: input_ids},
}


@both
@pytest.mark.parametrize("way", [*WAYS, "own cache", "assistant"])
def test_never_falsely(model, switch, way):
    if way == "dynamic" and compat.VERSION < (5, 0):
        pytest.skip("it has no such name yet")
    ids, mask = prompts(1, 9)
    SWITCHES[switch](model)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": 96, **WAYS.get(way, {})}
    if way == "own cache":
        options |= named(DynamicCache(config=model.config))
    if way == "assistant":
        options["assistant_model"] = SWITCHES[switch](model_pair("llama", seed=1)[1])
    assert model.generate(ids, attention_mask=mask, **options).shape[1] >= 9


@both
def test_both_switches_nested_and_in_training_mode(model, switch):
    """generate() within generate(), and layers that take no cache because they are checkpointed."""
    flashcore_hf.use_flashcore_cache(model)
    SWITCHES[switch](model)
    ids, mask = prompts(1, 9)
    inner = []

    def stop(ids, scores, **kwargs):
        if not inner:
            inner.append(None)
            inner[0] = greedy(model, ids[:, :5], mask[:, :5], 2)
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    got = greedy(model, ids, mask, 4, stopping_criteria=[stop])
    assert inner[0].shape == (1, 7) and got.shape == (1, 13)
    model.train().gradient_checkpointing_enable()
    assert greedy(model, ids, mask, 2).shape == (1, 11)


def test_an_encoder_decoder():
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0, eos_token_id=96
    )
    implementation = "flashcore" if compat.VERSION >= (5, 17) else "eager"
    model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()
    ids, mask = prompts(2, 9)
    expected = greedy(model, ids, mask, 4)
    assert torch.equal(greedy(flashcore_hf.use_flashcore_cache(model), ids, mask, 4), expected)


def test_without_generate():
    encoder = model_pair("llama")[1].model
    with pytest.raises(ValueError, match="LlamaModel has none"):
        flashcore_hf.use_flashcore_cache(encoder)


class Wrapper(torch.nn.Module):
    """As PEFT's: what it lacks is looked for in the model within, whose generate() runs."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)


@both
@pytest.mark.parametrize("outside", [True, False], ids=["on the wrapper", "before wrapping"])
def test_a_wrapped_model(model, switch, outside):
    before = set(vars(model))
    wrapped = Wrapper(model)
    assert SWITCHES[switch](wrapped if outside else model) is (wrapped if outside else model)
    answer = wrapped.generate(*prompts(1, 9)[:1], max_new_tokens=2, return_dict_in_generate=True)
    assert type(cache_of(answer)) is FlashCoreCache
    SWITCHES[switch](wrapped, False)
    assert set(vars(model)) == before and "forward" not in vars(wrapped)


def test_every_trace_goes(model):
    before = dict(vars(model))
    for switch in SWITCHES.values():
        switch(model)
    assert inspect.signature(model.generate) == inspect.signature(type(model).generate.__get__(model))
    for switch in SWITCHES.values():
        switch(model, False)
    assert vars(model) == before


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_file])
def test_a_copied_model(model, way):
    """It keeps its switch, which is on the copy: the original's weights are not what runs."""
    flashcore_hf.use_flashcore_cache(model, max_length=50)
    other = way(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    ids, mask = prompts(1, 4)
    answers = [greedy(each, ids, mask, 3, return_dict_in_generate=True) for each in (other, model)]
    assert (answers[0].sequences[:, 4:] == 0).all() and (answers[1].sequences[:, 4:] != 0).any()
    assert [cache_of(answer).layers[0].max_length for answer in answers] == [50, 50]
    flashcore_hf.use_flashcore_cache(other, False)
    assert "generate" not in vars(other) and "generate" in vars(model)


class OneRow(torch.utils.data.Dataset):
    """Carries its model along to a worker."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.tensor(type(vars(self.model)[hooks.PREPARE]).__name__ == "PrepareCache")


def test_a_spawned_worker(model):
    flashcore_hf.use_flashcore_cache(model)
    loader = torch.utils.data.DataLoader(OneRow(model), num_workers=1, multiprocessing_context="spawn")
    assert next(iter(loader)).item()


def test_encoder_decoders_of_older_versions():
    """They keep their cache, and cannot be graphed."""
    if compat.VERSION >= (5, 17):
        pytest.skip("supported")
    config = BartConfig(
        vocab_size=97, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, eos_token_id=None, forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration._from_config(config, attn_implementation="flashcore").eval()
    with pytest.raises(ValueError, match="encoder-decoders from 5.17 on"):
        flashcore_hf.graphed(model)
    assert "generate" not in vars(model)
    ids, mask = prompts(2, 9)
    expected = greedy(model, ids, mask, 4)
    assert torch.equal(greedy(flashcore_hf.use_flashcore_cache(model), ids, mask, 4), expected)
