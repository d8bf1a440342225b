"""graphed() with real CUDA graphs, on tiny models in fp32: the tokens of the plain model."""

import copy
import time
import warnings

import pytest
import torch
from transformers import DynamicCache

import flashcore_hf
from flashcore_hf import graphs

from ..hf.compare import cache_of, greedy, named
from ..hf.models import model_pair, prompts

pytestmark = pytest.mark.filterwarnings("error::flashcore_hf.graphs.FlashcoreGraphWarning")


@pytest.fixture
def recordings(monkeypatch):
    """Sequence lengths at which a step was recorded."""
    lengths, original = [], graphs.DecodeGraph.__init__

    def noted(self, forward, step, *rest):
        lengths.append(step.cache.layers[0].length)
        original(self, forward, step, *rest)

    monkeypatch.setattr(graphs.DecodeGraph, "__init__", noted)
    return lengths


def graphed_pair(model_type: str):
    _, plain = model_pair(model_type)
    plain = plain.cuda()
    return plain, flashcore_hf.graphed(copy.deepcopy(plain))


def cuda_prompts(*args, **kwargs):
    return tuple(tensor.cuda() for tensor in prompts(*args, **kwargs))


@pytest.fixture(params=["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss"])
def pair(request):
    return graphed_pair(request.param)


@pytest.mark.parametrize("padding", [None, "left"])
def test_tokens(pair, padding, recordings):
    """Several texts of two batch sizes, one recording each."""
    plain, model = pair
    for batch_size, length in ((3, 9), (2, 5), (3, 20), (2, 12), (3, 3)):
        ids, mask = cuda_prompts(batch_size, length, padding, seed=length)
        assert torch.equal(greedy(model, ids, mask, 24), greedy(plain, ids, mask, 24))
    assert recordings == [9, 5]


def test_growth(pair, recordings, monkeypatch):
    monkeypatch.setattr("flashcore_hf.cache.layer.FIRST_CAPACITY", 16)
    monkeypatch.setattr("flashcore_hf.cache.layer.MARGIN", 3)
    plain, model = pair
    ids, mask = cuda_prompts(2, 9, "left")
    assert torch.equal(greedy(model, ids, mask, 150), greedy(plain, ids, mask, 150))
    assert 2 <= len(recordings) <= 6


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3}, {"eos_token_id": 5}], ids=str)
def test_ways_of_decoding(options, recordings):
    plain, model = graphed_pair("mistral")
    ids, mask = cuda_prompts(2, 9, "left")
    answers = []
    for each in (plain, model):
        torch.manual_seed(1)
        answers.append(greedy(each, ids, mask, 20, **options))
    assert torch.equal(*answers) and len(recordings) == 1


def test_logits_equal_the_plain_steps():
    plain, model = graphed_pair("llama")
    ids, mask = cuda_prompts(2, 9, "left")
    options = {"output_logits": True, "return_dict_in_generate": True}
    for a, b in zip(greedy(model, ids, mask, 12, **options).logits, greedy(plain, ids, mask, 12, **options).logits):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_two_texts_at_once_on_two_streams():
    """Each has its own cache and graph."""
    plain, model = graphed_pair("llama")
    given = [cuda_prompts(2, 9, seed=seed) for seed in (1, 2)]
    expected = [greedy(plain, *each, 40) for each in given]
    kept = [cache_of(greedy(model, *each, 2, return_dict_in_generate=True)) for each in given]
    assert kept[0].layers[0].key_buffer.data_ptr() != kept[1].layers[0].key_buffer.data_ptr()
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    states = []
    for cache, (_, mask), tokens in zip(kept, given, expected):
        cache.crop(-1)
        states.append([cache, mask, tokens[:, 9:10]])
    got = [[state[2]] for state in states]
    for step in range(30):
        for stream, state, out in zip(streams, states, got):
            with torch.cuda.stream(stream), torch.no_grad():
                cache, mask, token = state
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                position = torch.full((2, 1), 9 + step, device="cuda")
                logits = model(
                    input_ids=token, attention_mask=mask, position_ids=position, **named(cache),
                    cache_position=position[0], use_cache=True, logits_to_keep=1, return_dict=True,
                ).logits  # fmt: skip
                state[1:] = mask, logits[:, -1:].argmax(-1)
                out.append(state[2])
    torch.cuda.synchronize()
    for tokens, wanted in zip(got, expected):
        assert torch.equal(torch.cat(tokens, dim=1), wanted[:, 9:40])


def test_what_is_not_recorded():
    """A forward that reads on the host: the capture fails, says so once, and nothing else is harmed."""
    plain, model = graphed_pair("llama")
    inner = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: inner(x) if x.abs().max().item() >= 0 else x
    ids, mask = cuda_prompts(2, 9, "left")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        answers = [greedy(model, ids, mask, 8) for _ in range(2)]
    told = [str(each.message) for each in caught if each.category is graphs.FlashcoreGraphWarning]
    assert len(told) == 1 and "recording failed" in told[0]
    expected = greedy(plain, ids, mask, 8)
    assert all(torch.equal(answer, expected) for answer in answers)
    _, other = graphed_pair("llama")
    assert torch.equal(greedy(other, ids, mask, 8), expected)


def test_static_cache_still_compiles():
    plain, model = graphed_pair("llama")
    ids, mask = cuda_prompts(2, 9, "left")
    answer = greedy(model, ids, mask, 12, cache_implementation="static")
    assert torch.equal(answer, greedy(plain, ids, mask, 12))


def test_restore_and_first_tokens():
    plain, model = graphed_pair("llama")
    ids, mask = cuda_prompts(2, 9)
    expected = greedy(plain, ids, mask, 8)
    torch.cuda.synchronize()
    began = time.process_time()  # not the clock: tests run beside each other
    assert torch.equal(greedy(model, ids, mask, 8), expected)
    assert time.process_time() - began < 5
    flashcore_hf.graphed(model, False)
    assert "forward" not in vars(model) and "_prepare_cache_for_generation" not in vars(model)
    got = greedy(model, ids, mask, 8, return_dict_in_generate=True)
    assert torch.equal(got.sequences, expected) and type(cache_of(got)) is DynamicCache


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
def test_prompt_lookup(model_type, recordings, monkeypatch):
    """Candidates of several numbers, each replayed on one cache beside the others, while buffers double."""
    monkeypatch.setattr("flashcore_hf.cache.layer.FIRST_CAPACITY", 32)
    plain, model = graphed_pair(model_type)
    ids = torch.arange(3, 9, device="cuda").repeat(3)[None]
    mask = torch.ones_like(ids)
    options = {"prompt_lookup_num_tokens": 3, "eos_token_id": 96}
    expected = greedy(plain, ids, mask, 100, **named(DynamicCache()), **options)
    assert torch.equal(greedy(model, ids, mask, 100, **options), expected)
    assert len(recordings) >= 1
