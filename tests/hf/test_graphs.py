"""graphed(): when steps are recorded, what is replayed, and when not. A tape stands in for the CUDA graph."""

import copy
import gc
import warnings

import pytest
import torch
import transformers
from flashcore_kernels import op
from packaging.version import Version
from transformers import AutoModelForCausalLM, DynamicCache

from .compare import cache_of, greedy, named
from .models import VOCABULARY, model_pair, prompts, tiny_config

if Version(transformers.__version__) < Version("4.57"):
    pytest.skip("graphed needs 4.57", allow_module_level=True)

import flashcore_hf
from flashcore_hf import graphs
from flashcore_hf.cache.flashcore_cache import FlashCoreCache
from flashcore_hf.cache.layer import CROP_TAKES_LENGTH

from . import tape

pytestmark = pytest.mark.filterwarnings(
    "ignore::flashcore_kernels.FlashcoreFallbackWarning", "error::flashcore_hf.graphs.FlashcoreGraphWarning"
)


@pytest.fixture(params=["llama", "mistral", "gemma3_text"])
def pair(request, recorded):
    """(plain, graphed), both under flashcore."""
    return graphed_pair(request.param)


def graphed_pair(model_type: str, **changes):
    _, plain = model_pair(model_type, **changes)
    return plain, flashcore_hf.graphed(copy.deepcopy(plain))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_oss", "qwen3_moe"])
def test_the_prompts_kernel_is_compiled_from_the_beginning(model_type, recorded, monkeypatch):
    """What `graphed` tells of a prompt's kernel is what the prompt asks for."""
    if model_type == "gpt_oss" and Version(transformers.__version__) < Version("5.4"):
        pytest.skip("5.0 refuses it under any other backend whose name has flash in it")
    begun, asked = [], []
    monkeypatch.setattr(graphs, "begin_compiling", lambda device, prompt: begun.append(prompt))
    check = op.check_problem

    def noted(inputs, *options, **named):
        asked.append((check(inputs, *options, **named), inputs.sinks))
        return asked[-1][0]

    monkeypatch.setattr(op, "check_problem", noted)
    _, model = graphed_pair(model_type)
    greedy(model, *prompts(2, 20, "left"), 1)
    problem, sinks = asked[0]
    assert problem.range_layout == "sequence" and problem.num_queries == 20
    told = graphs.Prompt(
        problem.head_dim,
        problem.value_dim,
        problem.dtype,
        problem.softcap > 0.0,
        None if sinks is None else sinks.dtype,
    )
    assert begun == [told]


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_nothing_is_told_of_what_is_not_known(model_type, recorded, monkeypatch):
    """Of dense masks, and of heads that some versions pad."""
    begun = []
    monkeypatch.setattr(graphs, "begin_compiling", lambda device, prompt: begun.append(prompt))
    if model_type == "llama":
        monkeypatch.setattr(graphs, "takes_key_range", lambda config: False)
    graphed_pair(model_type)
    assert begun == [None]


@pytest.mark.parametrize("padding", [None, "left"])
def test_tokens(pair, padding, recorded):
    """Several texts in a row, of two batch sizes: a recording each, which later texts use again."""
    plain, model = pair
    for batch_size, length in ((3, 9), (2, 5), (3, 20), (2, 12)):
        ids, mask = prompts(batch_size, length, padding, seed=length)
        assert torch.equal(greedy(model, ids, mask, 12), greedy(plain, ids, mask, 12))
    assert recorded == {"recorded": 2, "replayed": 4 * 11}


def test_holes_in_the_mask(recorded):
    """The mask is read anew at each step, wherever it hides tokens."""
    plain, model = graphed_pair("llama")
    ids, mask = prompts(2, 12)
    mask[0, 3:6] = 0
    got, expected = greedy(model, ids, mask, 6), greedy(plain, ids, mask, 6)
    assert torch.equal(got, expected) and recorded["replayed"] == 5
    assert not torch.equal(greedy(plain, ids, torch.ones_like(mask), 6), expected)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_buffers_double(model_type, recorded, monkeypatch):
    """Growth moves the buffers, so the next step is recorded anew; a sliding layer drops old tokens in place."""
    monkeypatch.setattr("flashcore_hf.cache.layer.FIRST_CAPACITY", 16)
    monkeypatch.setattr("flashcore_hf.cache.layer.MARGIN", 3)
    plain, model = graphed_pair(model_type)
    ids, mask = prompts(2, 9, "left")
    assert torch.equal(greedy(model, ids, mask, 60), greedy(plain, ids, mask, 60))
    assert recorded["recorded"] == (4 if model_type == "llama" else 3)  # 16, 32, 64, 128 slots
    before = recorded["recorded"]
    ids, mask = prompts(2, 20, "left")
    assert torch.equal(greedy(model, ids, mask, 40), greedy(plain, ids, mask, 40))
    assert recorded["recorded"] == before


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"num_beams": 3, "num_return_sequences": 2},
        {"repetition_penalty": 1.3},
        {"eos_token_id": 5},
    ],
    ids=str,
)
def test_ways_of_decoding(pair, options, recorded):
    plain, model = pair
    ids, mask = prompts(2, 9, "left")
    answers = []
    for each in (plain, model):
        torch.manual_seed(1)
        answers.append(greedy(each, ids, mask, 12, **options))
    assert torch.equal(*answers)
    assert recorded["recorded"] == 1 and recorded["replayed"] > 3


def test_prompt_lookup_takes_tokens_back(pair, recorded):
    """The candidates are replayed too, as many as often come, and buffers that double in between are noticed."""
    plain, model = pair
    ids = torch.arange(3, 9).repeat(3)[None]
    options = {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCABULARY - 1}
    mask = torch.ones_like(ids)
    # Up to 5.4, sliding layers of a DynamicCache cannot be cropped.
    expected = greedy(plain, ids, mask, 60, **named(DynamicCache()), **options)
    assert torch.equal(greedy(model, ids, mask, 60, **options), expected)
    if Version(transformers.__version__) < Version("5.17"):
        return  # whose cache of assisted decoding learns its layers as it goes, and is not used again
    several = [key for _, graphs in model.forward.graphed_steps.stock.values() for key in graphs if "calls of" in key]
    assert several and recorded["replayed"] > 10


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_several_tokens_at_once(model_type, recorded, monkeypatch):
    """Candidates that are half taken back, over and over: logits of each, past growing buffers and a window."""
    monkeypatch.setattr("flashcore_hf.cache.layer.FIRST_CAPACITY", 16)
    plain, model = graphed_pair(model_type)
    ids, _ = prompts(1, 80)
    answers = []
    for each in (plain, model):
        cache, logits = FlashCoreCache(each.config), []
        with torch.no_grad():
            each(input_ids=ids[:, :5], **named(cache), use_cache=True)
            length = 5
            while length < 70:
                out = each(
                    input_ids=ids[:, length : length + 4], **named(cache), use_cache=True,
                    attention_mask=torch.ones(1, length + 4, dtype=torch.long),
                    position_ids=torch.arange(length, length + 4)[None],
                    cache_position=torch.arange(length, length + 4),
                )  # fmt: skip
                logits.append(out.logits)
                cache.crop(length + 2 if CROP_TAKES_LENGTH else -2)
                length += 2
        answers.append(torch.stack(logits))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
    assert recorded["replayed"] > 25
    assert 2 <= recorded["recorded"] <= 4


def test_a_turn_of_few_tokens_is_not_recorded(recorded):
    plain, model = graphed_pair("llama")
    ids, mask = prompts(1, 12)
    answers = []
    for each in (plain, model):
        cache = FlashCoreCache(each.config)
        with torch.no_grad():
            each(input_ids=ids[:, :5], **named(cache))
            answers.append(each(input_ids=ids[:, 5:], attention_mask=mask, **named(cache)).logits)
    assert torch.equal(*answers) and not recorded


def test_logits_and_hidden_states_are_not_overwritten(recorded):
    plain, model = graphed_pair("llama")
    ids, mask = prompts(2, 9)
    options = {"output_logits": True, "output_hidden_states": True, "return_dict_in_generate": True}
    got, expected = (greedy(each, ids, mask, 6, **options) for each in (model, plain))
    assert recorded["replayed"] == 5
    for a, b in zip(got.logits, expected.logits):
        torch.testing.assert_close(a, b)
    for a, b in zip(got.hidden_states, expected.hidden_states):
        for each, wanted in zip(a, b):
            torch.testing.assert_close(each, wanted)


def test_a_cache_that_someone_keeps_is_left_alone(recorded):
    """Its buffers are used again when it is garbage, and not before."""
    plain, model = graphed_pair("llama")
    ids, mask = prompts(2, 9)
    first = greedy(model, ids, mask, 4, return_dict_in_generate=True)
    keys = cache_of(first).layers[0].keys.clone()
    address = cache_of(first).layers[0].key_buffer.data_ptr()
    greedy(model, prompts(2, 9, seed=5)[0], mask, 4)
    assert torch.equal(cache_of(first).layers[0].keys, keys) and recorded["recorded"] == 2
    # It can be gone on with.
    more = torch.cat([first.sequences, ids[:, :3]], dim=1)
    got = greedy(model, more, torch.ones_like(more), 4, **named(cache_of(first)))
    assert torch.equal(got, greedy(plain, more, torch.ones_like(more), 4))
    del first
    gc.collect()
    last = greedy(model, ids, mask, 4, return_dict_in_generate=True)
    assert cache_of(last).layers[0].key_buffer.data_ptr() == address and recorded["recorded"] == 2


def test_a_loop_of_ones_own(recorded):
    plain, model = graphed_pair("mistral")
    ids, mask = prompts(2, 9, "left")
    answers = []
    for each, cache in ((plain, DynamicCache(config=plain.config)), (model, FlashCoreCache(model.config))):
        logits = []
        with torch.no_grad():
            step = ids
            for length in range(9, 14):
                seen = torch.nn.functional.pad(mask, (0, length - 9), value=1)
                position = seen.cumsum(-1)[:, -step.shape[1] :] - 1
                out = each(
                    input_ids=step, attention_mask=seen, position_ids=position.clamp(min=0), **named(cache),
                    cache_position=torch.arange(length - step.shape[1], length), use_cache=True,
                )  # fmt: skip
                logits.append(out.logits[:, -1])
                step = out.logits[:, -1:].argmax(-1)
        answers.append(torch.stack(logits))
    torch.testing.assert_close(*answers)
    assert recorded == {"recorded": 1, "replayed": 4}


def test_inference_mode_and_no_grad_share_a_recording(recorded):
    plain, model = graphed_pair("llama")
    ids, mask = prompts(2, 9)
    expected = greedy(plain, ids, mask, 5)
    with torch.inference_mode():
        assert torch.equal(greedy(model, ids, mask, 5), expected)
    assert torch.equal(greedy(model, ids, mask, 5), expected)
    assert recorded["recorded"] == 1


def test_fp8_cache_under_graphs(recorded):
    """The scales of a new text are put where the recording reads them."""
    plain, model = graphed_pair("llama")
    flashcore_hf.use_flashcore_cache(plain, dtype=torch.float8_e4m3fn)
    flashcore_hf.graphed(model, False)
    flashcore_hf.use_flashcore_cache(model, dtype=torch.float8_e4m3fn)
    flashcore_hf.graphed(model)
    for seed in (1, 2):
        ids, mask = prompts(2, 9, "left", seed=seed)
        assert torch.equal(greedy(model, ids, mask, 8), greedy(plain, ids, mask, 8))
    assert recorded == {"recorded": 1, "replayed": 14}


def test_restore(recorded):
    _, model = model_pair("llama")
    before = {name for name in vars(model) if name in ("forward", "_prepare_cache_for_generation")}
    flashcore_hf.use_flashcore_cache(model)
    forward = model.forward
    assert flashcore_hf.graphed(model) is model and flashcore_hf.graphed(model) is model
    assert model.forward is not forward
    flashcore_hf.graphed(model, False)
    flashcore_hf.graphed(model, False)
    ids, mask = prompts(2, 9)
    answer = greedy(model, ids, mask, 3, return_dict_in_generate=True)
    assert type(cache_of(answer)) is FlashCoreCache and not recorded
    flashcore_hf.use_flashcore_cache(model, False)
    assert {name for name in vars(model) if name in ("forward", "_prepare_cache_for_generation")} == before == set()
    assert model.forward == forward


def test_a_copy_would_run_the_original(recorded):
    """So it is refused; without graphs the model can be copied."""
    _, model = graphed_pair("llama")
    with pytest.raises(TypeError, match="graphed\\(model, False\\)"):
        copy.deepcopy(model)
    flashcore_hf.graphed(model, False)
    flashcore_hf.use_flashcore_cache(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    ids, mask = prompts(1, 4)
    assert (greedy(other, ids, mask, 3)[:, 4:] == 0).all() and (greedy(model, ids, mask, 3)[:, 4:] != 0).any()


@pytest.mark.parametrize("first", ["cache", "graphs"])
def test_an_fp8_cache_whichever_line_comes_first(first, recorded):
    _, model = model_pair("llama")
    if first == "graphs":
        flashcore_hf.graphed(model)
    flashcore_hf.use_flashcore_cache(model, dtype=torch.float8_e4m3fn)
    flashcore_hf.graphed(model)
    answer = greedy(model, *prompts(1, 9), 4, return_dict_in_generate=True)
    assert cache_of(answer).layers[0].key_buffer.dtype == torch.float8_e4m3fn and recorded["replayed"] == 3


def warned(model, ids, mask, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            greedy(model, ids, mask, 4, **options)
    return [str(each.message) for each in caught if each.category is graphs.FlashcoreGraphWarning]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache": DynamicCache}, "is a DynamicCache"),
        ({"cache_implementation": "static", "disable_compile": True}, "is a StaticCache"),
    ],
    ids=["dynamic", "static"],
)
def test_another_cache_runs_as_ever(options, reason, recorded, monkeypatch):
    plain, model = graphed_pair("llama")
    ids, mask = prompts(2, 9)
    if "cache" in options:
        caches = [DynamicCache(), DynamicCache()]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answers = [greedy(model, ids, mask, 4, **named(cache)) for cache in caches]
        told = [str(each.message) for each in caught if each.category is graphs.FlashcoreGraphWarning]
        assert torch.equal(answers[0], greedy(plain, ids, mask, 4))
    else:
        told = warned(model, ids, mask, **options)
    assert len(told) == 1 and reason in told[0]
    assert not recorded
    monkeypatch.setenv("FLASHCORE_STRICT", "1")
    with pytest.raises(NotImplementedError, match="FLASHCORE_STRICT"):
        model.forward.graphed_steps.tell("some reason")


def test_a_cpu_says_so_once():
    _, model = model_pair("llama")
    flashcore_hf.graphed(model)
    ids, mask = prompts(1, 4)
    told = warned(model, ids, mask)
    assert len(told) == 1 and "the model is on 'cpu'" in told[0]


def test_a_forward_that_reads_on_the_host_is_not_recorded(recorded):
    """It fails once while recording, and runs as ever; the cache has not been harmed."""
    plain, model = graphed_pair("llama")
    inner = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: inner(x) if x.abs().max().item() >= 0 else x
    ids, mask = prompts(2, 9, "left")
    told = warned(model, ids, mask)
    assert len(told) == 1 and "recording failed (RuntimeError: operation not permitted" in told[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(greedy(model, ids, mask, 8), greedy(plain, ids, mask, 8))
    assert recorded["replayed"] == 0


def test_refusals():
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation="sdpa")
    with pytest.raises(ValueError, match="attn_implementation='flashcore'"):
        flashcore_hf.graphed(model)


def test_the_tape_is_a_graph():
    """What Python decided stays decided; what tensors hold does not."""
    x, y, calls = torch.zeros(3), torch.zeros(3), [1]

    def step():
        y.copy_(x * 2 + calls[0])
        return y + 1

    replay, output = tape.record(step, None, {})
    calls[0] = 100
    x.fill_(5.0)
    replay()
    assert torch.equal(y, torch.full((3,), 11.0)) and torch.equal(output, y + 1)
    with pytest.raises(RuntimeError, match="capturing"):
        tape.record(lambda: x.sum().item(), None, {})
