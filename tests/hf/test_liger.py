"""Liger's norms, rotations and MLPs beside us: which take hold, in which order, and the same tokens with graphs.

Its kernels need a GPU (tests/gpu/test_liger.py). Here PyTorch stands in for each, and is counted.
"""

from collections import Counter

import pytest
import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.4"):
    pytest.skip("what Liger 0.8.5 patches has other names", allow_module_level=True)

import flashcore_hf

from . import liger
from .compare import greedy
from .models import model_pair, prompts

pytest.importorskip("liger_kernel")
pytestmark = pytest.mark.filterwarnings(
    "ignore::flashcore_kernels.FlashcoreFallbackWarning", "error::flashcore_hf.graphs.FlashcoreGraphWarning"
)


@pytest.fixture
def kernels(monkeypatch):
    """Calls of Liger's kernels, by name."""
    counts = Counter()
    liger.stand_in(monkeypatch, counts)
    return counts


@pytest.mark.parametrize("first", ["liger", "graphed"])
@pytest.mark.parametrize("model_type", liger.FAMILIES)
def test_tokens(model_type, first, recorded, kernels, monkeypatch):
    """Whichever of the two lines comes first."""
    eager, model = model_pair(model_type)
    ids, mask = prompts(2, 9, "left")
    expected = greedy(eager, ids, mask, 10)
    assert not kernels
    lines = [lambda: liger.apply(model, monkeypatch), lambda: flashcore_hf.graphed(model)]
    for line in lines if first == "liger" else reversed(lines):
        line()
    got = greedy(model, ids, mask, 10)
    assert got.equal(expected) and recorded == {"recorded": 1, "replayed": 9}
    # It has taken hold: a prompt, and a step that is run once and recorded once.
    layers = model.config.num_hidden_layers
    assert kernels["rope"] == 3 * layers and kernels["rms_norm"] >= 3 * (2 * layers + 1)
    assert kernels["mlp"] == (0 if model_type == "gpt_oss" else 3 * layers)  # whose experts it leaves alone


def test_its_loss_puts_a_forward_over_ours(recorded, kernels, monkeypatch):
    """Where it comes second: an error, and not a graph that nobody asks."""
    _, model = model_pair("llama")
    ids, mask = prompts(2, 9)
    flashcore_hf.graphed(model)
    liger.apply(model, monkeypatch, fused_linear_cross_entropy=True)
    with pytest.raises(RuntimeError, match="did not take hold: generate\\(\\) did not call forward"):
        greedy(model, ids, mask, 4)
    assert recorded["replayed"] == 0
