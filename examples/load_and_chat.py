"""Load a model with flashcore and answer in turns, keeping the cache from turn to turn.

    python examples/load_and_chat.py --model meta-llama/Llama-3.1-8B-Instruct "What is a KV cache?" "And why keep it?"

Without --model a tiny model with random weights speaks bytes, on any machine.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import flashcore_hf  # noqa: F401  importing it is what makes the name known
from flashcore_hf.compat import CACHE_NAME  # "cache"; before Transformers 5.24, "past_key_values"
from flashcore_hf.parity.tiny_models import make_config


def load(name: str | None):
    """(model, tokenizer): the checkpoint `name`, or a tiny random model without a tokenizer."""
    if name is None:
        return AutoModelForCausalLM.from_config(make_config("llama"), attn_implementation="flashcore").eval(), None
    model = AutoModelForCausalLM.from_pretrained(
        name, attn_implementation="flashcore", torch_dtype="auto", device_map="auto", use_safetensors=True
    )
    return model, AutoTokenizer.from_pretrained(name)


def encode(tokenizer, conversation: list[dict]) -> torch.Tensor:
    """The conversation as input_ids `[1, S]`."""
    if tokenizer is None:
        return torch.tensor([list("".join(f"{turn['content']}\n" for turn in conversation).encode())])
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", default=["Hello?", "And then?"])
    parser.add_argument("--model", help="a checkpoint with a chat template; default: tiny and random")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    arguments = parser.parse_args(argv)

    model, tokenizer = load(arguments.model)
    # generate() computes only the tokens that the cache has not seen: each turn costs its own length.
    cache = DynamicCache()
    conversation = []
    for question in arguments.questions:
        conversation.append({"role": "user", "content": question})
        input_ids = encode(tokenizer, conversation).to(model.device)  # [1, S]
        tokens = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            **{CACHE_NAME: cache},
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
        )[0, input_ids.shape[1] :]
        if tokenizer is None:
            answer = bytes(tokens.tolist()).decode("latin-1")
        else:
            answer = tokenizer.decode(tokens, skip_special_tokens=True)
        conversation.append({"role": "assistant", "content": answer})
        print(f"> {question}\n{answer!r}\n({cache.get_seq_length()} tokens in the cache)")


if __name__ == "__main__":
    main()
