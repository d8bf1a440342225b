"""Where the time of generate_batch() goes: steps of mixed batches and of single tokens, gaps between them, kernels.

usage: python scripts/profile_serving.py [--json FILE] [--fa3 FOLDER] [--minutes N] [--tiny]

The workload is bench_serving.py's first, in three runs: one that compiles and records graphs, one that is timed by
events around each step on the stream that computes, and a short one under torch.profiler.

Of the first run, which for the first contender is that of a fresh process: seconds from its beginning until the pages
are there, the warm-up is done, the first batch is launched, and the first token is there. And when each kernel was
there that Triton compiled meanwhile, and after how many seconds; threads compile several at once.

Of the timed run:

    gpu ms       from the first kernel of each step to its last, all steps together
    idle ms      on that stream between the step before and this one: it waits for the host
    host ms      in launching, or recording, the steps; "recorded" says how many of them
    between ms   of the host: taking answers, choosing the next requests, their tensors, and waiting for the GPU

and of the profiled steps, a step: the milliseconds that it takes, of it with a kernel running, and of these attention
(new keys into their pages included), products and the rest.
"""

import argparse
import functools
import gc
import os
import re
import sys
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

# Profilers and CUDA graphs: let the profiler's hooks stay where they are once they are there.
os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
os.environ.setdefault("TEARDOWN_CUPTI", "0")

import bench_serving
import benchmarking
import torch
from bench_serving import CASES, generation_config, prompts_of, tiny, tiny_model

from flashcore_hf import compat, serving
from tests.gpu.large_models import make_model

EVERYTHING = 1 << 30
# (name, backend, most tokens of a mixed batch that is recorded, more options of ContinuousBatchingConfig)
CONTENDERS = (
    ("flashcore", "flashcore", None, {}),
    ("fa3", "flash_attention_3", None, {}),
    ("flashcore, all batches recorded", "flashcore", EVERYTHING, {}),
    ("flashcore, synchronous", "flashcore", None, {"use_async_batching": False}),
)
PROFILED = {"mixed": (3, 2), "single": (4, 6)}  # kind of step -> (which is the first, how many)
PRODUCTS = re.compile("nvjet|gemm|cutlass|xmma|splitK", re.IGNORECASE)
ATTENTION = re.compile("flash|write_pages|fmha", re.IGNORECASE)


class Moment:
    """A point of time on a stream, or on a CPU the host's."""

    def __init__(self, stream):
        self._event = torch.cuda.Event(enable_timing=True) if stream is not None else None
        self._time = time.perf_counter()
        if stream is not None:
            self._event.record(stream)

    def until(self, other: "Moment") -> float:
        """Milliseconds."""
        if self._event is None:
            return (other._time - self._time) * 1e3
        return self._event.elapsed_time(other._event)


class Steps:
    """Wraps a model runner's steps while it is entered.

    Args:
        profiled: kind of step -> (number of the first one that torch.profiler looks at, how many).
    """

    def __init__(self, runner, profiled: dict | None = None):
        self.runner, self.profiled = runner, profiled or {}
        self.steps: list[tuple] = []  # (kind, begin, end, the host's begin and end, recorded)
        self.kernels: dict[str, list[tuple]] = {}  # kind -> (name, begin, end) in ns
        self._seen, self._profiler, self._recorded = Counter(), None, False

    def __enter__(self):
        self._compute, self._record = self.runner.compute_batch, self.runner._capture_graph
        self.runner.compute_batch, self.runner._capture_graph = self._step, self._capture
        return self

    def __exit__(self, *error):
        self.runner.compute_batch, self.runner._capture_graph = self._compute, self._record

    def _capture(self, *args, **kwargs):
        self._recorded = True
        return self._record(*args, **kwargs)

    def _step(self, model, batch: dict):
        stream = self.runner.inputs_and_outputs.compute_stream
        single = batch.get("max_length_q", batch.get("max_seqlen_q")) == 1
        kind = "single" if single else "mixed"
        number, self._seen[kind] = self._seen[kind], self._seen[kind] + 1
        first, count = self.profiled.get(kind, (-1, 0))
        if number == first:
            self._begin_profiling()
        self._recorded, host, begin = False, time.perf_counter(), Moment(stream)
        self._compute(model, batch)
        self.steps.append((kind, begin, Moment(stream), host, time.perf_counter(), self._recorded))
        if self._profiler is not None and number == first + count - 1:
            self._end_profiling(kind)

    def _begin_profiling(self) -> None:
        _synchronize()
        on_gpu = torch.cuda.is_available()
        kind = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
        self._profiler = torch.profiler.profile(activities=[kind])
        self._profiler.start()

    def _end_profiling(self, kind: str) -> None:
        _synchronize()
        self._profiler.stop()
        wanted = torch.autograd.DeviceType.CUDA if torch.cuda.is_available() else torch.autograd.DeviceType.CPU
        self.kernels[kind] = [
            (event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
            for event in self._profiler.profiler.kineto_results.events()
            if event.device_type() == wanted
        ]
        self._profiler = None

    def table(self) -> dict[str, dict]:
        """What the docstring at the top names, for each kind of step."""
        _synchronize()
        found: dict[str, dict] = defaultdict(Counter)
        before = None
        for step in self.steps:
            kind, begin, end, host, done, recorded = step
            found[kind].update({
                "steps": 1, "gpu ms": begin.until(end), "host ms": (done - host) * 1e3, "recorded": int(recorded),
                "idle ms": before[2].until(begin) if before else 0.0,
                "between ms": (host - before[4]) * 1e3 if before else 0.0,
            })  # fmt: skip
            before = step
        return {kind: {name: round(value, 1) for name, value in sums.items()} for kind, sums in found.items()}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def kernel_row(events: list[tuple], steps: int, most: int = 12) -> dict:
    """What the docstring at the top says of profiled steps, and the kernels that take longest."""
    if not events:
        return {"failed": "the profiler saw no kernel"}
    events = sorted(events, key=lambda event: event[1])
    busy, until = 0, 0
    for _, begin, end in events:
        busy += max(end - max(begin, until), 0)
        until = max(until, end)
    span = until - events[0][1]
    parts, kernels = Counter(), Counter()
    times: dict[str, float] = defaultdict(float)
    for name, begin, end in events:
        part = "attention" if ATTENTION.search(name) else "products" if PRODUCTS.search(name) else "rest"
        parts[part] += end - begin
        times[name] += end - begin
        kernels[name] += 1
    ms = lambda ns: round(ns / steps / 1e6, 3)  # noqa: E731
    return {
        "ms": ms(span), "busy ms": ms(busy), "busy share": round(busy / span, 3), "kernels": len(events) // steps,
        **{f"{part} ms": ms(parts[part]) for part in ("attention", "products", "rest")},
        "attention share": round(parts["attention"] / span, 3),
        "longest": [
            {"kernel": name[:90], "times": round(kernels[name] / steps, 1), "ms": ms(total)}
            for name, total in sorted(times.items(), key=lambda item: -item[1])[:most]
        ],
    }  # fmt: skip


def seconds_of_run(model, case, seed: int, config) -> tuple[float, float]:
    """(seconds of a generate_batch(), seconds to its first token)."""
    prompts = prompts_of(case, model.config.vocab_size, seed)
    began = time.perf_counter()
    answers = model.generate_batch(
        prompts, generation_config=generation_config(case), continuous_batching_config=config,
        persistent_manager=True, record_timestamps=True,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    made = sum(len(answer.generated_tokens) for answer in answers.values())
    if made != case.requests * case.tokens:
        raise RuntimeError(f"{made} tokens came back of {case.requests * case.tokens}")
    return seconds, min(answer.timestamps[0] for answer in answers.values()) - began


def first_run(model, case, config) -> dict:
    """What the docstring at the top says of the first run."""
    reached: dict[str, float] = {}
    compiled: list[dict] = []
    manager = compat.batching_module().ContinuousBatchingManager
    methods = {"_create_batch_processor": "pages", "warmup": "warmed up", "_generation_step": "first batch"}
    originals = {name: getattr(manager, name) for name in methods}

    def noting(name: str):
        @functools.wraps(originals[name])
        def call(*args, **kwargs):
            answer = originals[name](*args, **kwargs)
            reached.setdefault(methods[name], round(time.perf_counter() - began, 2))
            return answer

        return call

    def compilation(*, src, times, cache_hit, **_):
        ended = round(time.perf_counter() - began, 2)
        compiled.append({"kernel": src.name, "until": ended, "s": round(times.total / 1e6, 2), "on disk": cache_hit})

    knobs = getattr(__import__("triton"), "knobs", None)  # from Triton 3.4 on
    try:
        for name in methods:
            setattr(manager, name, noting(name))
        if knobs is not None:
            knobs.compilation.listener = compilation
        began = time.perf_counter()
        seconds, first = seconds_of_run(model, case, 0, config)
    finally:
        for name, original in originals.items():
            setattr(manager, name, original)
        if knobs is not None:
            knobs.compilation.listener = None
    return {**reached, "first token": round(first, 2), "whole": round(seconds, 2), "compiled": compiled}


def rows_of(model, case, name: str, backend: str, small: bool, options: dict) -> list[dict]:
    """The rows of one contender."""
    model.set_attn_implementation(backend)
    config = bench_serving.batching_config(small)
    for option, value in options.items():
        setattr(config, option, value)

    def run(seed: int, case=case) -> float:
        return seconds_of_run(model, case, seed, config)[0]

    try:
        began_row = first_run(model, case, config)
        runner = model._cached_continuous_batching_manager.batch_processor.model_runner
        with Steps(runner) as timed:
            began = time.perf_counter()
            seconds = run(1)
            ended = time.perf_counter()
        rows = [{"case": f"first run, {name}", "unit": "s", **began_row}, {
            "case": f"steps, {name}", "unit": "ms", "tokens/s": round(case.requests * case.tokens / seconds, 1),
            "whole ms": round(seconds * 1e3, 1),
            "before the first step ms": round((timed.steps[0][3] - began) * 1e3, 1),
            "after the last step ms": round((ended - timed.steps[-1][4]) * 1e3, 1), **timed.table(),
        }]  # fmt: skip
        with Steps(runner, PROFILED if not small else {"mixed": (0, 1), "single": (0, 1)}) as profiled:
            run(2, case._replace(tokens=min(case.tokens, 24)))
        for kind, events in profiled.kernels.items():
            steps = PROFILED[kind][1] if not small else 1
            rows.append({"case": f"{kind} step, {name}", "unit": "ms a step", **kernel_row(events, steps)})
        return rows
    finally:
        model.destroy_cached_continuous_batching_manager()
        gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=benchmarking.RESULTS / "serving-profile-h200.json")
    parser.add_argument("--fa3", type=Path, help="as of bench_serving.py")
    parser.add_argument("--minutes", type=float, default=3.0, help="after which no contender begins")
    parser.add_argument("--only", nargs="+", default=[""], help="contenders whose name contains one of these")
    parser.add_argument("--tiny", action="store_true", help="a small model on any device: whether the script runs")
    arguments = parser.parse_args()
    began, rows = time.perf_counter(), []
    bench_serving.end_all_after(arguments.minutes * 60 + 60)
    wanted = [contender for contender in CONTENDERS if any(text in contender[0] for text in arguments.only)]
    if arguments.fa3 is not None:
        bench_serving.install_fa3(arguments.fa3)
    else:
        wanted = [contender for contender in wanted if contender[1] != "flash_attention_3"]
    left_out = {name: "not reached" for name, *_ in wanted}
    case = tiny(CASES[0]) if arguments.tiny else CASES[0]
    model = tiny_model(case.model) if arguments.tiny else make_model(case.model)
    for name, backend, recorded, options in wanted:
        if time.perf_counter() - began > arguments.minutes * 60:
            break
        kept = serving.MOST_RECORDED, serving.BEFORE_RECORDING
        if recorded is not None:
            serving.MOST_RECORDED, serving.BEFORE_RECORDING = recorded, 0
        try:
            new = rows_of(model, case, name, backend, arguments.tiny, options)
        except Exception as error:  # noqa: BLE001 - its row says so, and the others go on
            traceback.print_exc()
            left_out[name] = f"{type(error).__name__}: {error}"[:300]
        else:
            del left_out[name]
            rows += new
            for each in new:
                print(f"{time.perf_counter() - began:6.1f} s {each}", flush=True)
        finally:
            serving.MOST_RECORDED, serving.BEFORE_RECORDING = kept
        missing = [{"case": f"steps, {name}", "unit": "ms", "left out": why} for name, why in left_out.items()]
        benchmarking.write(arguments.json, rows + missing, model="random weights", dtype="bfloat16")
    for name, why in left_out.items():
        print(f"left out: {name}: {why}", flush=True)
    return int(bool(left_out))


if __name__ == "__main__":
    sys.exit(main())
