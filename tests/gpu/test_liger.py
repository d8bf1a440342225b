"""Liger's kernels beside graphed(): the tokens of the plain model, replayed and compiled."""

import pytest
import torch

import flashcore_hf

from ..hf import liger
from ..hf.compare import greedy
from ..hf.models import model_pair
from .test_graphs import cuda_prompts, recordings  # noqa: F401 - a fixture

pytest.importorskip("liger_kernel")
pytestmark = pytest.mark.filterwarnings("error::flashcore_hf.graphs.FlashcoreGraphWarning")


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("model_type", liger.FAMILIES)
def test_tokens(model_type, padding, recordings, monkeypatch):  # noqa: F811
    eager, model = (each.cuda() for each in model_pair(model_type))
    ids, mask = cuda_prompts(3, 20, padding)
    expected = greedy(eager, ids, mask, 24)
    liger.apply(model, monkeypatch)
    flashcore_hf.graphed(model)
    assert torch.equal(greedy(model, ids, mask, 24), expected) and len(recordings) == 1


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_compiled(model_type, monkeypatch):
    """A static cache, whose steps generate() compiles."""
    eager, model = (each.cuda() for each in model_pair(model_type))
    ids, mask = cuda_prompts(2, 9, "left")
    expected = greedy(eager, ids, mask, 12)
    liger.apply(model, monkeypatch)
    assert torch.equal(greedy(model, ids, mask, 12, cache_implementation="static"), expected)
