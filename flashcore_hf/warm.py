"""`python -m flashcore_hf warm`: every kernel that a model's generate() and generate_batch() need, compiled ahead.

What runs is the model's own code, with a few of its layers and random weights: so whatever it asks of attention is what
it will ask later. Each way of generating is a process of its own, and they run side by side.
"""

import copy
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    GenerationConfig,
)

from . import serving
from .cache.switch import use_flashcore_cache
from .graphs import decoder_config, graphed
from .models import NAME

# Rows of the output embedding that are made: kernels of attention do not depend on it.
VOCABULARY = 1024
TOKENS = 4


class Way(NamedTuple):
    """A way to generate.

    Attributes:
        name: for whoever watches.
        batch_size: above 1, shorter prompts are padded.
        graphs: whether the model is graphed.
        fp8: whether its cache is a FlashCoreCache in float8_e4m3fn.
        pages: by continuous batching, of so many requests at once.
    """

    name: str
    batch_size: int
    graphs: bool
    fp8: bool = False
    pages: bool = False


WAYS = (
    Way("graphed, a prompt", 1, True),
    Way("graphed, a padded batch", 2, True),
    Way("a prompt", 1, False),
    Way("a padded batch", 2, False),
)
# Batches of more requests have no other kernels.
PAGED_WAYS = (Way("continuous batching", 64, True, pages=True),)
FP8_WAYS = (Way("graphed, an fp8 cache", 2, True, True), Way("an fp8 cache", 2, False, True))


def main(arguments) -> int:
    """Run the command; returns its exit status."""
    if arguments.device is None and not torch.cuda.is_available():
        print("There is no GPU here, so nothing would be compiled; --device cpu runs the ways all the same.")
        return 1
    device = arguments.device or "cuda"
    ways = WAYS + (PAGED_WAYS if serving.why_not() is None else ()) + (FP8_WAYS if arguments.fp8 else ())
    before, began = kernels_on_disk(), time.perf_counter()
    print(f"{arguments.model}: {len(ways)} ways to generate, {min(arguments.jobs, len(ways))} at once", flush=True)
    failed = 0
    # Not forked: CUDA does not survive that.
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(run, way, arguments.model, arguments.dtype, device): way for way in ways}
        for done, future in enumerate(as_completed(running), start=1):
            error = future.exception()
            failed += error is not None
            said = f"{future.result():.1f} s" if error is None else f"failed: {type(error).__name__}: {error}"
            print(f"[{done}/{len(ways)}] {running[future].name}: {said}", flush=True)
    new = kernels_on_disk() - before
    print(f"{new} kernels are new on disk ({cache_folder()}), after {time.perf_counter() - began:.1f} s", flush=True)
    return int(failed > 0)


def run(way: Way, name: str, dtype: str | None, device: str) -> float:
    """Generate in one way; returns the seconds that it took."""
    model = small_model(AutoConfig.from_pretrained(name), dtype).to(device)
    began = time.perf_counter()
    if way.pages:
        if type(model) in MODEL_FOR_CAUSAL_LM_MAPPING.values():
            _batch(model, way.batch_size)
        return time.perf_counter() - began
    if way.fp8:
        use_flashcore_cache(model, dtype=torch.float8_e4m3fn)
    if way.graphs and device != "cpu":
        graphed(model)
    model.generate(**inputs(model, way.batch_size), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0)
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _batch(model, requests: int) -> None:
    """Continuous batching, until all is compiled that it may need."""
    from transformers import ContinuousBatchingConfig  # new with what `serving` supports

    generation = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = inputs(model, requests)["input_ids"].tolist()
    config = ContinuousBatchingConfig(num_blocks=4 * requests, max_batch_tokens=1024)
    model.generate_batch(
        prompts, generation_config=generation, continuous_batching_config=config, persistent_manager=True
    )
    model._cached_continuous_batching_manager.batch_processor._flashcore_served.ahead.wait()


def small_model(config, dtype: str | None):
    """A model of this configuration with random weights: of its layers one of each kind, of its words a few."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # attention gets what linear layers return, in the dtype of the whole
    dtype = getattr(torch, dtype) if dtype else getattr(config, "dtype", None) or torch.bfloat16
    text = config.get_text_config(decoder=True) if getattr(config, "sub_configs", None) else config
    _shorten(text)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 0)
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    # Where there is no class for the text alone, the whole: what sees images runs without one.
    alone = config is text or type(text) in MODEL_FOR_CAUSAL_LM_MAPPING
    kind = _kind(config) if alone else AutoModelForImageTextToText
    model = kind.from_config(text if alone else config, dtype=dtype, attn_implementation=NAME).eval()
    model.generation_config.eos_token_id = None
    return model


def _kind(config):
    if not config.is_encoder_decoder:
        return AutoModelForCausalLM
    return AutoModelForSpeechSeq2Seq if hasattr(config, "num_mel_bins") else AutoModelForSeq2SeqLM


def _shorten(config) -> None:
    """Leave the first layers of a configuration, as many as have all kinds among them."""
    kinds = getattr(config, "layer_types", None)
    count = 2 if kinds is None else 1 + max(kinds.index(kind) for kind in set(kinds))
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        layers = getattr(config, name, None)
        if isinstance(layers, int):
            setattr(config, name, min(layers, count))
    if kinds is not None:
        config.layer_types = kinds[:count]


def inputs(model, batch_size: int) -> dict[str, torch.Tensor]:
    """Prompts of 100 tokens and fewer, or sound of the length that the model takes."""
    config = decoder_config(model)
    generator = torch.Generator().manual_seed(0)
    if hasattr(config, "num_mel_bins"):
        shape = batch_size, config.num_mel_bins, 2 * config.max_source_positions
        return {"input_features": torch.randn(shape, generator=generator).to(model.device, model.dtype)}
    ids = torch.randint(3, config.vocab_size, (batch_size, 100), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch_size):
        hidden = slice(100 - 5 * row, 100) if config.is_encoder_decoder else slice(0, 5 * row)
        mask[row, hidden] = 0
    return {"input_ids": (ids * mask).to(model.device), "attention_mask": mask.to(model.device)}


def cache_folder() -> Path:
    """Where Triton keeps what it compiles."""
    home = Path(os.environ.get("TRITON_HOME", Path.home()))
    return Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")


def kernels_on_disk() -> int:
    """How many kernels lie there, of whomever."""
    return sum(1 for _ in cache_folder().glob("*/*.cubin"))
