"""One line that makes generate() replay CUDA graphs, and a cache in preallocated buffers, also in fp8.

On a GPU decode steps are replayed; elsewhere a warning says that they run as ever, and the answers are the same.
"""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import flashcore_hf
from flashcore_hf.compat import CACHE_NAME  # "cache"; before Transformers 5.24, "past_key_values"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-new-tokens", type=int, default=8)
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.18, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="flashcore").to(device).eval()
    prompt = torch.arange(3, 12, device=device)[None]
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": arguments.max_new_tokens,
        "do_sample": False,
    }

    plain = model.generate(prompt, **options)
    flashcore_hf.graphed(model)
    print("equal with graphs:", torch.equal(model.generate(prompt, **options), plain))
    flashcore_hf.graphed(model, False)

    cache = flashcore_hf.FlashCoreCache(model.config)
    with_cache = model.generate(prompt, **{CACHE_NAME: cache}, **options)
    print("equal with a FlashCoreCache:", torch.equal(with_cache, plain))

    half = flashcore_hf.FlashCoreCache(model.config, dtype=torch.float8_e4m3fn)
    model.generate(prompt, **{CACHE_NAME: half}, **options)
    print("bytes of keys in one layer:", cache.layers[0].keys.nbytes, "and in fp8:", half.layers[0].keys.nbytes)


if __name__ == "__main__":
    main(sys.argv[1:])
