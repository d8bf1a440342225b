"""Fine-tune a model with LoRA (PEFT) on lines of text of different lengths, padded in batches.

    pip install peft
    python examples/finetune_lora.py --model Qwen/Qwen3-0.6B --text my.txt --save my-adapter

Without --model a tiny random model learns the sentences of a page as bytes, on any machine.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashcore_hf  # noqa: F401  importing it is what makes the name known
from flashcore_hf.parity.tiny_models import CORPUS, PAD_TOKEN_ID, make_config

IGNORED = -100  # labels that enter no loss


def load(name: str | None):
    """(model, tokenizer): the checkpoint `name`, or a tiny random model without a tokenizer."""
    if name is None:
        return AutoModelForCausalLM.from_config(make_config("llama"), attn_implementation="flashcore"), None
    model = AutoModelForCausalLM.from_pretrained(
        name, attn_implementation="flashcore", torch_dtype="auto", device_map="auto", use_safetensors=True
    )
    return model, AutoTokenizer.from_pretrained(name)


def batches(tokenizer, texts: list[str], size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of input_ids, attention_mask and labels `[size, longest]`, padded on the right."""
    if tokenizer is None:
        rows = [list(text.encode()) for text in texts]
    else:
        rows = [tokenizer(text).input_ids for text in texts]
    made = []
    for start in range(0, len(rows), size):
        batch = [torch.tensor(row) for row in rows[start : start + size]]
        pad = torch.nn.utils.rnn.pad_sequence
        made.append({
            "input_ids": pad(batch, batch_first=True, padding_value=PAD_TOKEN_ID),
            "attention_mask": pad([torch.ones_like(row) for row in batch], batch_first=True),
            "labels": pad(batch, batch_first=True, padding_value=IGNORED),
        })  # fmt: skip
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint; default: tiny and random")
    parser.add_argument("--text", type=Path, default=CORPUS, help="what to learn, a sentence or line each")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--save", type=Path, help="where the adapter goes")
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    model, tokenizer = load(arguments.model)
    model.config.use_cache = False  # nothing is generated
    if arguments.checkpointing:
        # The newer name of it is Transformers 5.24's.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate)
    texts = [line for line in arguments.text.read_text().replace(". ", ".\n").splitlines() if line]

    model.train()
    means = []
    for epoch in range(arguments.epochs):
        losses = []
        for batch in batches(tokenizer, texts, arguments.batch_size):
            loss = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        means.append(torch.stack(losses).mean().item())
        print(f"epoch {epoch + 1}: loss {means[-1]:.3f}")
    every = sum(parameter.numel() for parameter in model.parameters())
    print(f"trained {sum(p.numel() for p in trained):,} of {every:,} parameters; learned: {means[-1] < means[0]}")
    if arguments.save:
        model.save_pretrained(arguments.save)


if __name__ == "__main__":
    main()
