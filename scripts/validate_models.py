"""Full-size validation on a GPU: checkpoints made, saved and loaded back; parity, times, cache bytes, flat memory.

usage: python scripts/validate_models.py --name Llama-3.1-8B --workdir DIR --json FILE [--cells ...] [--prompt-length N]
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import benchmarking
import torch
from transformers import DynamicCache

from flashcore_hf.compat import CACHE_NAME
from flashcore_hf.parity.rules import Settings, compare_model, largest_difference, top2_gap
from flashcore_hf.parity.runs import Cell, Run, generate, load, unload, wrong_scale
from tests.gpu.large_models import SHAPES, make_model, random_prompts

CELLS = {"dynamic-1": ("dynamic", 1), "dynamic-8": ("dynamic", 8), "static-1": ("static", 1), "static-8": ("static", 8)}


def save_checkpoint(name: str, folder: Path, layers: int | None, device: str) -> Path:
    """Write `name` as sharded safetensors below `folder`, unless it is there."""
    path = folder / name
    if not (path / "config.json").exists():
        make_model(name, device=device, layers=layers).save_pretrained(path, max_shard_size="4GB")
        unload()
    return path


def timed(function) -> tuple[float, object]:
    """Seconds of `function()`, the device's work included, and what it returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    answer = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, answer


def long_prompt(model, length: int, tokens: int = 16) -> dict:
    """A prompt of `length` tokens: milliseconds of the prefill and the tokens after it, beside sdpa's.

    Once two backends choose differently their texts part, so flashcore is also asked after each of sdpa's tokens, and
    again with a wrong scale: `logits` says how far each is from sdpa, and where they would have chosen otherwise.
    """
    cell = Cell("dynamic", random_prompts(1, length, model.config.vocab_size), tokens, 0)
    record = {"prompt": length, "tokens": tokens}
    runs = {}
    for backend in ("sdpa", "flashcore"):
        model.set_attn_implementation(backend)
        generate(model, cell._replace(max_new_tokens=1))
        seconds, _ = timed(lambda: generate(model, cell._replace(max_new_tokens=1)))
        record[f"{backend}_prefill_ms"] = seconds * 1e3
        runs[backend] = generate(model, cell)
    record["tokens_equal"] = int((runs["sdpa"].tokens == runs["flashcore"].tokens).sum())
    record["paths"] = dict(runs["flashcore"].paths)
    record["logits"] = {"flashcore": beside(runs["sdpa"], generate(model, cell, forced=runs["sdpa"].tokens))}
    with wrong_scale(model):
        record["logits"]["scale x1.5"] = beside(runs["sdpa"], generate(model, cell, forced=runs["sdpa"].tokens))
    return record


def beside(reference: Run, run: Run) -> dict:
    """How far the logits of `run`, made after the reference's tokens, are from the reference's."""
    exact, got = reference.logits.float(), run.logits.float()  # [B, T, V]
    gaps, differences = top2_gap(exact), largest_difference(exact, got)
    return {
        "relative_rms": ((exact - got).square().mean().sqrt() / exact.square().mean().sqrt()).item(),
        "other_choices": [
            {"step": int(step), "top2_gap": gaps[b, step].item(), "largest_difference": differences[b, step].item()}
            for b, step in (run.tokens != reference.tokens).nonzero()
        ],
    }


@torch.no_grad()
def flat_memory(model, prompt_length: int, steps: int) -> dict:
    """Bytes of the cache beside what multi-head attention would need, and what `steps` decode steps allocate."""
    model.set_attn_implementation("flashcore")
    config, device = model.config, model.device
    ids = torch.tensor(random_prompts(1, prompt_length, config.vocab_size), device=device)
    cache = DynamicCache(config=config)

    def step(tokens):
        output = model(tokens, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
        return output.logits[:, -1:].argmax(-1)

    def cached_bytes() -> int:
        return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))

    def allocated() -> int:
        """Bytes that live tensors asked for, without the allocator's rounding."""
        return torch.cuda.memory_stats()["requested_bytes.all.current"] if torch.cuda.is_available() else 0

    token = step(step(ids))
    before, before_cached = allocated(), cached_bytes()
    head_dim = config.hidden_size // config.num_attention_heads
    mha = 2 * config.num_hidden_layers * config.num_attention_heads * head_dim * 2 * cache.get_seq_length()
    for _ in range(steps):
        token = step(token)
    return {
        "kv_bytes": before_cached,
        "mha_bytes": mha,
        "share_of_mha": before_cached / mha,
        "heads_ratio": config.num_key_value_heads / config.num_attention_heads,
        "steps": steps,
        "kv_growth_bytes": cached_bytes() - before_cached,
        "allocated_growth_bytes": allocated() - before,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", choices=sorted(SHAPES), required=True)
    parser.add_argument("--workdir", type=Path, required=True, help="where the checkpoint is written (16 GB)")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cells", nargs="+", choices=sorted(CELLS), default=sorted(CELLS))
    parser.add_argument("--prompt-length", type=int, default=2048)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--long-prompt", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()

    path = save_checkpoint(arguments.name, arguments.workdir, arguments.layers, arguments.device)
    device_map = "auto" if arguments.device == "cuda" else arguments.device
    vocabulary = SHAPES[arguments.name]["vocab_size"]
    cells = [
        Cell(cache, random_prompts(batch_size, arguments.prompt_length, vocabulary), arguments.max_new_tokens, 0)
        for cache, batch_size in (CELLS[name] for name in arguments.cells)
    ]
    record = {
        "model": f"{arguments.name} (random weights)",
        **benchmarking.header(),
        "python": platform.python_version(),
    }

    def write() -> None:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")

    model = load(str(path), "flashcore", torch.bfloat16, device_map)
    record["memory"] = flat_memory(model, min(arguments.prompt_length, 1024), arguments.steps)
    write()
    if arguments.long_prompt:
        record["long_prompt"] = long_prompt(model, arguments.long_prompt)
        write()
    del model
    unload()

    settings = Settings(arguments.name, str(path), torch.bfloat16, device_map, ("sdpa",), cells)
    rows = compare_model(settings, lambda what, steps: None)
    record["parity"] = [{**asdict(row), "passed": row.passed} for row in rows]
    write()

    memory = record["memory"]
    failures = [failure for row in rows for failure in row.failures]
    if memory["share_of_mha"] != memory["heads_ratio"]:
        failures.append(f"the cache takes {memory['share_of_mha']} of MHA's bytes, not {memory['heads_ratio']}")
    if memory["allocated_growth_bytes"] != memory["kv_growth_bytes"] and torch.cuda.is_available():
        failures.append("decoding allocates more than the cache's growth")
    record["failures"] = failures
    write()
    print(json.dumps(record, indent=1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
