"""`python -m flashcore_hf parity`: arguments, progress, the table and the JSON around `parity.compare_model`."""

import argparse
import json
import multiprocessing
import os
import platform
import queue
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import __version__, import_error
from ..compat import require_cache_layers
from . import tiny_models
from .rules import REFERENCES, Row, Settings, compare_model
from .runs import Cell, has_static_cache


def main(arguments: argparse.Namespace) -> int:
    """Run the command; `__main__` owns the arguments. Returns the exit status: 0 where every row passes."""
    console = Console(width=None if sys.stdout.isatty() else 190, highlight=False)
    if import_error is not None:
        console.print(f"flashcore could not be enabled: {import_error}\n`python -m flashcore_hf env` says more.")
        return 1
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    facts = describe(device, arguments.dtype, interpreted)
    console.print(
        f"flashcore parity: {facts['dtype']} on {facts['device']}; "
        + (
            "the kernels run in Triton's interpreter (times say nothing of a GPU)"
            if interpreted
            else "compiled kernels"
        )
        + f"; torch {facts['torch']}, triton {facts['triton']}, transformers {facts['transformers']}"
    )

    try:
        if arguments.fp8:
            require_cache_layers()
        jobs = _jobs(arguments, device, interpreted)
    except (ValueError, OSError, ImportError) as error:
        console.print(f"parity cannot run: {error}")
        return 1
    if not jobs:
        console.print("parity cannot run: nothing is left to compare")
        return 1
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, _progress(console) as progress:
        rows = _run_jobs(jobs, Path(arguments.workdir or scratch), progress)
        fp8_rows = _run_fp8(jobs, Path(arguments.workdir or scratch), progress) if arguments.fp8 else []
    seconds = time.perf_counter() - began

    console.print(table_of(rows))
    for row in rows:
        for failure in row.failures:
            console.print(f"FAILED {row.model}, {row.cell}, beside {row.reference}: {failure}")
        if row.failures and row.other_unexcused is not None:
            other = REFERENCES[1 - REFERENCES.index(row.reference)]
            console.print(
                f"  by the same rule, with flashcore in its place, {other} fails at {row.other_unexcused} steps"
            )
    if fp8_rows:
        console.print(fp8_table_of(fp8_rows))
    for row in fp8_rows:
        for failure in row.failures:
            console.print(f"FAILED {row.model}, {row.cell}: {failure}")
    failed = sum(not row.passed for row in [*rows, *fp8_rows])
    console.print(f"{len(rows) + len(fp8_rows) - failed} rows passed, {failed} failed, in {seconds:.0f} s")
    if arguments.json:
        record = {**facts, "seconds": seconds, "rows": [{**asdict(row), "passed": row.passed} for row in rows]}
        if fp8_rows:
            record["fp8"] = [{**asdict(row), "passed": row.passed} for row in fp8_rows]
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")
    return 1 if failed or not rows else 0


def describe(device: str, dtype: str, interpreted: bool) -> dict[str, str]:
    """Versions and hardware, for the first line and the JSON."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "absent"
    gpu = device != "cpu" and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "dtype": dtype,
        "interpreted": interpreted,
        "flashcore": __version__,
        "torch": torch.__version__,
        "triton": triton,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def table_of(rows: list[Row]) -> Table:
    """One line a row: what was compared, how close it came, and who served the attention calls."""
    table = Table(title="Greedy decoding beside a reference")
    for heading in ("model", "generation", "beside"):
        table.add_column(heading, overflow="fold")
    for heading in (
        "tokens equal", "first divergence", "top-2 gap there", "largest logit difference", "excusable steps",
        "ms per token (reference)", "scale x1.5 caught at",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    table.add_column("attention calls served by", no_wrap=True)
    table.add_column("verdict")
    for row in rows:
        where = row.first_divergence
        table.add_row(
            row.model,
            row.cell,
            row.reference,
            f"{row.tokens_equal}/{row.tokens}",
            "none" if where is None else f"token {where[1]} of sequence {where[0]}",
            "" if row.gap_there is None else f"{row.gap_there:.2e}",
            f"{row.largest_difference:.1e}",
            f"{row.excusable_share:.1%}",
            f"{row.milliseconds:.1f} ({row.reference_milliseconds:.1f})",
            "never" if row.control_caught_at is None else f"token {row.control_caught_at}",
            "\n".join(f"{name} {count}" for name, count in sorted(row.paths.items())) or "none",
            "[green]passed[/]" if row.passed else "[red]FAILED[/]",
        )
    return table


def fp8_table_of(rows: list) -> Table:
    """One line a row: what an fp8 cache changes beside one in the model's dtype."""
    table = Table(title="An fp8 cache beside one in the model's dtype")
    for heading in ("model", "generation"):
        table.add_column(heading, overflow="fold")
    for heading in ("tokens equal", "same choice after the same text", "relative error of logits", "largest"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.model,
            row.cell,
            f"{row.tokens_equal}/{row.tokens}",
            f"{row.steps_equal:.1%}",
            f"{row.relative_error:.2%}",
            f"{row.largest_difference:.1e}",
        )
    return table


def read_prompts(path: str, tokenizer) -> list[list[int]]:
    """Prompts of a file, one a line: text, or a JSON list of token ids.

    Args:
        tokenizer: turns text into token ids; None takes its bytes.

    Raises:
        ValueError: the file has no prompt.
    """
    prompts = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        if line.lstrip().startswith("["):
            prompts.append([int(token) for token in json.loads(line)])
        else:
            prompts.append(list(line.encode()) if tokenizer is None else tokenizer(line)["input_ids"])
    if not prompts:
        raise ValueError(f"--prompts {path} has no prompt; write one on each line: text, or a JSON list of token ids")
    return prompts


def _cells(arguments: argparse.Namespace, tokenizer, pad_token_id: int) -> list[Cell]:
    given = read_prompts(arguments.prompts, tokenizer) if arguments.prompts else None
    sizes = arguments.batch or ([1, 4] if given is None else sorted({1, len(given)}))
    if given is not None and max(sizes) > len(given):
        raise ValueError(f"--batch {max(sizes)} needs as many prompts, and {arguments.prompts} has {len(given)}")
    cells = []
    for cache in arguments.cache or ("dynamic", "static"):
        for size in sizes:
            prompts = given[:size] if given is not None else tiny_models.prompts(size, arguments.prompt_length)
            cells.append(Cell(cache, prompts, arguments.max_new_tokens, pad_token_id))
    return cells


def _jobs(arguments: argparse.Namespace, device: str, interpreted: bool) -> list[Settings]:
    """One job for each model; the path of a tiny model that is still to be trained is empty."""
    references = (arguments.reference,) if arguments.reference else REFERENCES
    dtype = getattr(torch, arguments.dtype)
    if arguments.model is None:
        cells = _cells(arguments, None, tiny_models.PAD_TOKEN_ID)
        models = [(family, "", tiny_models.make_config(family)) for family in tiny_models.FAMILIES]
    else:
        tokenizer, pad_token_id = _tokenizer(arguments.model)
        cells = _cells(arguments, tokenizer, pad_token_id)
        config = transformers.AutoConfig.from_pretrained(arguments.model)
        models = [(Path(arguments.model).name, arguments.model, config)]
    jobs = []
    for name, path, config in models:
        possible = [cell for cell in cells if cell.cache != "static" or has_static_cache(config)]
        if possible != cells:
            print(f"{name}: Transformers {transformers.__version__} has no static cache for it, so that is left out")
        if possible:
            jobs.append(Settings(name, path, dtype, device, references, possible, interpreted))
    return jobs


def _tokenizer(model: str):
    """The model's tokenizer, or None where it has none (a model with random weights), and the id that pads."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        # Which error tells of a folder without a tokenizer differs between versions.
        reason = str(error).strip().partition("\n")[0]
        print(f"no tokenizer with {model}: prompts are taken as bytes, one a token ({type(error).__name__}: {reason})")
        return None, 0
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return tokenizer, next(token for token in candidates if token is not None)


def run_job(settings: Settings, folder: Path, report) -> list[Row]:
    """Train the tiny model where it is asked for, and compare.

    Args:
        report: called with (model, what is going on, steps done since the last call); a queue's put, or like it.
    """
    if not settings.path:
        settings.path = str(
            tiny_models.ensure_checkpoint(
                settings.name,
                folder,
                lambda step, loss: report((settings.name, f"{settings.name}: training, loss {loss:.2f}", 1)),
            )
        )
    return compare_model(settings, lambda what, steps: report((settings.name, what, steps)))


def _run_in_worker(settings: Settings, folder: Path, reports) -> list[Row]:
    # The workers share the cores.
    torch.set_num_threads(max(torch.get_num_threads() // 2, 1))
    return run_job(settings, folder, reports.put)


def _run_jobs(jobs: list[Settings], folder: Path, progress: Progress) -> list[Row]:
    """Run the jobs, beside each other where the interpreter would leave a core idle."""
    bars = {
        job.name: progress.add_task(job.name, total=job.total_steps() + (0 if job.path else tiny_models.STEPS))
        for job in jobs
    }

    def show(message: tuple[str, str, int]) -> None:
        name, what, steps = message
        progress.update(bars[name], description=what, advance=steps)

    if len(jobs) == 1 or not jobs[0].interpreted or (os.cpu_count() or 1) < 2:
        return [row for job in jobs for row in run_job(job, folder, show)]

    with multiprocessing.Manager() as manager:
        reports = manager.Queue()
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(_run_in_worker, job, folder, reports) for job in jobs]
            while not all(future.done() for future in futures) or not reports.empty():
                try:
                    show(reports.get(timeout=0.5))
                except queue.Empty:
                    continue
            return [row for future in futures for row in future.result()]


def _run_fp8(jobs: list[Settings], folder: Path, progress: Progress) -> list:
    """The fp8 rows of every job, one after the other."""
    from .fp8 import compare_fp8

    rows = []
    for job in jobs:
        # A worker trained it in a process of its own, and kept the path there.
        job.path = job.path or str(tiny_models.ensure_checkpoint(job.name, folder))
        tokens = sum(cell.max_new_tokens for cell in job.cells if cell.cache == "dynamic")
        bar = progress.add_task(f"{job.name}: fp8 cache", total=3 * tokens)

        def show(what: str, steps: int, bar=bar) -> None:
            progress.update(bar, description=what, advance=steps)

        rows += compare_fp8(job, show)
    return rows


def _progress(console: Console):
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    if console.is_terminal:
        return Progress(*columns, console=console)
    return _LoggedProgress(console)


class _LoggedProgress:
    """Stands for a Progress where there is no terminal: a line when a task begins something new, at most every 10 s."""

    def __init__(self, console: Console):
        self.console = console
        self._totals: list[int] = []
        self._done: list[int] = []
        self._shown: list[tuple[str, float]] = []

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def add_task(self, description: str, total: int) -> int:
        self._totals.append(total)
        self._done.append(0)
        self._shown.append(("", 0.0))
        return len(self._totals) - 1

    def update(self, task: int, description: str, advance: int) -> None:
        self._done[task] += advance
        shown, when = self._shown[task]
        if description != shown and time.monotonic() - when > 10:
            self._shown[task] = description, time.monotonic()
            self.console.print(f"{description} ({self._done[task]}/{self._totals[task]})")
