"""Training by the kernels: the losses of `sdpa` step after step, and the same bits from two runs."""

import pytest
import torch
from flashcore_kernels import path_counts

from ..hf.training import MODELS, STEPS, difference, losses_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore::flashcore_kernels.FlashcoreFallbackWarning"),
]


@pytest.fixture(autouse=True)
def ieee_products(monkeypatch):
    """In the rest of the model too: TF32 would hide what attention's rounding is."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_sdpas(name):
    path_counts.clear()
    reference, ours = losses_of(name, STEPS, "cuda")
    # Rounding grows from step to step: ten times what ten steps may differ on a CPU.
    assert difference(reference, ours) <= 1e-3, (reference, ours)
    assert difference(reference[:5], ours[:5]) <= 1e-4
    assert reference[-1] < reference[0] - 0.5, "it must learn something, or equal losses say little"
    # The control: a softmax scale that is wrong by a tenth shows.
    _, wrong = losses_of(name, 3, "cuda", scale=1.1)
    assert difference(reference[:3], wrong) > 1e-3


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_kernels_train(name):
    """Not PyTorch: every call of a step is counted to a kernel."""
    path_counts.clear()
    losses_of(name, 1, "cuda")
    assert path_counts and "torch" not in path_counts, dict(path_counts)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_two_runs_are_the_same(name):
    _, first = losses_of(name, 10, "cuda")
    _, second = losses_of(name, 10, "cuda")
    assert first == second
