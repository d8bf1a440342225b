"""Whole models of 50 classes, forward or generate(), under flashcore and sdpa in turns in one process: ms a call.

    python scripts/bench_models.py --part 1/3
    python scripts/bench_models.py --groups text vision --only bert --implementations flashcore sdpa flex noop
    python scripts/bench_models.py --device cpu --only llama-3.2-1b
    python scripts/bench_models.py --tiny          # every case at a tiny size on the CPU, in a few minutes

Weights are random, in bfloat16. `noop` is the bound: the same model with an attention that returns zeros. A forward's
time is that of calls back to back, a token's that of a generate() less that of one that stops after its first token.

Before a time is taken, outputs are held to eager's: two rows of the batch, at tokens that exist. Ours may be at most
twice as far from eager as sdpa is (root mean square relative to eager's; at least LEAST), and both less than a quarter
as far as noop, or the check would see nothing. What is off gets no time, and the row says so in "failed". A case whose
noop takes longer than an attention, on a host that others disturb, is not reached. Where Transformers does not offer
sdpa (Gemma 2, gpt-oss), eager is timed in its place.

A row: "flashcore", "sdpa", "noop": ms; "ratio": sdpa's time over ours; "attention": ours less noop's, as a part of
sdpa's less noop's; "errors": those distances; "memory": peak MiB of one call with the weights; "paths": which of our
kernels served how many calls of it. Rows of the file that are not measured again stay.
"""

import argparse
import functools
import gc
import statistics
import sys
import time
from pathlib import Path

import benchmarking
import torch
from contenders import IMPLEMENTATIONS, in_part, named, register_noop, short, switch
from flashcore_kernels import path_counts
from sweep.running import rms_error, tensors
from transformers import GenerationMixin
from zoo import ENTRIES, Entry, Workload, build, class_of

LEAST = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-3}
TINY = {"batch": 2, "length": 24, "tokens": 3}


class Bench:
    """One model, and how its workloads are timed."""

    def __init__(self, model: torch.nn.Module, implementations: list[str], seconds: float):
        self.model, self.names, self.seconds = model, implementations, seconds
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.cuda = self.device.type == "cuda"

    def measure(self, workload: Workload) -> dict:
        """The row, without its case: times, errors, memory, paths, and what failed."""
        rows = min(workload.batch, 2)
        inputs = self.inputs(workload, workload.batch)
        failed: dict[str, str] = {}
        errors, memory, paths = self.check(workload, inputs, rows, failed)
        names = [*self.names, *(["eager"] if "is not offered" in failed.get("sdpa", "") else [])]
        times = self.times(workload, inputs, [name for name in names if name not in failed])
        if disturbed(times):
            failed["times"] = f"noop took {times['noop']:.3f} ms, more than attention: something else was at work"
            times = {}
        row = {"unit": "ms/token" if workload.tokens else "ms"}
        row |= {name: round(times[name], 3) if name in times else None for name in names}
        row |= judged(row) | {"errors": errors, "memory": memory, "paths": paths}
        return row | ({"failed": failed} if failed else {})

    def inputs(self, workload: Workload, batch: int) -> dict:
        made = workload.inputs(self.model, batch, workload.length)
        return {
            name: value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)
            if isinstance(value, torch.Tensor)
            else value
            for name, value in made.items()
        }

    def check(self, workload: Workload, inputs: dict, rows: int, failed: dict) -> tuple[dict, dict, dict]:
        """(errors, memory, paths) of one forward under each implementation, after one of eager with two rows."""
        two = inputs if workload.batch <= rows else self.inputs(workload, rows)
        switch(self.model, "eager")
        expected = self.outputs(two, two, rows)
        errors, memory, paths = {}, {}, {}
        for name in sorted(self.names, key=lambda name: name != "sdpa"):
            try:
                switch(self.model, name)
                path_counts.clear()
                if self.cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                got = self.outputs(inputs, two, rows)
                if self.cuda:
                    memory[name] = round(torch.cuda.max_memory_allocated() / 2**20)
                if name == "flashcore":
                    paths = dict(path_counts)
                same_shapes = [t.shape for t in got] == [t.shape for t in expected]
                errors[name] = round(max(map(rms_error, expected, got)), 5) if same_shapes else float("inf")
            except Exception as error:  # noqa: BLE001 - a row says what failed, and the others go on
                offered = name == "flashcore" or "does not support" not in str(error)
                failed[name] = short(error) if offered else "is not offered"
            if self.cuda:
                torch.cuda.empty_cache()
        if "noop" in errors and not errors["noop"] > 0.0:
            failed["check"] = "an attention that returns zeros changes nothing: the outputs do not tell"
        for name, limit in limits(errors, self.dtype).items():
            # Not `>`: NaN is wrong.
            if name in errors and not errors[name] <= limit:
                failed[name] = f"off by {errors[name]} from eager, and {limit:.3g} is allowed"
        return errors, memory, paths

    @torch.no_grad()
    def outputs(self, inputs: dict, two: dict, rows: int) -> list[torch.Tensor]:
        """Floating-point outputs of the first rows, tokens that do not exist set to zero."""
        output = self.model(**inputs)
        kept = [tensor[:rows] if tensor.dim() > 1 else tensor for tensor in tensors(output)]
        mask = two.get("attention_mask")
        return [existing(tensor, mask) for tensor in kept] if mask is not None else kept

    def times(self, workload: Workload, inputs: dict, names: list[str]) -> dict[str, float]:
        """Median ms of one call (or of one token) under each implementation, in turn in each round."""
        once: dict[str, float] = {}
        for name in names:
            switch(self.model, name)
            self.milliseconds(workload, inputs, 1)  # what is compiled, is compiled now
            once[name] = self.milliseconds(workload, inputs, 1)
        # Calls back to back for 30 ms; as many rounds as the time allows.
        calls = {name: 1 if workload.tokens else max(1, round(30.0 / max(once[name], 0.01))) for name in names}
        round_ms = sum(once[name] * calls[name] * (workload.tokens or 1) for name in names)
        rounds = min(9, max(3, int(1e3 * self.seconds / max(round_ms, 1.0))))
        taken: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                switch(self.model, name)
                taken[name].append(self.milliseconds(workload, inputs, calls[name]))
        return {name: statistics.median(each) for name, each in taken.items()}

    @torch.no_grad()
    def milliseconds(self, workload: Workload, inputs: dict, calls: int) -> float:
        if workload.tokens:
            whole, first = (self.wall(lambda n=n: self.generate(inputs, n), 1) for n in (workload.tokens, 1))
            return (whole - first) / (workload.tokens - 1)
        return self.wall(lambda: self.model(**inputs), calls)

    def wall(self, call, calls: int) -> float:
        """ms of one of so many calls: the GPU's work and the host's, whichever takes longer."""
        self.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        self.synchronize()
        return (time.perf_counter() - began) * 1e3 / calls

    def generate(self, inputs: dict, tokens: int) -> None:
        # GenerationMixin's own: Whisper's looks for special tokens that a random model does not have.
        options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False, "num_beams": 1}
        GenerationMixin.generate(self.model, **inputs, **options)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def disturbed(times: dict[str, float]) -> bool:
    """Whether these times say nothing, because the bound lies 2 % above what it bounds."""
    return any(times["noop"] > 1.02 * time for time in times.values()) if "noop" in times else False


def limits(errors: dict[str, float], dtype: torch.dtype) -> dict[str, float]:
    """How far from eager each implementation's outputs may be."""
    seen = 0.25 * errors.get("noop", float("inf"))
    ours = min(max(2.0 * errors["sdpa"], LEAST[dtype]), seen) if "sdpa" in errors else seen
    return {name: seen if name == "sdpa" else ours for name in IMPLEMENTATIONS if name not in ("noop", "eager")}


def existing(output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`output` with zeros where the tokens do not exist; an encoder that makes fewer frames keeps as large a part."""
    if output.dim() < 3 or output.shape[0] != mask.shape[0]:
        return output
    length = output.shape[1]
    if length == mask.shape[1]:
        seen = mask.bool()
    elif length < mask.shape[1] // 100:  # frames of sound; convolutions look a little beyond the end
        kept = (length * mask.sum(1, keepdim=True) / mask.shape[1]).long() - 1
        seen = torch.arange(length, device=mask.device) < torch.where(mask.all(1, keepdim=True), length, kept)
    else:
        return output
    return output.masked_fill(~seen.reshape(*seen.shape, *[1] * (output.dim() - 2)), 0.0)


def chosen(arguments) -> list[tuple[Entry, list[Workload]]]:
    """Models and those of their workloads that the command line asks for."""
    found = []
    for entry in (entry for entry in ENTRIES if entry.group in arguments.groups):
        names = [f"{entry.name} {workload.what}" for workload in entry.workloads]
        wanted = [w for w, take in zip(entry.workloads, named(names, arguments.only)) if take]
        if wanted:
            found.append((entry, wanted))
    return in_part(found, arguments.part)


def names_of(case: tuple[Entry, list[Workload]]) -> list[str]:
    """Of a model's rows."""
    entry, workloads = case
    return [f"{entry.name} {workload.what}" for workload in workloads]


def judged(row: dict) -> dict[str, float]:
    """The whole model's ratio, and attention's own time (a model's less its bound) as a part of sdpa's."""
    ours, sdpa, noop = (row.get(name) for name in ("flashcore", "eager" if "eager" in row else "sdpa", "noop"))
    found = {}
    if ours and sdpa:
        found["ratio"] = round(sdpa / ours, 3)
    if ours and sdpa and noop and sdpa > noop:
        found["attention"] = round((ours - noop) / (sdpa - noop), 2)
    return found


def told(row: dict) -> str:
    """A row for the eye."""
    instead = "eager" if "eager" in row else "sdpa"
    line = f"{row['case']:58s} {row.get('flashcore')} / {row.get(instead)}{' (eager)' if 'eager' in row else ''} / "
    line += f"{row.get('noop')} {row['unit']}"
    if "ratio" in row:
        line += f"  {row['ratio']:.2f}x"
    if "attention" in row:
        line += f", attention alone {row['attention']:.2f} of sdpa's"
    return line + "".join(f"\n    {name}: {why}" for name, why in row.get("failed", {}).items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = list(dict.fromkeys(entry.group for entry in ENTRIES))
    parser.add_argument("--groups", nargs="+", choices=groups, default=groups)
    parser.add_argument("--only", nargs="+", default=[], help="cases with one of these texts in their names")
    parser.add_argument("--part", default="1/1", help="NUMBER/OF: a part of the models, so that a run fits a time")
    parser.add_argument("--implementations", nargs="+", choices=list(IMPLEMENTATIONS),
                        default=["flashcore", "sdpa", "noop"])  # fmt: skip
    parser.add_argument("--seconds", type=float, default=1.5, help="of timing, about, for each case")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default=None, choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--threads", type=int, help="of PyTorch; 1 on a CPU")
    parser.add_argument("--batch", type=int, help="at most so many sequences, for a CPU")
    parser.add_argument("--tiny", action="store_true", help="try every case at a tiny size on the CPU")
    parser.add_argument("--list", action="store_true", help="say which cases there are")
    parser.add_argument("--minutes", type=float, help="begin no case after that")
    parser.add_argument(
        "--processes", type=int, default=10, help="that compile kernels ahead; 0: none, --minutes 0: no more"
    )
    parser.add_argument("--json", type=Path, help="models-h200.json (or -cpu) of the results, where not --tiny")
    arguments = parser.parse_args()
    cases = chosen(arguments)
    if arguments.list:
        print(*(f"{entry.name} {workload.what}" for entry, each in cases for workload in each), sep="\n")
        print(f"{len({entry.model_class for entry, _ in cases})} classes")
        return 0
    device = "cpu" if arguments.tiny else arguments.device
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device == "cuda" else "float32"))
    if arguments.threads or device == "cpu":
        torch.set_num_threads(arguments.threads or 1)
    register_noop()
    path = benchmarking.target(arguments, "models-h200.json" if device == "cuda" else "models-cpu.json")
    record = benchmarking.Record(path, minutes=arguments.minutes, dtype=str(dtype).removeprefix("torch."))
    began, wrong = time.perf_counter(), 0
    if device == "cuda":
        wanted = [(entry.name, [workload.what for workload in each]) for entry, each in cases]
        benchmarking.compile_ahead(functools.partial(compile_model, dtype=dtype), wanted, arguments.processes)
    for entry, workloads in record.each(cases, names_of):
        for row in of_model(entry, workloads, arguments, device, dtype):
            wrong += any(why != "is not offered" for why in row.get("failed", {}).values())
            print(f"{time.perf_counter() - began:5.0f} s  {told(row)}", flush=True)
            if "times" not in row.get("failed", {}):  # else it counts as not reached
                record.add(row)
            if record.over:
                break
    return 1 if arguments.tiny and wrong else 0


def compile_model(wanted: tuple[str, list[str]], dtype: torch.dtype) -> None:
    """Our kernels of a model's workloads, once.

    Args:
        wanted: names, because what makes a configuration cannot be sent to a process.
    """
    entry = next(entry for entry in ENTRIES if entry.name == wanted[0])
    bench = Bench(build(entry, "cuda", dtype), ["flashcore"], 0.0)
    switch(bench.model, "flashcore")
    for workload in entry.workloads:
        if workload.what in wanted[1]:
            inputs = bench.inputs(workload, workload.batch)
            if workload.tokens:
                bench.generate(inputs, 3)
            else:
                bench.outputs(inputs, {}, 1)
            del inputs
            torch.cuda.empty_cache()


def of_model(entry: Entry, workloads: list[Workload], arguments, device: str, dtype: torch.dtype):
    """Rows of one model, its memory free again after."""
    try:
        bench = Bench(build(entry, device, dtype, arguments.tiny), arguments.implementations, arguments.seconds)
    except Exception as error:  # noqa: BLE001
        yield {"case": entry.name, "unit": "ms", "failed": {"model": short(error)}}
        return
    for workload in workloads:
        row = {"case": f"{entry.name} {workload.what}", "class": class_of(entry).__name__, "group": entry.group}
        if arguments.batch:
            workload = workload._replace(batch=min(arguments.batch, workload.batch))
        if arguments.tiny:
            small = {name: min(most, getattr(workload, name)) for name, most in TINY.items()}
            workload = workload._replace(**small)
        try:
            row |= bench.measure(workload)
        except Exception as error:  # noqa: BLE001
            row |= {"unit": "ms", "failed": {"case": short(error)}}
        yield row
    del bench
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
