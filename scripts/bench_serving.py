"""Continuous batching: tokens a second of generate_batch(), time between tokens under arrivals, and the paged kernels.

usage: python scripts/bench_serving.py [--json FILE] [--only TEXT ...] [--fa3 FOLDER] [--minutes N] [--tiny]

Models have random weights, made on the GPU. A backend's first run of a case compiles and records CUDA graphs; it is not
counted but named: "first answer" is how many seconds it took to the first token, "seconds" to the last (columns without
a name are flashcore's). The second has other prompts of the same lengths. sdpa, which is many times slower, runs once,
on every eighth request: its column "sdpa requests" says on how many. Memory is the most that PyTorch's allocator gave
out in both runs, pages of 0.9 of the GPU included, and beside it without them. FOLDER holds two modules:
`fa3_interface` with FlashAttention-3's functions, and `peers`, which loads its binaries with `setup(FOLDER)`.

Kernel rows are microseconds in CUDA graphs: "flashcore" on pages of 256 keys, "without pages" this library's own on
contiguous keys. The record is written after each of them and after each backend of a case. Nothing begins when the
minutes are over; a minute after that the program ends, whatever hangs. Rows name who was left out, and why.
"""

import argparse
import functools
import gc
import inspect
import os
import random
import statistics
import sys
import threading
import time
import traceback
import types
from collections import defaultdict
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NamedTuple

import benchmarking
import torch
from flashcore_kernels import Pages, attention, paged_attention
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

import flashcore_hf  # noqa: F401
from tests.gpu.large_models import SHAPES, make_model

PAGE = 256
SDPA_SHARE = 8  # one request of so many


class Case(NamedTuple):
    """A workload.

    Attributes:
        name: as in the row.
        model: of SHAPES.
        requests, shortest, longest: how many prompts, and tokens of each.
        tokens: new ones for each.
        rate: requests that arrive in a second; 0: all at once.
        backends: who runs it.
    """

    name: str
    model: str
    requests: int
    shortest: int
    longest: int
    tokens: int
    rate: float = 0.0
    backends: tuple[str, ...] = ("flashcore", "fa3")

    @property
    def lengths(self) -> list[int]:
        """Of the prompts, the same at every call."""
        chance = random.Random(0)
        return [chance.randint(self.shortest, self.longest) for _ in range(self.requests)]


LLAMA, MISTRAL = "Llama-3.1-8B", "Mistral-7B-v0.1"
CASES = (
    Case("generate_batch 8B 192 requests", LLAMA, 192, 64, 1023, 128, backends=("flashcore", "fa3", "sdpa")),
    Case("generate_batch 7B window 4096, 32 requests of 6K", MISTRAL, 32, 6144, 6144, 128),
    Case("generate_batch 8B 32 requests of 8K", LLAMA, 32, 8192, 8192, 256),
    Case("arrivals 8B 16 a second", LLAMA, 128, 64, 1023, 128, rate=16.0),
)
# (name, sequences, keys of each, query heads, KV heads, new tokens of each)
KERNELS = (
    ("paged decode B1 S8192", 1, 8192, 32, 8, 1),
    ("paged decode B16 S2048", 16, 2048, 32, 8, 1),
    ("paged decode B64 S4096", 64, 4096, 32, 8, 1),
    ("paged decode B192 S640", 192, 640, 32, 8, 1),
    ("paged prefill B8 S2048", 8, 2048, 32, 8, 2048),
    ("paged prefill B1 S8192", 1, 8192, 32, 8, 8192),
)


def prompts_of(case: Case, vocabulary: int, seed: int) -> list[list[int]]:
    """Random ones: nothing is shared between them, nor with those of another seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in case.lengths]


def batching_config(tiny: bool) -> ContinuousBatchingConfig:
    known = inspect.signature(ContinuousBatchingConfig).parameters
    page = "page_size" if "page_size" in known else "block_size"
    options = {"num_blocks": 32, "max_batch_tokens": 64, page: 16} if tiny else {page: PAGE}
    if "auto_switch_to_flash" in known:
        options["auto_switch_to_flash"] = False  # sdpa is to stay what it is
    return ContinuousBatchingConfig(**options)


def generation_config(case: Case) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=case.tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)


def batch_seconds(model, case: Case, prompts: list[list[int]], tiny: bool) -> tuple[float, float]:
    """(seconds of a whole generate_batch(), seconds to its first token); its graphs are kept for the next one."""
    began = time.perf_counter()
    answers = model.generate_batch(
        prompts, generation_config=generation_config(case), continuous_batching_config=batching_config(tiny),
        persistent_manager=True, record_timestamps=True,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    made = sum(len(answer.generated_tokens) for answer in answers.values())
    if made != len(prompts) * case.tokens:
        raise RuntimeError(f"{made} tokens came back of {len(prompts) * case.tokens}")
    return seconds, min(answer.timestamps[0] for answer in answers.values()) - began


def memory_of(model, column: str) -> dict[str, float]:
    """Columns: the most memory since the last reset of the peak, GiB, with and without the pages of the manager."""
    if not torch.cuda.is_available():
        return {}
    most, cache = torch.cuda.max_memory_allocated(), model._cached_continuous_batching_manager.batch_processor.cache
    # Before 5.23 there are two tensors for each place in a group of layers, from then on one for all of them.
    kept = [tensor for held in vars(cache).values() for tensor in (held if isinstance(held, list) else [held])]
    pools = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in kept
        if isinstance(tensor, torch.Tensor)
    }
    rest = most - sum(pools.values())
    return {f"peak GiB{column}": round(most / 2**30, 1), f"without pages GiB{column}": round(rest / 2**30, 1)}


def arrival_times(model, case: Case, prompts: list[list[int]], tiny: bool) -> dict[str, float]:
    """Percentiles of the time between tokens and to the first one, milliseconds, with requests that arrive in time."""
    chance, gaps, first = random.Random(1), [], []
    with model.continuous_batching_context_manager(
        generation_config=generation_config(case), continuous_batching_config=batching_config(tiny),
        persistent_manager=True,
    ) as manager:  # fmt: skip
        submitted, due = {}, time.perf_counter()
        for prompt in prompts:
            due += chance.expovariate(case.rate)
            time.sleep(max(due - time.perf_counter(), 0.0))
            began = time.perf_counter()
            name = manager.add_request(prompt, max_new_tokens=case.tokens, record_timestamps=True)
            submitted[name] = began
        for _ in prompts:
            answer = manager.get_result(timeout=120)
            if answer is None or answer.error is not None:
                raise RuntimeError(f"a request failed: {answer and answer.error}")
            stamps = answer.timestamps
            gaps += [(b - a) * 1e3 for a, b in zip(stamps, stamps[1:])]
            first.append((stamps[0] - submitted[answer.request_id]) * 1e3)
    gaps, first = (statistics.quantiles(values, n=100) for values in (gaps, first))
    times = {"p50": gaps[49], "p99": gaps[98], "first p50": first[49], "first p99": first[98]}
    return {name: round(value, 2) for name, value in times.items()}


def run_case(model, case: Case, backend: str, tiny: bool) -> dict:
    """What a backend's columns of a row hold."""
    model.set_attn_implementation({"fa3": "flash_attention_3", "sdpa": "sdpa"}.get(backend, backend))
    if backend == "sdpa" and "paged|sdpa" in flashcore_hf.compat.attention_registry():
        model.set_attn_implementation("paged|sdpa")  # before 5.22
    column = "" if backend == "flashcore" else f" {backend}"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    prompts = [prompts_of(case, model.config.vocab_size, seed) for seed in (0, 1)]
    try:
        if case.rate:
            for each in prompts:
                times = arrival_times(model, case, each, tiny)
            answer = {backend: times["p99"], **{f"{name}{column}": value for name, value in times.items()}}
        elif backend == "sdpa":
            some = prompts[0][::SDPA_SHARE]
            seconds, _ = batch_seconds(model, case, some, tiny)
            answer = {backend: round(len(some) * case.tokens / seconds, 1), "sdpa requests": len(some)}
        else:
            seconds, first = batch_seconds(model, case, prompts[0], tiny)
            again, _ = batch_seconds(model, case, prompts[1], tiny)
            answer = {backend: round(case.requests * case.tokens / again, 1), f"first answer{column}": round(first, 2)}
            answer[f"seconds{column}"] = round(seconds, 2)
        return answer | memory_of(model, column)
    finally:
        model.destroy_cached_continuous_batching_manager()
        gc.collect()


def make_pages(batch_size: int, length: int, heads: int, tokens: int, device: str) -> tuple[torch.Tensor, Pages]:
    """(queries, pages) with every sequence's pages all over the pool."""
    width = -(-length // PAGE)
    pool = torch.randn(2, batch_size * width, PAGE, heads, 128, dtype=torch.bfloat16, device=device)
    table = torch.randperm(batch_size * width, device=device).view(batch_size, width).int()
    cu = torch.arange(batch_size + 1, device=device, dtype=torch.int32) * tokens
    lengths = torch.full((batch_size,), length, device=device, dtype=torch.int32)
    return cu, Pages(pool[0], pool[1], table, cu, lengths)


def kernel_row(
    name: str, batch_size: int, length: int, heads: int, kv_heads: int, tokens: int, fa3, tiny: bool
) -> dict:
    """Times of one layer's attention."""
    device = "cuda"
    if tiny:
        batch_size, length, tokens, device = min(batch_size, 3), 300, min(tokens, 300), _device()
    size = 2 * 2 * batch_size * length * kv_heads * 128
    calls: dict[str, list] = {"flashcore": [], "without pages": [], "fa3": []}
    for _ in range(2 if tokens > 1 or tiny else benchmarking.rotations(size, most=16)):
        cu, pages = make_pages(batch_size, length, kv_heads, tokens, device)
        query = torch.randn(batch_size * tokens, heads, 128, dtype=torch.bfloat16, device=device)
        most = 1 if tokens == 1 else None
        calls["flashcore"].append(lambda q=query, p=pages, m=most: paged_attention(q, p, max_queries=m))
        whole = torch.randn(2, batch_size, kv_heads, length, 128, dtype=torch.bfloat16, device=device)
        one = query.view(batch_size, tokens, heads, 128).transpose(1, 2)
        calls["without pages"].append(lambda q=one, w=whole: attention(q, w[0], w[1], is_causal=True))
        if fa3 is not None:
            calls["fa3"].append(
                lambda q=query, p=pages, c=cu: fa3.fa3_varlen(
                    q, p.key, p.value, c, tokens, length, seqused_k=p.key_lengths, page_table=p.block_table
                )
            )
    calls = {who: each for who, each in calls.items() if each}
    times = benchmarking.graph_times(calls, calls=16) if device == "cuda" else _times_on_cpu(calls)
    row = {who: round(us, 2) for who, us in times.items()}
    if tokens == 1:
        row["TB/s"] = round(size / times["flashcore"] / 1e6, 2)
    return row


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _times_on_cpu(calls: dict[str, list]) -> dict[str, float]:
    """Microseconds of a call, which mean nothing."""
    times = {}
    for who, each in calls.items():
        began = time.perf_counter()
        each[0]()
        times[who] = (time.perf_counter() - began) * 1e6
    return times


def tiny(case: Case) -> Case:
    """The same on a model of two small layers and few tokens: whether the script runs."""
    return case._replace(
        requests=4, shortest=min(case.shortest, 9) // 2 + 1, longest=12, tokens=3, rate=min(case.rate, 100.0)
    )


def tiny_model(name: str, implementation: str = "sdpa"):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        **SHAPES[name], "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    if "sliding_window" in shape:
        shape["sliding_window"] = 8
    config = AutoConfig.for_model(shape.pop("model_type"), **shape, eos_token_id=None, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def install_fa3(folder: Path):
    """Let Transformers find FlashAttention-3; the module that calls its binaries."""
    sys.path.insert(0, str(folder.resolve()))
    import fa3_interface
    import peers

    peers.setup(str(folder.resolve()))
    found = types.ModuleType("flash_attn_interface")
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        setattr(found, name, getattr(fa3_interface, name))
    found.__spec__ = ModuleSpec(found.__name__, None)
    sys.modules[found.__name__] = found
    for module in list(sys.modules.values()):  # each has the check under its own name
        if "is_flash_attn_3_available" in vars(module):
            module.is_flash_attn_3_available = lambda *args, **kwargs: True
    # It asks which distribution the module comes from.
    PreTrainedModel._flash_attn_can_dispatch = lambda self, *args, **kwargs: True
    return peers


def end_all_after(seconds: float) -> None:
    """End the process, whatever its threads wait for; what was written stays."""

    def end() -> None:
        print(f"ended after {seconds:g} s: something hangs, or the last case takes that long", flush=True)
        os._exit(3)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


class Record:
    """The rows of a run. Each is there from the beginning on, and names who has not been measured."""

    def __init__(self, path: Path, names: dict[str, tuple[str, list[str]]]):
        """`names`: case -> (unit, who is to be measured)."""
        self.path, self.began = path, time.perf_counter()
        self.rows = {name: {"case": name, "unit": unit} for name, (unit, _) in names.items()}
        self.missing = {(name, who): "not reached" for name, (_, each) in names.items() for who in each}

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def measure(self, name: str, who: str, measure) -> None:
        """Add what `measure()` returns to the row of a case. Where it fails the row says so, and the others go on."""
        begun = self.seconds
        try:
            columns = measure()
        except Exception as error:  # noqa: BLE001
            self.missing[name, who] = f"{type(error).__name__}: {error}"[:300]
            print(f"{self.seconds:6.1f} s {name}, {who} failed", flush=True)
            traceback.print_exc()
        else:
            del self.missing[name, who]
            self.rows[name] |= columns
            print(f"{self.seconds:6.1f} s {name}, {who}, after {self.seconds - begun:.1f} s: {columns}", flush=True)
        self.write()

    def write(self) -> None:
        left_out = defaultdict(dict)
        for (name, who), why in self.missing.items():
            left_out[name][f"{who} left out"] = why
        rows = [row | left_out[name] for name, row in self.rows.items()]
        benchmarking.write(self.path, rows, model="random weights", dtype="bfloat16")


def _measured(models: "Models", case: Case, who: str, small: bool) -> dict:
    return run_case(models[case.model], tiny(case) if small else case, who, small)


class Models:
    """The model of a name; the one before goes first."""

    def __init__(self, make):
        self.make, self.name, self.model = make, None, None

    def __getitem__(self, name: str):
        if name != self.name:
            self.model = self.name = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.model, self.name = self.make(name), name
        return self.model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=benchmarking.RESULTS / "serving-h200.json")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--fa3", type=Path, help="folder with FlashAttention-3's binaries and a module fa3_interface")
    parser.add_argument("--backends", nargs="+", default=["flashcore", "fa3", "sdpa"])
    parser.add_argument("--minutes", type=float, default=6.0, help="after which nothing begins")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--tiny", action="store_true", help="small models on any device: whether the script runs")
    arguments = parser.parse_args()
    end_all_after(arguments.minutes * 60 + 60)
    cases = [case for case in CASES if any(text in case.name for text in arguments.only)]
    kernels = [each for each in KERNELS if any(text in each[0] for text in arguments.only)]
    backends = [name for name in arguments.backends if name != "fa3" or arguments.fa3 is not None]
    wanted = {case.name: [name for name in case.backends if name in backends] for case in cases}
    names = {case.name: ("ms between tokens, p99" if case.rate else "tokens/s", wanted[case.name]) for case in cases}
    record = Record(arguments.json, names | {name: ("us", ["kernel"]) for name, *_ in kernels})
    record.write()
    fa3 = None if arguments.fa3 is None else install_fa3(arguments.fa3)
    models = Models(tiny_model if arguments.tiny else functools.partial(make_model, layers=arguments.layers))
    sdpa = [(case, "sdpa") for case in cases if "sdpa" in wanted[case.name]]  # takes long, and is no peer
    runs = [(case, who) for case in cases for who in wanted[case.name] if who != "sdpa"]
    begins = {(case.name, who): functools.partial(_measured, models, case, who, arguments.tiny) for case, who in runs}
    begins |= {(each[0], "kernel"): functools.partial(kernel_row, *each, fa3, arguments.tiny) for each in kernels}
    begins |= {(case.name, who): functools.partial(_measured, models, case, who, arguments.tiny) for case, who in sdpa}
    for (name, who), measure in begins.items():
        if record.seconds < arguments.minutes * 60:
            record.measure(name, who, measure)
    for (name, who), why in record.missing.items():
        print(f"left out: {name}, {who}: {why}", flush=True)
    return int(bool(record.missing))


if __name__ == "__main__":
    sys.exit(main())
