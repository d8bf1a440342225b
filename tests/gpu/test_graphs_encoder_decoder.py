"""graphed() with real CUDA graphs on encoder-decoders and models that see images: the tokens of eager attention."""

import pytest
import torch
import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.17"):
    pytest.skip("their caches cannot be changed", allow_module_level=True)

import flashcore_hf

from ..hf import encoder_decoders, vision
from ..hf.test_graphs_encoder_decoder import GRAPHED, WAYS, write
from .test_graphs import recordings  # noqa: F401 - a fixture

pytestmark = pytest.mark.filterwarnings("error::flashcore_hf.graphs.FlashcoreGraphWarning")


def on_gpu(inputs: dict) -> dict:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def pair(model_type: str):
    eager, model = encoder_decoders.pair(model_type)
    return eager.cuda(), flashcore_hf.graphed(model.cuda())


@pytest.mark.parametrize("model_type", GRAPHED)
def test_tokens(model_type, recordings):  # noqa: F811
    eager, model = pair(model_type)
    for batch_size, length in ((2, 9), (2, 13), (2, 4), (3, 7)):
        inputs = on_gpu(encoder_decoders.source(model, batch_size, length, seed=length))
        assert torch.equal(write(model, inputs, 24), write(eager, inputs, 24))
    assert len(recordings) == 2


@pytest.mark.parametrize("model_type", ["t5", "bart", "whisper"])
@pytest.mark.parametrize("way", WAYS)
def test_ways_of_decoding(model_type, way, recordings):  # noqa: F811
    eager, model = pair(model_type)
    inputs = on_gpu(encoder_decoders.source(model, 2, 9))
    assert torch.equal(write(model, inputs, **WAYS[way]), write(eager, inputs, **WAYS[way]))
    assert len(recordings) == 1


@pytest.mark.parametrize("model_type", ["t5", "whisper"])
def test_buffers_double(model_type, recordings, monkeypatch):  # noqa: F811
    monkeypatch.setattr("flashcore_hf.cache.layer.FIRST_CAPACITY", 8)
    eager, model = pair(model_type)
    for length in (6, 20, 12):
        inputs = on_gpu(encoder_decoders.source(model, 2, length, seed=length))
        assert torch.equal(write(model, inputs, 30), write(eager, inputs, 30))
    assert 3 <= len(recordings) <= 4


def test_memory_stays_flat_and_comes_back():
    """300 steps on one cache, and texts one after the other; `graphed(model, False)` gives everything back."""
    _, model = encoder_decoders.pair("t5")
    model = model.cuda()
    inputs = on_gpu(encoder_decoders.source(model, 2, 9))
    write(model, inputs, 4)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    flashcore_hf.graphed(model)
    write(model, inputs, 300, no_repeat_ngram_size=0)
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        write(model, inputs, 300, no_repeat_ngram_size=0)
    assert torch.cuda.memory_allocated() <= held
    flashcore_hf.graphed(model, False)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.parametrize("family", [vision.qwen, vision.gemma])
def test_images(family, recordings):  # noqa: F811
    eager, model = vision.pair(family)
    eager, model = eager.cuda(), flashcore_hf.graphed(model.cuda())
    texts = []
    for seed in (1, 2):
        given = on_gpu(vision.seen(family, seed))
        texts.append(model.generate(**given, max_new_tokens=12, do_sample=False))
        assert torch.equal(texts[-1], eager.generate(**given, max_new_tokens=12, do_sample=False))
    assert len(recordings) == 1 and not torch.equal(*texts)
