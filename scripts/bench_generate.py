"""Milliseconds a token of generate()'s decode, a whole model of random weights: flashcore beside sdpa in one run.

usage: python scripts/bench_generate.py [--json FILE] [--only TEXT ...] [--model Llama-3.1-8B] [--layers N] [--tokens N]

A time is that of a whole generate() less that of one that stops after its first token, the median of several, after one
that compiles or records. "graphed" is after `flashcore_hf.graphed(model)`; "seconds" is how long its very first call
took until two tokens were there, prefill, recording and compiled kernels included.
"""

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import benchmarking
import torch
from transformers import StaticCache

import flashcore_hf
from flashcore_hf.compat import CACHE_NAME
from tests.gpu.large_models import SHAPES, make_model, random_prompts


class Case(NamedTuple):
    """One way to generate.

    Attributes:
        batch_size, prompt: sequences, and tokens of the longest prompt; with several, shorter ones are padded left.
        cache: "default", "default graphed" or "static".
        slots: of a static cache made by hand, where it is larger than what is generated.
    """

    batch_size: int
    prompt: int
    cache: str
    slots: int = 0

    @property
    def name(self) -> str:
        padded = " left-padded" if self.batch_size > 1 else ""
        slots = f" {self.slots // 1024}K slots" if self.slots else ""
        return f"generate B{self.batch_size} P{self.prompt}{padded} {self.cache}{slots}"


CASES = [
    *(Case(b, 2048, cache) for cache in ("default graphed", "default") for b in (1, 16)),
    Case(1, 2048, "static"), Case(16, 2048, "static"), Case(1, 16384, "static"), Case(1, 2048, "static", 32768),
]  # fmt: skip


class Benchmark:
    """The model, and how one case is timed."""

    def __init__(self, model, tokens: int, repeats: int):
        self.model, self.tokens, self.repeats = model, tokens, repeats
        self.cuda = model.device.type == "cuda"

    def inputs(self, case: Case) -> dict[str, torch.Tensor]:
        rows = random_prompts(case.batch_size, case.prompt, self.model.config.vocab_size)
        ids = [[0] * (case.prompt - len(row)) + row for row in rows]
        mask = [[0] * (case.prompt - len(row)) + [1] * len(row) for row in rows]
        return {
            "input_ids": torch.tensor(ids, device=self.model.device),
            "attention_mask": torch.tensor(mask, device=self.model.device),
        }

    def seconds(self, inputs: dict, case: Case, tokens: int) -> float:
        options = {"cache_implementation": "static"} if case.cache == "static" else {}
        if case.slots:
            # One cache for all calls: a new one would be compiled for anew.
            if getattr(self, "static", None) is None:
                self.static = StaticCache(config=self.model.config, max_batch_size=1, max_cache_len=case.slots)
            self.static.reset()
            options = {CACHE_NAME: self.static}
        if self.cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def measure(self, case: Case, backends: list[str]) -> dict[str, dict]:
        """{backend: {"ms": milliseconds a token, "seconds": of the first call}}, the backends taken in turn.

        In turn, because a step of the default cache waits for Python, whose speed changes from minute to minute.
        """
        self.static = None
        torch.compiler.reset()
        inputs = self.inputs(case)
        first: dict[str, float] = {}
        times: dict[str, list[tuple[float, float]]] = {backend: [] for backend in backends}
        with self.graphed(case):
            for turn in range(-1, self.repeats):
                for backend, each in times.items():
                    self.model.set_attn_implementation(backend)
                    if turn < 0:
                        first[backend] = self.seconds(inputs, case, 2)
                        self.seconds(inputs, case, self.tokens)
                    else:
                        each.append((self.seconds(inputs, case, self.tokens), self.seconds(inputs, case, 1)))
        result = {}
        for backend, each in times.items():
            whole, prefill = (statistics.median(column) for column in zip(*each))
            milliseconds = (whole - prefill) / (self.tokens - 1) * 1e3
            result[backend] = {"ms": round(milliseconds, 3), "seconds": round(first[backend], 2)}
        return result

    @contextlib.contextmanager
    def graphed(self, case: Case):
        """With graphs, where the case asks for them."""
        if case.cache != "default graphed":
            yield
            return
        self.model.set_attn_implementation("flashcore")
        flashcore_hf.graphed(self.model)
        try:
            yield
        finally:
            flashcore_hf.graphed(self.model, False)

    def memory_of_steps(self, steps: int) -> dict:
        """Bytes that `steps` graphed steps allocate: none, where the cache need not grow."""
        case = Case(1, 2048, "default graphed")
        flashcore_hf.graphed(self.model)
        try:
            inputs, allocated = self.inputs(case), []
            cache = flashcore_hf.FlashCoreCache(self.model.config, max_length=case.prompt + steps + 8)
            with torch.no_grad():
                out = self.model(**inputs, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
                seen = torch.ones(1, case.prompt + steps + 8, dtype=torch.long, device=self.model.device)
                for step in range(steps + 3):
                    length = case.prompt + step
                    position = torch.tensor([[length]], device=self.model.device)
                    token = out.logits[:, -1:].argmax(-1)
                    out = self.model(
                        input_ids=token, attention_mask=seen[:, : length + 1], position_ids=position,
                        **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1,
                    )  # fmt: skip
                    allocated.append(torch.cuda.memory_stats()["requested_bytes.all.current"] if self.cuda else 0)
        finally:
            flashcore_hf.graphed(self.model, False)
        return {"steps": steps, "growth_bytes": allocated[-1] - allocated[2]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=benchmarking.RESULTS / "generate-h200.json")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name ends with one of these")
    parser.add_argument("--backends", nargs="+", default=["flashcore", "sdpa"])
    parser.add_argument("--model", choices=sorted(SHAPES), default="Llama-3.1-8B")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-steps", type=int, default=1000, help="0: leave that out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divide prompts, to try the script")
    arguments = parser.parse_args()

    model = make_model(arguments.model, device=arguments.device, layers=arguments.layers)
    benchmark = Benchmark(model, arguments.tokens, arguments.repeats)
    more = {"model": f"{arguments.model} (random weights)", "dtype": "bfloat16"}
    rows = []
    for case in CASES:
        if not any(case.name.endswith(end) for end in arguments.only):
            continue
        row = {"case": case.name, "unit": "ms/token"}
        rows.append(row)
        small = case._replace(prompt=case.prompt // arguments.shrink, slots=case.slots // arguments.shrink)
        graphed = case.cache == "default graphed"
        with _keeping(row, "case"):
            backends = [name for name in arguments.backends if name == "flashcore" or not graphed]
            for backend, times in benchmark.measure(small, backends).items():
                row[backend] = times["ms"]
                if graphed:
                    row["seconds"] = times["seconds"]
        print(row, flush=True)
        benchmarking.write(arguments.json, rows, **more)
    # The one line is held against sdpa's default cache.
    plain = {row["case"]: row for row in rows}
    for row in rows:
        other = plain.get(row["case"].removesuffix(" graphed"), {})
        if row is not other and "sdpa" in other:
            row["sdpa"] = other["sdpa"]
    if arguments.memory_steps:
        with _keeping(more, "memory"):
            model.set_attn_implementation("flashcore")
            more["memory"] = benchmark.memory_of_steps(arguments.memory_steps)
            print(more["memory"], flush=True)
    benchmarking.write(arguments.json, rows, **more)
    return 0


@contextlib.contextmanager
def _keeping(row: dict, what: str):
    """A case that fails says so in its row, and the others go on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        row[f"{what} failed"] = f"{type(error).__name__}: {error}"[:300]


if __name__ == "__main__":
    sys.exit(main())
