"""Milliseconds a token of generate()'s decode, whole models of random weights: flashcore beside sdpa in one run.

usage: python scripts/bench_generate.py [--json FILE] [--only TEXT ...] [--list] [--tiny --device cpu]
       [--model Llama-3.1-8B] [--layers N] [--tokens N] [--minutes M]

A time is that of a whole generate() less that of one that stops after its first token, the median of several, after one
that compiles or records. "graphed" is after `flashcore_hf.graphed(model)`, "liger" after Liger's kernels were put into
the model before that; "seconds" is how long its very first call took until two tokens were there, prefill, recording
and compiled kernels included. Cases come in the order of their weight; the record names those that --minutes left out.
"""

import argparse
import contextlib
import importlib
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import benchmarking
import torch
import transformers
from transformers import StaticCache

import flashcore_hf
from flashcore_hf.compat import CACHE_NAME
from tests.gpu import large_encoder_decoders
from tests.gpu.large_models import SHAPES, make_model, random_prompts

WHISPER, T5 = large_encoder_decoders.SHAPES
LIGER = "graphed liger"


class Case(NamedTuple):
    """One way to generate.

    Attributes:
        batch_size, prompt: sequences, and tokens of the longest prompt or source; with several, others are padded.
        cache: "default graphed", "graphed liger", "default" or "static"; "lookup graphed" and "lookup" are with
            prompt-lookup decoding, and their rows say how many tokens a forward brought.
        slots: of a static cache made by hand, where it is larger than what is generated.
        model: of an encoder-decoder, its name; else "".
        backends: those that are worth a row.
    """

    batch_size: int
    prompt: int
    cache: str
    slots: int = 0
    model: str = ""
    backends: tuple[str, ...] = ("flashcore", "sdpa")

    @property
    def name(self) -> str:
        padded = " left-padded" if self.batch_size > 1 and not self.model else ""
        slots = f" {self.slots // 1024}K slots" if self.slots else ""
        prompt = {"": f"P{self.prompt}", WHISPER: "30s", T5: f"S{self.prompt}"}[self.model]
        model = f"{self.model} " if self.model else ""
        return f"generate {model}B{self.batch_size} {prompt}{padded} {self.cache}{slots}"

    @property
    def graphed(self) -> bool:
        return "graphed" in self.cache

    def beside(self, cache: str) -> str:
        """The name of the row with another cache."""
        return self._replace(cache=cache).name

    @property
    def plain(self) -> str:
        """The name of the row that `sdpa` is taken from."""
        return self.beside("lookup" if "lookup" in self.cache else "default")


PAIRS = [(model, length, batch) for model, length in ((WHISPER, 1500), (T5, 512)) for batch in (1, 16)]
CASES = [
    *(Case(b, 2048, cache) for cache in ("default graphed", LIGER, "default") for b in (1, 16)),
    Case(1, 2048, "lookup graphed"), Case(1, 2048, "lookup"),
    *(Case(b, length, cache, model=m) for cache in ("default graphed", "default") for m, length, b in PAIRS),
    Case(1, 2048, "static"), Case(16, 2048, "static"), Case(1, 16384, "static"), Case(1, 2048, "static", 32768),
    *(Case(b, length, "static", model=m, backends=("sdpa",)) for m, length, b in PAIRS),
]  # fmt: skip


class Models:
    """The models, each made when it is first asked for."""

    def __init__(self, arguments):
        self.arguments, self.made = arguments, {}

    def __getitem__(self, name: str):
        if name not in self.made:
            device, tiny = self.arguments.device, self.arguments.tiny
            if name:
                model = large_encoder_decoders.make_model(name, device=device, tiny=tiny)
            else:
                layers = 1 if tiny else self.arguments.layers
                model = make_model(self.arguments.model, device=device, layers=layers, tiny=tiny)
            self.made[name] = model
        return self.made[name]


class Benchmark:
    """How one case is timed."""

    def __init__(self, models: Models, tokens: int, repeats: int):
        self.models, self.tokens, self.repeats = models, tokens, repeats
        self.cuda = models.arguments.device != "cpu"
        self.static = None

    def inputs(self, case: Case) -> dict[str, torch.Tensor]:
        model = self.models[case.model]
        if case.model:
            return large_encoder_decoders.source(model, case.batch_size, case.prompt)
        rows = random_prompts(case.batch_size, case.prompt, model.config.vocab_size)
        ids = [[0] * (case.prompt - len(row)) + row for row in rows]
        mask = [[0] * (case.prompt - len(row)) + [1] * len(row) for row in rows]
        return {
            "input_ids": torch.tensor(ids, device=model.device),
            "attention_mask": torch.tensor(mask, device=model.device),
        }

    def seconds(self, inputs: dict, case: Case, tokens: int) -> float:
        model = self.models[case.model]
        options = {"cache_implementation": "static"} if case.cache == "static" else {}
        if "lookup" in case.cache:
            options = {"prompt_lookup_num_tokens": 4}
        if case.slots:
            # One cache for all calls: a new one would be compiled for anew.
            if self.static is None:
                self.static = StaticCache(config=model.config, max_batch_size=1, max_cache_len=case.slots)
            self.static.reset()
            options = {CACHE_NAME: self.static}
        if self.cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def measure(self, case: Case, backends: list[str]) -> dict[str, dict]:
        """{backend: {"ms": milliseconds a token, "seconds": of the first call, "brought": tokens a forward}}.

        The backends are taken in turn, because a step of the default cache waits for Python, whose speed changes from
        minute to minute.
        """
        self.static = None
        torch.compiler.reset()
        inputs = self.inputs(case)
        first: dict[str, float] = {}
        times: dict[str, list[tuple[float, float]]] = {backend: [] for backend in backends}
        with self.graphed(case):
            for turn in range(-1, self.repeats):
                for backend, each in times.items():
                    self.models[case.model].set_attn_implementation(backend)
                    if turn < 0:
                        first[backend] = self.seconds(inputs, case, 2)
                        self.seconds(inputs, case, self.tokens)
                    else:
                        each.append((self.seconds(inputs, case, self.tokens), self.seconds(inputs, case, 1)))
            brought = self.brought(inputs, case) if "lookup" in case.cache else 1.0
        result = {}
        for backend, each in times.items():
            whole, prefill = (statistics.median(column) for column in zip(*each))
            milliseconds = (whole - prefill) / (self.tokens - 1) * 1e3
            result[backend] = {
                "ms": round(milliseconds, 3), "seconds": round(first[backend], 2), "brought": round(brought, 2)
            }  # fmt: skip
        return result

    def brought(self, inputs: dict, case: Case) -> float:
        """Tokens that a forward after the first brings, on average."""
        forwards = []
        hook = self.models[case.model].register_forward_pre_hook(lambda *rest: forwards.append(1))
        self.seconds(inputs, case, self.tokens)
        hook.remove()
        return (self.tokens - 1) / (len(forwards) - 1)

    @contextlib.contextmanager
    def graphed(self, case: Case):
        """With graphs and Liger's kernels, where the case asks for them."""
        model = self.models[case.model]
        if not case.graphed:
            yield
            return
        model.set_attn_implementation("flashcore")
        with liger(model) if case.cache == LIGER else contextlib.nullcontext():
            flashcore_hf.graphed(model)
            try:
                yield
            finally:
                flashcore_hf.graphed(model, False)

    def memory_of_steps(self, steps: int) -> dict:
        """Bytes that `steps` graphed steps allocate: none, where the cache need not grow."""
        case = Case(1, 2048, "default graphed")
        model = self.models[""]
        model.set_attn_implementation("flashcore")
        flashcore_hf.graphed(model)
        try:
            inputs, allocated = self.inputs(case), []
            cache = flashcore_hf.FlashCoreCache(model.config, max_length=case.prompt + steps + 8)
            with torch.no_grad():
                out = model(**inputs, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
                seen = torch.ones(1, case.prompt + steps + 8, dtype=torch.long, device=model.device)
                for step in range(steps + 3):
                    length = case.prompt + step
                    position = torch.tensor([[length]], device=model.device)
                    token = out.logits[:, -1:].argmax(-1)
                    out = model(
                        input_ids=token, attention_mask=seen[:, : length + 1], position_ids=position,
                        **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1,
                    )  # fmt: skip
                    allocated.append(torch.cuda.memory_stats()["requested_bytes.all.current"] if self.cuda else 0)
        finally:
            flashcore_hf.graphed(model, False)
        return {"steps": steps, "growth_bytes": allocated[-1] - allocated[2]}


@contextlib.contextmanager
def liger(model):
    """With Liger's kernels in the model, as the README says to put them there; without them afterwards."""
    import liger_kernel.transformers

    apply = getattr(liger_kernel.transformers, f"apply_liger_kernel_to_{model.config.model_type}")
    module = importlib.import_module(type(model).__module__)
    before = dict(vars(module))
    apply(model=model, fused_linear_cross_entropy=False)
    try:
        yield
    finally:
        vars(module).update(before)
        for each in model.modules():
            vars(each).pop("forward", None)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="generate-h200.json of the results, where not --tiny")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name ends with one of these")
    parser.add_argument("--list", action="store_true", help="the cases' names, and nothing else")
    parser.add_argument("--backends", nargs="+", default=["flashcore", "sdpa"])
    parser.add_argument("--model", choices=sorted(SHAPES), default="Llama-3.1-8B")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no row after that (8)")
    parser.add_argument("--memory-steps", type=int, default=1000, help="0: leave that out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models, prompts, and few tokens: to try the script")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.tokens, arguments.repeats = 4, 1
        arguments.memory_steps = min(arguments.memory_steps, 4)
    return arguments


def main() -> int:
    arguments = parse()
    chosen = [case for case in CASES if any(case.name.endswith(end) for end in arguments.only)]
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return 0
    transformers.logging.set_verbosity_error()
    more = {"model": f"{arguments.model} (random weights)", "dtype": "bfloat16"}
    path = benchmarking.target(arguments, "generate-h200.json")
    record = benchmarking.Record(path, minutes=arguments.minutes, **more)
    benchmark = Benchmark(Models(arguments), arguments.tokens, arguments.repeats)
    measured: dict[str, dict] = {}
    for case in record.each(chosen, lambda case: case.name):
        row = measured[case.name] = {"case": case.name, "unit": "ms/token"}
        shrink = 64 if arguments.tiny else 1
        small = case._replace(prompt=case.prompt // shrink, slots=case.slots // shrink)
        with _keeping(row, "case"):
            backends = [name for name in arguments.backends if name in case.backends]
            if case.graphed:
                backends = ["flashcore"]
            for backend, times in benchmark.measure(small, backends).items():
                row[backend] = times["ms"]
                if case.graphed:
                    row["seconds"] = times["seconds"]
                if "lookup" in case.cache:
                    row["tokens a forward"] = times["brought"]
        print(row, flush=True)
        record.add(row)
        # The one line is held against sdpa's default cache, which comes later in the same run.
        for other in (other for other in chosen if other.graphed and other.plain == case.name and "sdpa" in row):
            if other.name in measured:
                record.add(measured[other.name] | {"sdpa": row["sdpa"]})
    if arguments.memory_steps and not all(case.model for case in chosen) and not record.over:
        memory: dict = {}
        with _keeping(memory, "memory"):
            memory = benchmark.memory_of_steps(arguments.memory_steps)
        print(memory, flush=True)
        record.note(memory=memory)
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
