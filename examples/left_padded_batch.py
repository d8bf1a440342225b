"""Prompts of different lengths in one batch: padded on the left, and each computed as if it were alone.

python examples/left_padded_batch.py --model mistralai/Mistral-7B-v0.1
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashcore_hf  # noqa: F401
from flashcore_hf.parity.tiny_models import PAD_TOKEN_ID, make_config

PROMPTS = ["Bread, salt, a knife, a rope,", "The ferry crosses", "What the mind does not need it should"]


def encode(tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask `[B, longest]`, padded on the left."""
    if tokenizer is None:
        longest = max(len(text) for text in texts)
        ids = [[PAD_TOKEN_ID] * (longest - len(text)) + list(text.encode()) for text in texts]
        input_ids = torch.tensor(ids)
        return input_ids, (input_ids != PAD_TOKEN_ID).long()
    # Decoder-only models continue at the right end, so that is where the texts must end.
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return batch.input_ids, batch.attention_mask


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; default: tiny and random")
    parser.add_argument("--max-new-tokens", type=int, default=12)
    arguments = parser.parse_args(argv)

    if arguments.model is None:
        model, tokenizer = (
            AutoModelForCausalLM.from_config(make_config("mistral"), attn_implementation="flashcore").eval(),
            None,
        )
    else:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model, attn_implementation="flashcore", torch_dtype="auto", device_map="auto"
        )

    options = dict(max_new_tokens=arguments.max_new_tokens, do_sample=False, pad_token_id=PAD_TOKEN_ID)
    input_ids, attention_mask = (tensor.to(model.device) for tensor in encode(tokenizer, PROMPTS))
    together = model.generate(input_ids, attention_mask=attention_mask, **options)[:, input_ids.shape[1] :]
    for row, text in enumerate(PROMPTS):
        input_ids, attention_mask = (tensor.to(model.device) for tensor in encode(tokenizer, [text]))
        alone = model.generate(input_ids, attention_mask=attention_mask, **options)[0, input_ids.shape[1] :]
        same = torch.equal(alone, together[row, : len(alone)])
        said = repr(bytes(alone.tolist())) if tokenizer is None else tokenizer.decode(alone)
        print(f"{text} ... {said}\n    the same alone and in the batch: {same}")


if __name__ == "__main__":
    main()
