"""Many requests at once by continuous batching, whose keys and values lie in pages: each gets what it gets alone.

generate_batch() takes all of them; a manager takes them as they come, and hands out tokens as they are made.
"""

import argparse
import inspect
import sys

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, LlamaConfig

import flashcore_hf  # noqa: F401 - makes the name known


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
    prompts = [list(range(3, 3 + length)) for length in (5, 30, 1, 12)]
    generation = GenerationConfig(
        max_new_tokens=arguments.max_new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # Without these most of the memory becomes pages, which is what a server of one model wants.
    page = "page_size" if "page_size" in inspect.signature(ContinuousBatchingConfig).parameters else "block_size"
    batching = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64, **{page: 16})

    answers = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=batching)
    for prompt, answer in zip(prompts, answers.values()):
        ids = torch.tensor([prompt], device=device)
        alone = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=arguments.max_new_tokens, do_sample=False
        )
        same = alone[0, len(prompt) :].tolist() == answer.generated_tokens
        print(f"{len(prompt)} tokens in, {answer.generated_tokens} out; the same alone: {same}")

    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=batching
    ) as manager:
        name = manager.add_request(prompts[1], streaming=True)
        for answer in manager.request_id_iter(name):
            print("streamed so far:", answer.generated_tokens)
            if answer.is_finished():
                break


if __name__ == "__main__":
    main(sys.argv[1:])
