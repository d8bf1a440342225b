"""What the benchmarks share: times of several contenders taken in turn, the peers, errors, and JSON with its origin."""

import ctypes
import functools
import json
import lzma
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"
for folder in (ROOT, ROOT / "kernels"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

Call = Callable[[], object]


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


def l2_bytes() -> int:
    """Size of the device's L2 cache."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def rotations(num_bytes: int, most: int = 64) -> int:
    """How many sets of inputs of `num_bytes` each to take in turn, so that no call finds its own in the L2."""
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
    """
    graphs = {name: capture(each, max(calls, len(each))) for name, each in contenders.items()}
    times = _in_turn({name: graph.replay for name, graph in graphs.items()}, rounds)
    return {name: times[name] / max(calls, len(each)) for name, each in contenders.items()}


def eager_times(contenders: dict[str, Call], *, rounds: int = 15, seconds: float = 0.02) -> dict[str, float]:
    """Median microseconds of one call, launched from Python back to back, the contenders taken in turn.

    Args:
        seconds: how long the calls between two readings of the clock last at least.
    """
    repeats = {}
    for name, call in contenders.items():
        call()
        once = _in_turn({name: call}, 3)[name] * 1e-6
        repeats[name] = max(1, math.ceil(seconds / once))
    loops = {name: (lambda call=call, n=repeats[name]: [call() for _ in range(n)] and None) for name, call in
             contenders.items()}  # fmt: skip
    return {name: time / repeats[name] for name, time in _in_turn(loops, rounds).items()}


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
    """FlashAttention-3's forward on `[B, S, H, D]`, from the binaries in `folder`; None where they are not there.

    `folder` holds `fa3_xf.so.xz` (or `.so`), which is `xformers/flash_attn_3/_C.so` of xformers 0.0.34, and
    `libcudart.so.12`. Keywords of the function: is_causal, softmax_scale, window_size_left, window_size_right,
    num_splits, pack_gqa, seqused_k. It returns (output, lse, ...).
    """
    folder = folder and folder.resolve()
    if folder is None or not (folder / "libcudart.so.12").exists():
        return None
    library = folder / "fa3_xf.so"
    packed = folder / "fa3_xf.so.xz"
    if not library.exists() and packed.exists():
        library = Path("/tmp/fa3_xf.so")
        if not library.exists():
            with lzma.open(packed) as source, open(library.with_suffix(".part"), "wb") as target:
                shutil.copyfileobj(source, target, 1 << 24)
            library.with_suffix(".part").rename(library)
    if not library.exists():
        return None
    ctypes.CDLL(str(folder / "libcudart.so.12"), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(library))
    return torch.ops.flash_attn_3.fwd
