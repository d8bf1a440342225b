"""Decode with a static cache and a compiled step: one graph, whatever the length.

The step is compiled with fullgraph=True, so any graph break would be an error, and it is compiled once: flashcore reads
how many slots are filled from device memory.

    python examples/static_cache_compile.py --model meta-llama/Llama-3.1-8B
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

import flashcore_hf  # noqa: F401
from flashcore_hf.compat import CACHE_NAME  # "cache"; before Transformers 5.24, "past_key_values"
from flashcore_hf.parity.tiny_models import make_config

TEXT = "The cache is the desk on which"


def decode(model, step, input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
    """Greedy decoding through `step`: input_ids `[B, S]` -> new tokens `[B, max_new_tokens]`."""
    batch_size, length = input_ids.shape
    cache = StaticCache(
        config=model.config,
        max_batch_size=batch_size,
        max_cache_len=length + max_new_tokens,
        device=model.device,
        dtype=model.dtype,
    )
    position = torch.arange(length, device=model.device)
    logits = model(input_ids, **{CACHE_NAME: cache}, cache_position=position, use_cache=True).logits
    tokens = [logits[:, -1:].argmax(-1)]  # [B, 1]
    for i in range(length, length + max_new_tokens - 1):
        position = torch.tensor([i], device=model.device)
        logits = step(
            tokens[-1],
            **{CACHE_NAME: cache},
            cache_position=position,
            position_ids=position[None].expand(batch_size, 1),
            use_cache=True,
        ).logits
        tokens.append(logits[:, -1:].argmax(-1))
    return torch.cat(tokens, dim=1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; default: tiny and random")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    arguments = parser.parse_args(argv)

    if arguments.model is None:
        model = AutoModelForCausalLM.from_config(make_config("llama"), attn_implementation="flashcore").eval()
        input_ids = torch.tensor([list(TEXT.encode())])  # [1, S]
    else:
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, attn_implementation="flashcore", torch_dtype="auto", device_map="auto"
        )
        input_ids = AutoTokenizer.from_pretrained(arguments.model)(TEXT, return_tensors="pt").input_ids.to(model.device)

    # On a CPU there is nothing for inductor to win; "eager" still captures the whole graph.
    step = torch.compile(model.forward, fullgraph=True, backend="inductor" if model.device.type == "cuda" else "eager")
    with torch.inference_mode():
        compiled = decode(model, step, input_ids, arguments.max_new_tokens)
        plain = decode(model, model.forward, input_ids, arguments.max_new_tokens)
    print(f"{compiled.shape[1]} tokens for each of {compiled.shape[0]} sequences")
    print(f"the same tokens with and without compiling: {torch.equal(compiled, plain)}")


if __name__ == "__main__":
    main()
