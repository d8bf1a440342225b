"""Dropout where PyTorch serves it: of weights after the softmax, beside whatever else a model has.

Beside softcap, sinks and a value head_dim of its own it was an error, although `eager` trains such models.
"""

import math

import pytest
import torch
from flashcore_kernels import op
from flashcore_kernels.fallback import forget_warnings, torch_attention
from flashcore_kernels.problem import Inputs, check_problem

from flashcore_hf.attention import flashcore_attention

from .models import model_pair, prompts

MODULE = torch.nn.Module()
RATE = 0.3


@pytest.fixture(autouse=True)
def through_torch(recwarn, monkeypatch):
    """As on a machine without a kernel for it; what the kernels draw is tests/kernels/portable/test_dropout.py's."""
    monkeypatch.setattr(op, "backward_fallback_reason", lambda problem, device: "this is a test of PyTorch's dropout")
    yield
    forget_warnings()


def tensors(value_dim=16, length=7, requires_grad=False):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, length, 16), (2, 2, length, 16), (2, 2, length, value_dim)
    return [torch.randn(shape, generator=generator).requires_grad_(requires_grad) for shape in shapes]


# What stands beside dropout -> keywords of flashcore_attention.
BESIDE = {
    "nothing": {},
    "softcap": {"softcap": 2.0},
    "sinks": {"s_aux": torch.tensor([-1.0, 0.0, 1.0, 2.0])},
    "sinks of each query": {"s_aux": torch.linspace(-2, 2, 56).view(2, 4, 7, 1)},
    "value head_dim": {},
    "softcap, sinks and value head_dim": {"softcap": 2.0, "s_aux": torch.tensor([-1.0, 0.0, 1.0, 2.0])},
}


def inputs_of(beside: str, requires_grad=False):
    return tensors(12 if "value" in beside else 16, requires_grad=requires_grad)


def kept(shape, seed: int) -> torch.Tensor:
    """What torch's dropout multiplies weights of this shape with, from this seed."""
    torch.manual_seed(seed)
    return torch.nn.functional.dropout(torch.ones(shape), RATE)


def written_out(query, key, value, factor, softcap=None, s_aux=None):
    """Causal attention, its weights multiplied by `factor` `[B, H, Q, K]` after the softmax and the sink's column."""
    length = query.shape[2]
    scores = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) / 4.0
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    if s_aux is not None:
        sinks = s_aux[:, None, None] if s_aux.dim() == 1 else s_aux
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :length]
    return (weights * factor @ value.repeat_interleave(2, dim=1)).transpose(1, 2)


@pytest.mark.parametrize("beside", BESIDE)
class TestBesideWhatModelsHave:
    def test_mean_over_seeds_is_the_answer_without(self, beside):
        query, key, value = inputs_of(beside)
        count = 4000
        # Many rows of one batch are as many draws.
        torch.manual_seed(0)
        many = [t[:1].expand(count, -1, -1, -1) for t in (query, key, value)]
        arguments = dict(BESIDE[beside])
        if "each" in beside:
            arguments["s_aux"] = arguments["s_aux"][:1].expand(count, -1, -1, -1)
        draws, _ = flashcore_attention(MODULE, *many, None, dropout=RATE, **arguments)
        want = written_out(query[:1], key[:1], value[:1], 1.0, **_first(BESIDE[beside]))
        error, spread = (draws.mean(0) - want[0]).abs(), draws.std(0)
        assert (error <= 5 * spread / math.sqrt(count) + 1e-6).all()
        # The controls: draws differ, and without the division by 1 - RATE the mean would be off.
        assert spread.max() > 0.1
        assert ((draws.mean(0) * (1 - RATE) - want[0]).abs() > 5 * spread / math.sqrt(count) + 1e-6).any()

    def test_gradients_of_the_very_weights_that_stayed(self, beside):
        """Beside SDPA's own dropout, whose draws are its own, only where PyTorch writes attention out."""
        if beside == "nothing":
            pytest.skip("scaled_dot_product_attention draws by itself")
        inputs = inputs_of(beside, requires_grad=True)
        arguments = {
            k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in BESIDE[beside].items()
        }
        wanted = [*inputs, *(a for a in arguments.values() if isinstance(a, torch.Tensor))]
        torch.manual_seed(3)
        got, _ = flashcore_attention(MODULE, *inputs, None, dropout=RATE, **arguments)
        want = written_out(*inputs, kept((2, 4, 7, 7), 3), **arguments)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        upstream = torch.randn_like(want)
        for mine, its in zip(torch.autograd.grad(got, wanted, upstream), torch.autograd.grad(want, wanted, upstream)):
            torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4)
        other = written_out(*inputs, kept((2, 4, 7, 7), 4), **arguments)
        assert (other - want).abs().max() > 0.1

    def test_a_seed_repeats_and_another_differs(self, beside):
        answers = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            answers.append(flashcore_attention(MODULE, *inputs_of(beside), None, dropout=RATE, **BESIDE[beside])[0])
        assert torch.equal(answers[0], answers[1])
        assert not torch.equal(answers[0], answers[2])

    def test_the_share_that_is_dropped(self, beside):
        """With values of one key each, the output is the weights themselves."""
        query, key, _ = inputs_of(beside)
        value = torch.eye(7).expand(2, 2, 7, 7)
        torch.manual_seed(0)
        arguments = BESIDE[beside]
        dropped = torch.zeros(())
        for _ in range(200):
            weights, _ = flashcore_attention(MODULE, query, key, value, None, dropout=RATE, **arguments)
            seen = torch.ones(7, 7, dtype=torch.bool).tril()[None, :, None].expand_as(weights)
            dropped += (weights[seen] == 0).float().mean() / 200
        assert abs(dropped - RATE) < 0.01


def _first(arguments: dict) -> dict:
    return {k: v[:1] if isinstance(v, torch.Tensor) and v.dim() == 4 else v for k, v in arguments.items()}


def test_lse_does_not_change():
    query, key, value = tensors()
    inputs = Inputs(query, key, value)
    problem = check_problem(inputs, is_causal=True)
    torch.manual_seed(0)
    output, lse = torch_attention(problem._replace(dropout=RATE), inputs, return_lse=True)
    plain, plain_lse = torch_attention(problem, inputs, return_lse=True)
    torch.testing.assert_close(lse, plain_lse)
    assert (output - plain).abs().max() > 0.1
    torch.testing.assert_close(output.transpose(1, 2), written_out(query, key, value, kept((2, 4, 7, 7), 0)))


def test_weights_that_are_asked_for_are_those_that_were_used():
    """With output_attentions the dropout was left out, without a word."""
    query, key, value = tensors()
    torch.manual_seed(5)
    output, weights = flashcore_attention(MODULE, query, key, value, None, dropout=RATE, output_attentions=True)
    factor = kept((2, 4, 7, 7), 5)
    torch.testing.assert_close(output, written_out(query, key, value, factor))
    assert torch.equal(weights == 0, (factor == 0) | ~torch.ones(7, 7, dtype=torch.bool).tril())


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "deepseek_v3"])
def test_training_a_model_is_eagers_from_the_same_seed(model_type):
    """Weights are drawn in eager's order and shape: the loss and every gradient are the same."""
    try:
        eager, model = (each.train() for each in model_pair(model_type, attention_dropout=RATE))
    except (ValueError, KeyError) as error:
        pytest.skip(str(error))
    ids, _ = prompts(2, 12)
    losses = []
    for each, seed in ((eager, 1), (model, 1), (model, 2)):
        each.zero_grad()
        torch.manual_seed(seed)
        loss = each(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        if each is model and seed == 1:
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert abs(losses[2] - losses[0]) > 1e-3
    for name, parameter in eager.named_parameters():
        assert (gradients[name] - parameter.grad).abs().max() <= 1e-4 * parameter.grad.abs().max() + 1e-7, name
