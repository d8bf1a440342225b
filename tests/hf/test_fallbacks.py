"""What the kernels cannot do: the same answer through PyTorch with one warning, or an error under FLASHCORE_STRICT."""

import warnings

import pytest
import torch
from flashcore_kernels import FlashcoreFallbackWarning, path_counts
from flashcore_kernels.fallback import forget_warnings

from flashcore_hf.attention import flashcore_attention

from .compare import TOLERANCE
from .models import model_pair, prompts


@pytest.fixture(autouse=True)
def fresh_warnings():
    forget_warnings()
    yield
    forget_warnings()


def gradients(model, ids, mask) -> dict[str, torch.Tensor]:
    # A query that sees no key gives zeros here and the mean of all values in eager: no loss on what it predicts.
    counts = mask.bool() & mask.roll(1, dims=1).bool()
    model.zero_grad()
    model(ids, attention_mask=mask, labels=ids.masked_fill(~counts, -100)).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_training_gives_eagers_gradients(model_type, checkpointing):
    try:
        eager, model = model_pair(model_type)
    except (ValueError, KeyError) as error:
        pytest.skip(str(error))
    ids, mask = prompts(3, 13, "left")
    for each in (eager, model):
        each.train()
        if checkpointing:
            each.gradient_checkpointing_enable({"use_reentrant": False})
    expected = gradients(eager, ids, mask)
    path_counts.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlashcoreFallbackWarning)
        got = gradients(model, ids, mask)
    assert path_counts["flashcore_backward"] and not path_counts["torch"]
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name


def test_the_warning_comes_once():
    model = model_pair("llama")[1].double()
    ids, mask = prompts(2, 9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model(ids, attention_mask=mask)
    assert [w.category for w in caught].count(FlashcoreFallbackWarning) == 1


def test_strict_makes_it_an_error(monkeypatch):
    monkeypatch.setenv("FLASHCORE_STRICT", "1")
    _, model = model_pair("llama")
    ids, mask = prompts(2, 9)
    model(ids, attention_mask=mask).logits.sum().backward()
    with pytest.raises(NotImplementedError, match="float64"):
        model.double()(ids, attention_mask=mask)


def test_dropout_drops():
    _, model = model_pair("llama", attention_dropout=0.5)
    ids, mask = prompts(2, 9)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.train()
        first = model(ids, attention_mask=mask).logits
        second = model(ids, attention_mask=mask).logits
    assert not torch.allclose(first, second) and not torch.allclose(first, expected)


def test_dropout_keeps_the_mean():
    """Averaged over many draws, dropout gives the answer without it."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 16) for _ in range(3))
    module = torch.nn.Module()
    expected, _ = flashcore_attention(module, query, key, value, scaling=0.25)
    # Sequences of one batch are as many draws.
    many = (t.expand(400, -1, -1, -1) for t in (query, key, value))
    draws, _ = flashcore_attention(module, *many, scaling=0.25, dropout=0.2)
    assert (draws.mean(0) - expected[0]).abs().max() < 0.18
    assert draws.std(0).max() > 0.1


def test_float64_model():
    eager, model = (each.double() for each in model_pair("llama"))
    ids, mask = prompts(2, 9)
    with torch.no_grad(), pytest.warns(FlashcoreFallbackWarning, match="float64"):
        got = model(ids, attention_mask=mask).logits
    with torch.no_grad():
        expected = eager(ids, attention_mask=mask).logits
    # eager's softmax is float32 even here.
    assert (got - expected).abs().max() / expected.abs().max() < 1e-6


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mistral"])
def test_output_attentions_gives_eagers_weights(model_type):
    eager, model = model_pair(model_type)
    ids, mask = prompts(2, 9)
    with torch.no_grad():
        expected = eager(ids, attention_mask=mask, output_attentions=True).attentions
        with pytest.warns(FlashcoreFallbackWarning, match="output_attentions"):
            got = model(ids, attention_mask=mask, output_attentions=True).attentions
    assert len(got) == len(expected) == 2
    for weights, want in zip(got, expected):
        torch.testing.assert_close(weights, want, atol=TOLERANCE, rtol=1e-4)


def test_bf16_autocast_runs_in_bf16(paths):
    eager, model = model_pair("llama")
    ids, mask = prompts(2, 9, "left")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(ids, attention_mask=mask).logits.float()
        expected = eager(ids, attention_mask=mask).logits.float()
    assert paths["torch"] == 0
    assert ((got - expected).abs() * mask[..., None]).max() / expected.abs().max() < 0.05


class TestTheFunctionAlone:
    """What only some models pass."""

    module = torch.nn.Module()

    def tensors(self, num_queries=7, num_keys=7):
        torch.manual_seed(0)
        return torch.randn(1, 4, num_queries, 16), torch.randn(1, 2, num_keys, 16), torch.randn(1, 2, num_keys, 16)

    @pytest.mark.parametrize("argument", [torch.zeros(3), 0.5, 4, True, (1, 2)], ids=repr)
    def test_unknown_argument_is_an_error(self, argument):
        with pytest.raises(NotImplementedError, match="'key_temperature'.*attn_implementation='eager'"):
            flashcore_attention(self.module, *self.tensors(), None, key_temperature=argument)

    def test_what_is_known_or_off_is_none(self):
        flashcore_attention(self.module, *self.tensors(), None, position_ids=torch.arange(7)[None], use_cache=True)
        flashcore_attention(self.module, *self.tensors(), None, key_temperature=None, head_mask=None, strange=False)

    def test_no_mask_with_more_keys_is_ambiguous(self):
        with pytest.raises(ValueError, match="the first or the last of the keys"):
            flashcore_attention(self.module, *self.tensors(3, 7), None)
        flashcore_attention(self.module, *self.tensors(3, 7), None, is_causal=False)
        flashcore_attention(self.module, *self.tensors(1, 7), None)

    def test_a_canvas_sees_all_of_a_cut_cache(self):
        """DiffusionGemma's decoder: no mask, the window named, and the cache already cut to it."""
        query, key, value = self.tensors(3, 7)
        got, _ = flashcore_attention(self.module, query, key, value, None, is_causal=False, sliding_window=2)
        want, _ = flashcore_attention(self.module, query, key, value, None, is_causal=False)
        torch.testing.assert_close(got, want)
        alone = (query, key[:, :, 4:], value[:, :, 4:])
        windowed, _ = flashcore_attention(self.module, *alone, None, is_causal=False, sliding_window=2)
        full, _ = flashcore_attention(self.module, *alone, None, is_causal=False)
        assert not torch.allclose(windowed, full)

    def test_module_says_causal_unless_the_call_does(self):
        module = torch.nn.Module()
        module.is_causal = False
        full, _ = flashcore_attention(module, *self.tensors(), None)
        causal, _ = flashcore_attention(module, *self.tensors(), None, is_causal=True)
        default, _ = flashcore_attention(self.module, *self.tensors(), None)
        torch.testing.assert_close(causal, default)
        assert not torch.allclose(full, causal)

    def test_position_bias_is_added(self):
        query, key, value = self.tensors()
        bias = torch.randn(1, 4, 7, 7)
        got, _ = flashcore_attention(self.module, query, key, value, None, is_causal=False, position_bias=bias)
        want = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)
        torch.testing.assert_close(got.transpose(1, 2), want, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("window", [None, 2])
    def test_packed_images_by_cu_seq_lens(self, causal, window):
        query, key, value = self.tensors(9, 9)
        bounds = torch.tensor([0, 2, 6, 9], dtype=torch.int32)
        got, _ = flashcore_attention(
            self.module, query, key, value, None, is_causal=causal, sliding_window=window, cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds, max_length_q=4, max_length_k=4,
        )  # fmt: skip
        parts = []
        for start, end in zip(bounds[:-1], bounds[1:]):
            part = (t[:, :, start:end] for t in (query, key, value))
            parts.append(flashcore_attention(self.module, *part, None, is_causal=causal, sliding_window=window)[0])
        torch.testing.assert_close(got, torch.cat(parts, dim=1), atol=1e-5, rtol=1e-5)

    def test_2d_padding_mask(self):
        query, key, value = self.tensors(3, 9)
        padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
        got, _ = flashcore_attention(self.module, query, key, value, padding)
        cut = (query, key[:, :, 2:7], value[:, :, 2:7])
        seen = torch.ones(3, 5, dtype=torch.bool).tril(2)
        want = torch.nn.functional.scaled_dot_product_attention(*cut, attn_mask=seen, enable_gqa=True)
        torch.testing.assert_close(got.transpose(1, 2), want, atol=1e-5, rtol=1e-5)
