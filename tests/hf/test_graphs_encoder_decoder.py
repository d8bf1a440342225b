"""graphed() on encoder-decoders: the tokens of eager attention, for sources of any length, in each way of decoding."""

import pytest
import torch
import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.17"):
    pytest.skip("their caches cannot be changed", allow_module_level=True)

import flashcore_hf
from flashcore_hf.cache.encoder_decoder import FlashCoreEncoderDecoderCache
from flashcore_hf.cache.flashcore_cache import FlashCoreCache
from flashcore_hf.models import MASKED_SOURCE_MODELS

from .compare import cache_of, named
from .encoder_decoders import FAMILIES, pair, source

pytestmark = pytest.mark.filterwarnings(
    "ignore::flashcore_kernels.FlashcoreFallbackWarning", "error::flashcore_hf.graphs.FlashcoreGraphWarning"
)

GRAPHED = sorted(FAMILIES.keys() - {"m2m_100"})


def write(model, inputs, tokens: int = 12, **options):
    """Greedy tokens, or what `options` ask for; no pair of tokens comes twice, for tiny models repeat themselves."""
    torch.manual_seed(1)
    options = {"do_sample": False, "no_repeat_ngram_size": 2, **options}
    return model.generate(**inputs, max_new_tokens=tokens, **options)


@pytest.mark.parametrize("model_type", GRAPHED)
def test_tokens(model_type, recorded):
    """Sources of several lengths, some padded, of two batch sizes: one recording for each of those."""
    eager, model = pair(model_type)
    flashcore_hf.graphed(model)
    for batch_size, length in ((2, 9), (2, 13), (2, 4), (3, 7)):
        inputs = source(model, batch_size, length, seed=length)
        got, expected = write(model, inputs), write(eager, inputs)
        assert torch.equal(got, expected) and len(got.unique()) > 4
    assert model_type == "whisper" or model_type in MASKED_SOURCE_MODELS
    assert recorded == {"recorded": 2, "replayed": 4 * 11}
    # Another source is another text.
    assert not torch.equal(write(model, source(model, 2, 9, seed=50)), write(model, source(model, 2, 9, seed=51)))


WAYS = {
    "sampled": {"do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "processors": {"repetition_penalty": 1.3, "bad_words_ids": [[5]], "min_new_tokens": 3},
    "end": {"eos_token_id": 5},
}


@pytest.mark.parametrize("model_type", ["t5", "bart", "whisper"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_decoding(model_type, way, recorded):
    eager, model = pair(model_type)
    flashcore_hf.graphed(model)
    inputs = source(model, 2, 9)
    assert torch.equal(write(model, inputs, **WAYS[way]), write(eager, inputs, **WAYS[way]))
    assert recorded["recorded"] == 1 and recorded["replayed"] > 2


@pytest.mark.parametrize("model_type", ["t5", "bart", "whisper"])
def test_what_is_returned(model_type, recorded):
    """Logits and hidden states of each step, kept from the next; the encoder's, which no graph has; and the cache."""
    eager, model = pair(model_type)
    flashcore_hf.graphed(model)
    inputs = source(model, 2, 9)
    options = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    got, expected = write(model, inputs, 6, **options), write(eager, inputs, 6, **options)
    assert recorded["replayed"] == 5
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
    for a, b in zip(got.decoder_hidden_states, expected.decoder_hidden_states):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.encoder_hidden_states, expected.encoder_hidden_states, rtol=1e-4, atol=1e-4)
    if model_type != "whisper":  # which returns copies of a cache's parts
        cache = cache_of(got)
        assert isinstance(cache, FlashCoreEncoderDecoderCache)
        for name in ("self_attention_cache", "cross_attention_cache"):
            for ours, theirs in zip(getattr(cache, name).layers, getattr(cache_of(expected), name).layers):
                torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)


def test_a_streamer(recorded):
    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens.append(value.flatten().clone())

        def end(self):
            self.tokens = torch.cat(self.tokens)

    _, model = pair("t5")
    flashcore_hf.graphed(model)
    streamer = Streamer()
    text = write(model, source(model, 1, 9), streamer=streamer)
    assert torch.equal(streamer.tokens, text[0]) and recorded["replayed"] == 11


@pytest.mark.parametrize("model_type", ["bart", "whisper"])
def test_a_loop_of_ones_own(model_type, recorded):
    """With a decoder's mask, and outputs of the encoder as a tuple."""
    eager, model = pair(model_type)
    flashcore_hf.graphed(model)
    inputs = source(model, 2, 9)
    answers = []
    for each in (eager, model):
        with torch.no_grad():
            encoder = each.get_encoder()(**inputs)
            config = each.config.get_text_config(decoder=True)
            cache = FlashCoreEncoderDecoderCache(FlashCoreCache(config), FlashCoreCache(config))
            if each is eager:
                cache = None
            given = {"attention_mask": inputs["attention_mask"]} if model_type == "bart" else {}
            token, logits = torch.full((2, 1), 2), []
            seen = torch.ones(2, 1, dtype=torch.long)
            for step in range(6):
                out = each(
                    decoder_input_ids=token, encoder_outputs=(encoder.last_hidden_state,), **named(cache), **given,
                    decoder_attention_mask=seen, use_cache=True, return_dict=True,
                )  # fmt: skip
                cache = cache_of(out)
                logits.append(out.logits[:, -1])
                token = torch.full((2, 1), 7 + step)
                seen = torch.nn.functional.pad(seen, (0, 1), value=1)
        answers.append(torch.stack(logits))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
    assert recorded == {"recorded": 1, "replayed": 5}


def test_a_source_without_a_mask_of_its_own_is_recorded_by_its_length(recorded, monkeypatch):
    """A model of which nothing is known: its graph has the very states of its encoder, and serves one length."""
    monkeypatch.setattr("flashcore_hf.models.MASKED_SOURCE_MODELS", frozenset())
    eager, model = pair("bart")
    flashcore_hf.graphed(model)
    for length in (9, 13, 9, 9):
        inputs = source(model, 2, length, seed=length)
        assert torch.equal(write(model, inputs), write(eager, inputs))
    assert recorded["recorded"] == 2
    monkeypatch.setattr("flashcore_hf.graphs.MOST_GRAPHS", 3)
    for length in range(5, 12):
        write(model, source(model, 2, length), 3)
    (_, (_, graphs)), *_ = model.forward.graphed_steps.stock.items()
    assert sum(isinstance(key, tuple) for key in graphs) == 3


def test_states_that_a_decoder_reads_are_those_of_the_call(recorded):
    """A decoder that looks at its encoder's states in each step, and not at keys in a cache."""
    eager, model = pair("whisper")
    for each in (eager, model):
        decoder = each.model.decoder
        inner = type(decoder).forward

        def forward(*args, _inner=inner, _decoder=decoder, **kwargs):
            out = _inner(_decoder, *args, **kwargs)
            out.last_hidden_state = out.last_hidden_state + kwargs["encoder_hidden_states"].mean(1, keepdim=True)
            return out

        decoder.forward = forward
    flashcore_hf.graphed(model)
    texts = []
    for seed in (1, 2):
        inputs = source(model, 2, 9, seed=seed)
        texts.append(write(model, inputs))
        assert torch.equal(texts[-1], write(eager, inputs))
    assert recorded["recorded"] == 1 and not torch.equal(*texts)


def test_buffers_double(recorded, monkeypatch):
    monkeypatch.setattr("flashcore_hf.cache.layer.FIRST_CAPACITY", 8)
    eager, model = pair("t5")
    flashcore_hf.graphed(model)
    for length in (6, 20, 12):
        inputs = source(model, 2, length, seed=length)
        assert torch.equal(write(model, inputs, 30), write(eager, inputs, 30))
    assert recorded["recorded"] == 3 + 1  # 8, 16 and 32 slots for the text; 32 for the longer source


def test_m2m_says_that_it_cannot_be_recorded(recorded):
    """It compares a length with the size of a table, on the host."""
    eager, model = pair("m2m_100")
    flashcore_hf.graphed(model)
    inputs = source(model, 2, 9)
    with pytest.warns(flashcore_hf.graphs.FlashcoreGraphWarning, match="recording failed"):
        got = write(model, inputs)
    assert torch.equal(got, write(eager, inputs)) and recorded["replayed"] == 0


def test_another_cache_is_named(recorded):
    _, model = pair("t5")
    flashcore_hf.graphed(model)
    with pytest.warns(flashcore_hf.graphs.FlashcoreGraphWarning, match="needs? a FlashCoreEncoderDecoderCache"):
        write(model, source(model, 2, 9), 3, cache_implementation="static", disable_compile=True)


def test_the_cache_alone():
    """use_flashcore_cache: both halves, in fp8 only what is written."""
    eager, model = pair("bart")
    inputs = source(model, 2, 9)
    flashcore_hf.use_flashcore_cache(model)
    got = write(model, inputs, return_dict_in_generate=True)
    assert torch.equal(got.sequences, write(eager, inputs))
    assert isinstance(cache_of(got), FlashCoreEncoderDecoderCache)
    flashcore_hf.use_flashcore_cache(model, dtype=torch.float8_e4m3fn)
    cache = cache_of(write(model, inputs, return_dict_in_generate=True))
    halves = cache.self_attention_cache, cache.cross_attention_cache
    assert [half.layers[0].key_buffer.dtype for half in halves] == [torch.float8_e4m3fn, torch.float32]
    flashcore_hf.use_flashcore_cache(model, False)
    assert type(cache_of(write(model, inputs, return_dict_in_generate=True))) is not FlashCoreEncoderDecoderCache
