"""`warm`: every kind of layer and every way to generate is run, and a failure is told."""

import pytest
import transformers
from flashcore_kernels.cache import paged
from flashcore_kernels.device import Device
from flashcore_kernels.fallback import forget_warnings
from packaging.version import Version

if Version(transformers.__version__) < Version("4.57"):
    pytest.skip("FlashCoreCache needs 4.57", allow_module_level=True)

from flashcore_hf import serving, warm
from flashcore_hf.__main__ import main, parser

from .encoder_decoders import pair
from .models import model_pair, tiny_config


def test_layers_of_each_kind_stay():
    kinds = ["sliding_attention"] * 3 + ["full_attention", "sliding_attention", "full_attention"]
    config = tiny_config("gemma3_text", num_hidden_layers=6, layer_types=kinds, vocab_size=5000)
    model = warm.small_model(config, "float16")
    assert model.config.layer_types == kinds[:4] and len(model.model.layers) == 4
    assert model.config.vocab_size == warm.VOCABULARY and model.dtype.itemsize == 2
    assert model.config._attn_implementation == "flashcore"
    assert len(config.layer_types) == 6 and config.vocab_size == 5000  # the caller's is as it was
    assert len(warm.small_model(tiny_config("llama", num_hidden_layers=5), None).model.layers) == 2


@pytest.mark.parametrize("way", warm.WAYS + warm.FP8_WAYS, ids=lambda way: way.name)
def test_ways(way, tmp_path, through_torch):
    _, model = model_pair("llama")
    model.save_pretrained(tmp_path)
    assert warm.run(way, str(tmp_path), "float32", "cpu") > 0


@pytest.mark.skipif(serving.why_not() is not None, reason=f"supported for {serving.SUPPORTED}")
def test_continuous_batching(tmp_path, monkeypatch):
    """All that it may launch, also what none of these batches do, is compiled when it returns."""
    monkeypatch.setattr(paged, "device_of", lambda device: Device("torch", reason="the test asks for it"))
    waited, made = [], []
    begin = serving.begin_compiling_batches

    def noted(*arguments):
        made.append(begin(*arguments))
        monkeypatch.setattr(made[-1], "wait", lambda: waited.append(made[-1]))
        return made[-1]

    monkeypatch.setattr(serving, "begin_compiling_batches", noted)
    _, model = model_pair("llama")
    model.save_pretrained(tmp_path)
    (way,) = warm.PAGED_WAYS
    with pytest.warns(UserWarning, match="the test asks for it"):
        assert warm.run(way._replace(batch_size=3), str(tmp_path), "float32", "cpu") > 0
    assert len(made) == 1 and waited == made
    forget_warnings()


@pytest.mark.parametrize("model_type", ["t5", "whisper"])
def test_encoder_decoders(model_type, tmp_path, through_torch, monkeypatch):
    if Version(transformers.__version__) < Version("5.17"):
        pytest.skip("their caches cannot be changed")
    pair(model_type)[1].save_pretrained(tmp_path)
    assert warm.run(warm.WAYS[1], str(tmp_path), "float32", "cpu") > 0
    monkeypatch.setattr(warm, "_batch", lambda *_: pytest.fail("these have no pages"))
    assert warm.run(warm.PAGED_WAYS[0], str(tmp_path), "float32", "cpu") > 0


def test_a_model_that_sees_images(through_torch):
    """Its text's layers, in the whole where the text has no class of its own."""
    if Version(transformers.__version__) < Version("5.17"):
        pytest.skip("these models have other configurations")
    from .vision import gemma, qwen

    for family in (qwen, gemma):
        model = warm.small_model(family()[1], "float32")
        assert model.generate(**warm.inputs(model, 2), max_new_tokens=2, do_sample=False).shape == (2, 102)


def test_command(tmp_path, capfd, monkeypatch):
    """In a process of its own, which tells what went wrong in it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(warm, "WAYS", warm.WAYS[:1])
    monkeypatch.setattr(warm, "PAGED_WAYS", ())
    tiny_config("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    arguments = parser().parse_args(["warm", "--model", str(tmp_path), "--device", "cpu", "--jobs", "2"])
    assert warm.main(arguments) == 0
    printed = capfd.readouterr().out
    assert "[1/1] graphed, a prompt: " in printed and "failed: " not in printed
    assert "\n0 kernels are new on disk" in printed
    (tmp_path / "config.json").write_text("{}")
    assert warm.main(arguments) == 1
    assert "[1/1]" in (printed := capfd.readouterr().out) and "failed: ValueError" in printed


def test_what_cannot_be_warmed(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main(["warm"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["warm", "--model", "some"]) == 1
    assert "no GPU" in capsys.readouterr().out
