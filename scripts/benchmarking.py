"""What the benchmarks share: times of several contenders taken in turn, the peers, errors, and JSON with its origin."""

import ctypes
import functools
import json
import lzma
import math
import multiprocessing
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"
for folder in (ROOT, ROOT / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

Call = Callable[[], object]


@functools.cache
def header() -> dict:
    """Where and when a record was measured: GPU, driver, versions, commit, date."""
    return _place() | {"date": datetime.now(timezone.utc).isoformat(timespec="seconds")}


@functools.cache  # it asks other programs, and some benchmarks write after each row
def _place() -> dict:
    from importlib.metadata import version

    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30).stdout.strip()
        except OSError:
            return ""

    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    commit = ROOT / "COMMIT"  # where the checkout travelled without its history
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "driver": driver[0] if driver else "none",
        **{name: version(name) for name in ("torch", "triton", "transformers")},
        "commit": commit.read_text().strip() if commit.exists() else output("git", "rev-parse", "--short", "HEAD"),
    }


def write(path: Path, rows: list[dict], **more) -> None:
    """Write `{header, more, "rows": rows}` as JSON, a row a line, so that a long benchmark can write after each row."""
    head = json.dumps({**header(), **more}, indent=1)[1:-2]
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text("{" + head + ',\n "rows": [\n' + body + "\n ]\n}\n")


class Record:
    """The JSON of a benchmark, written after each row, so that a run that is ended keeps its rows.

    Rows of the file that are not measured again stay, and those of another commit say so in "commit". The head's
    "not reached" names what was to be measured and has no row of this commit: the minutes were over, or the run was
    ended.
    """

    def __init__(self, path: Path | None, *, minutes: float | None = None, **more):
        """
        Args:
            path: of the file, which may be there already; None writes nothing.
            minutes: after which `each` begins no case.
            more: fields of the head.

        Raises:
            ValueError: the file was measured on another GPU or with other versions.
        """
        self.path, self.more, self.missing = path, more, {}
        self.ends = time.monotonic() + 60 * (math.inf if minutes is None else minutes)
        self.rows: dict[tuple, dict] = {}
        if path is not None and path.exists():
            self._take(json.loads(path.read_text()))

    def _take(self, old: dict) -> None:
        now = header()
        differs = [name for name in ("gpu", "torch", "triton", "transformers") if old.get(name) != now[name]]
        if differs:
            raise ValueError(f"{self.path} is of another {', '.join(differs)}: give another --json, or move it away")
        same = old["commit"] == now["commit"]
        for row in old["rows"]:
            self.rows[_key(row)] = row if same or "commit" in row else row | {"commit": old["commit"]}
        self.missing = dict.fromkeys(old.get("not reached", ()) if same else ())
        if same:
            known = {*now, "rows", "not reached"}
            self.more = {name: value for name, value in old.items() if name not in known} | self.more

    def each(self, cases: Iterable, name: Callable = str) -> Iterator:
        """The cases in turn, as long as there is time.

        Args:
            name: of a case, as its row has it, or a list of names where it makes several.
        """
        cases = list(cases)
        names = [[name(case)] if isinstance(name(case), str) else name(case) for case in cases]
        self.missing |= {one: None for several in names for one in several}
        self._write()
        for place, case in enumerate(cases):
            if self.over:
                print("time is over; not reached:", *sum(names[place:], []), sep="\n  ", flush=True)
                return
            yield case

    @property
    def over(self) -> bool:
        """Whether the minutes are."""
        return time.monotonic() > self.ends

    def add(self, row: dict) -> None:
        """Keep a row in the place of the one that it had."""
        self.rows[_key(row)] = row
        self.missing.pop(row["case"], None)
        self._write()

    def note(self, **more) -> None:
        """Fields of the head."""
        self.more |= more
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            measured = {row["case"] for row in self.rows.values() if "commit" not in row}
            missing = [case for case in self.missing if case not in measured]
            more = {"not reached": missing} if missing else {}
            write(self.path, list(self.rows.values()), **self.more, **more)


def target(arguments, name: str) -> Path | None:
    """The file that --json names; else `name` in the results, where figures go that mean something, unless --tiny."""
    if arguments.json is not None or arguments.tiny:
        return arguments.json
    return RESULTS / name


def _key(row: dict) -> tuple:
    return row["case"], row.get("kernel")


def compile_ahead(call: Callable, cases: Iterable, processes: int = 14) -> None:
    """Let processes of their own do `call(case)`: they leave their kernels in Triton's cache on disk.

    A kernel of the copy engine takes seconds to compile, and one process compiles one after another.

    Args:
        call: a function of a module; what it raises is left to the benchmark itself, which will see it again.
    """
    if not torch.cuda.is_available() or processes < 1:
        return
    began = time.monotonic()
    # In no order: neighbours share kernels, and these were compiled side by side.
    cases = list(cases)
    random.Random(0).shuffle(cases)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        failed = [done.exception() for done in [pool.submit(call, case) for case in cases]]
    failed = [repr(error)[:200] for error in failed if error is not None]
    said = f", {len(failed)} failed, the first by {failed[0]}" if failed else ""
    print(f"compiled ahead in {time.monotonic() - began:.0f} s{said}", flush=True)


def l2_bytes() -> int:
    """Size of the device's L2 cache."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def rotations(num_bytes: int, most: int = 64) -> int:
    """How many sets of inputs of `num_bytes` each to take in turn, so that no call finds its own in the L2."""
    if not torch.cuda.is_available():
        return 1
    return min(max(2, math.ceil(3 * l2_bytes() / num_bytes)), most)


def capture(calls: list[Call], count: int) -> torch.cuda.CUDAGraph:
    """A graph of `count` calls that goes round `calls`, each of which was run before."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()
    return graph


def graph_times(contenders: dict[str, list[Call]], *, calls: int = 32, rounds: int = 15) -> dict[str, float]:
    """Median microseconds of one call inside a CUDA graph, the contenders taken in turn in every round.

    Args:
        contenders: name -> equal calls on different inputs (see `rotations`).
        calls: in each graph; at least as many as there are inputs.
        rounds: replays of each graph that count; two more warm up.

    Without a GPU: of one call, which says that it runs and no more.
    """
    if not torch.cuda.is_available():
        return _once({name: each[0] for name, each in contenders.items()})
    graphs = {name: capture(each, max(calls, len(each))) for name, each in contenders.items()}
    times = _in_turn({name: graph.replay for name, graph in graphs.items()}, rounds)
    return {name: times[name] / max(calls, len(each)) for name, each in contenders.items()}


def eager_times(contenders: dict[str, Call], *, rounds: int = 15, seconds: float = 0.02) -> dict[str, float]:
    """Median microseconds of one call, launched from Python back to back, the contenders taken in turn.

    That is the time of the GPU's work or of the host's, whichever is longer.

    Args:
        seconds: how long the calls between two readings of the clock last at least.

    Without a GPU: of one call, which says that it runs and no more.
    """
    if not torch.cuda.is_available():
        return _once(contenders)
    repeats = {}
    for name, call in contenders.items():
        call()
        once = _in_turn({name: call}, 3)[name] * 1e-6
        repeats[name] = max(1, math.ceil(seconds / once))
    loops = {name: (lambda call=call, n=repeats[name]: [call() for _ in range(n)] and None) for name, call in
             contenders.items()}  # fmt: skip
    return {name: time / repeats[name] for name, time in _in_turn(loops, rounds).items()}


def _once(contenders: dict[str, Call]) -> dict[str, float]:
    times = {}
    for name, call in contenders.items():
        began = time.perf_counter()
        call()
        times[name] = (time.perf_counter() - began) * 1e6
    return times


def _in_turn(runs: dict[str, Call], rounds: int) -> dict[str, float]:
    """Median device microseconds of each run, after two rounds that warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 2):
        for name, run in runs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            if i >= 2:
                times[name].append(begin.elapsed_time(end) * 1e3)
    return {name: statistics.median(each) for name, each in times.items()}


def errors(output: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(largest, root-mean-square) difference from a float64 reference; NaN where there is any."""
    difference = output.double() - reference.double()
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def load_fa3(folder: Path | None) -> Callable | None:
    """FlashAttention-3's forward on `[B, S, H, D]`, from the binaries in `folder`; None where none is given.

    `folder` holds `fa3_xf.so.xz` (or `.so`), which is `xformers/flash_attn_3/_C.so` of xformers 0.0.34, and
    `libcudart.so.12`. Keywords of the function: is_causal, softmax_scale, window_size_left, window_size_right,
    num_splits, pack_gqa, seqused_k. It returns (output, lse, ...).

    Raises:
        FileNotFoundError: the folder has no such files.
    """
    if folder is None:
        return None
    folder = folder.resolve()
    library = folder / "fa3_xf.so"
    packed = folder / "fa3_xf.so.xz"
    if not library.exists() and packed.exists():
        library = Path("/tmp/fa3_xf.so")
        if not library.exists():
            with lzma.open(packed) as source, open(library.with_suffix(".part"), "wb") as target:
                shutil.copyfileobj(source, target, 1 << 24)
            library.with_suffix(".part").rename(library)
    for file in (library, folder / "libcudart.so.12"):
        if not file.exists():
            raise FileNotFoundError(f"{file}: {folder} is to hold FlashAttention-3's binaries")
    ctypes.CDLL(str(folder / "libcudart.so.12"), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(library))
    return torch.ops.flash_attn_3.fwd
