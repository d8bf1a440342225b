"""Small byte-level LLaMA and Mistral checkpoints, trained on the text that this package ships.

Comparing backends on random weights proves little: the logits are flat, every token is a near-tie, and a softmax scale
that is wrong by half goes unnoticed. Two layers that have learned a page by heart give peaked logits, in less than two
minutes of CPU time for each model, with nothing to download. A page and not five: what is half learned ends in
near-ties, where rounding to 16 bits decides.

A token is a byte. Byte 0 does not occur in text, and pads.
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

PAD_TOKEN_ID = 0
CORPUS = Path(__file__).parents[1] / "data" / "corpus.txt"

# GQA 4:1. The Mistral window is shorter than most prompts and than what is generated.
_SHAPE = dict(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=PAD_TOKEN_ID,
)
_EXTRA = {"llama": dict(mlp_bias=False), "mistral": dict(sliding_window=64)}
STEPS = 320
_BATCH, _LENGTH = 8, 256
_LEARNING_RATE = 4e-3
FAMILIES = tuple(_EXTRA)


def corpus_tokens() -> torch.Tensor:
    """The shipped text as byte tokens, int64 `[N]`."""
    return torch.tensor(list(CORPUS.read_bytes()))


def prompts(batch_size: int, longest: int = 100) -> list[list[int]]:
    """Byte prompts from the shipped text: the first of `longest` tokens, the others shorter in even steps.

    Different lengths make a batch that needs padding. Behind its end the text begins anew, as in training.
    """
    text = corpus_tokens().tolist()
    shorter = max(3 * longest // (4 * max(batch_size - 1, 1)), 1)
    lengths = [max(longest - i * shorter, 1) for i in range(batch_size)]
    starts = [i * len(text) // batch_size for i in range(batch_size)]
    return [(text[start:] + text * (length // len(text) + 1))[:length] for start, length in zip(starts, lengths)]


def make_config(family: str):
    """The Transformers configuration of the tiny model of `family` ("llama" or "mistral")."""
    from transformers import LlamaConfig, MistralConfig

    if family not in _EXTRA:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    kind = {"llama": LlamaConfig, "mistral": MistralConfig}[family]
    return kind(**_SHAPE, **_EXTRA[family])


def train(family: str, steps: int = STEPS, on_step: Callable[[int, float], None] | None = None):
    """Train the tiny model of `family` on the shipped text, on the CPU, always from the same seed.

    Args:
        family: "llama" or "mistral".
        steps: optimiser steps of 8 sequences of 256 tokens.
        on_step: called after each step with its number, from 1, and its loss in nats per byte.

    Returns:
        the model, in float32, in eval mode.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(make_config(family), attn_implementation="sdpa")
        model.train()
        text = corpus_tokens()
        optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.1)
        for step in range(1, steps + 1):
            # The text goes round, so that its first words are learned as well as the others.
            start = torch.randint(len(text), (_BATCH, 1))
            tokens = text[(start + torch.arange(_LENGTH + 1)) % len(text)]  # [B, S + 1]
            logits = model(tokens[:, :-1], use_cache=False).logits  # [B, S, 256]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step(step, loss.item())
    return model.eval()


def ensure_checkpoint(family: str, folder: Path, on_step: Callable[[int, float], None] | None = None) -> Path:
    """The safetensors checkpoint of `family` under `folder`, trained if it is not there yet.

    A checkpoint is known by its configuration, its training and its text, so one that a changed package made is left
    alone and a new one is trained beside it.
    """
    recipe = [_SHAPE, _EXTRA[family], STEPS, _BATCH, _LENGTH, _LEARNING_RATE]
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode() + CORPUS.read_bytes()).hexdigest()[:12]
    path = folder / f"tiny-{family}-{digest}"
    # Written last, so that an interrupted run is not taken for a finished one.
    done = path / "trained.json"
    if not done.exists():
        began = time.perf_counter()
        losses: list[float] = []

        def keep(step: int, loss: float) -> None:
            losses.append(loss)
            if on_step is not None:
                on_step(step, loss)

        train(family, on_step=keep).save_pretrained(path)
        done.write_text(json.dumps({"loss": losses[-1], "seconds": time.perf_counter() - began}))
    return path
