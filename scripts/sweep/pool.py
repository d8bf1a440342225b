"""Worker processes that sweep one class after another, and are replaced when they hang or die."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

from .classes import Entry


def work(device: str, dtypes: list[str], tokens: int, key_range_for_all: bool) -> None:
    """A worker's life: an entry a line on stdin, a row a line on the pipe that was stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever models print goes to stderr
    import warnings

    import torch
    import transformers

    warnings.simplefilter("ignore")
    # Convolutions in TF32 turn a last bit into a thousandth, and queries that are chosen by scores into others.
    torch.backends.cudnn.allow_tf32 = False
    transformers.logging.set_verbosity_error()
    from . import checks

    checks.NEW_TOKENS = tokens
    if key_range_for_all:
        from flashcore_hf import masks

        masks.takes_key_range = lambda config: True
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        row = checks.sweep_class(Entry(*json.loads(line)), device, dtypes)
        # What one class does to a GPU's context, all that follow in the process would suffer.
        poisoned = "CUDA error" in json.dumps(row)
        print(json.dumps(row | {"poisoned": True} if poisoned else row), file=answers, flush=True)
        if poisoned:
            return


class _Worker:
    """One process, and its answers read by a thread so that waiting for them can time out."""

    def __init__(self, command: list[str], env: dict[str, str]):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )
        self.answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def ask(self, entry: Entry | None, timeout: float) -> str | None:
        """The next line; None where the process died. Raises queue.Empty after `timeout` seconds."""
        if entry is not None:
            try:
                self.process.stdin.write(json.dumps(entry) + "\n")
                self.process.stdin.flush()
            except OSError:
                return None
        return self.answers.get(timeout=timeout)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def sweep(
    entries: list[Entry], command: list[str], envs: list[dict[str, str]], jobs: int, timeout: float, deadline: float,
    on_start: Callable[[Entry], None] = lambda entry: None,
) -> Iterator[tuple[Entry, dict]]:  # fmt: skip
    """Yield (entry, row) as they are finished, in any order.

    Args:
        command: starts a worker (see `work`).
        envs: of the workers, in turn: one for each GPU.
        jobs: processes at a time.
        deadline: of time.monotonic(), after which no class is begun.
        timeout: seconds for one class; one that takes longer, or kills its worker, is "unbuildable" with that reason.
    """
    waiting: queue.SimpleQueue[Entry] = queue.SimpleQueue()
    for entry in entries:
        waiting.put(entry)
    done: queue.SimpleQueue[tuple[Entry, dict] | None] = queue.SimpleQueue()
    again: set[Entry] = set()

    def serve(env: dict[str, str]) -> None:
        worker = None
        try:
            while True:
                try:
                    entry = waiting.get_nowait()
                except queue.Empty:
                    return
                if time.monotonic() > deadline:
                    return
                if worker is None:
                    worker = _Worker(command, env)
                    worker.ask(None, 600)
                on_start(entry)
                began = time.monotonic()
                try:
                    answer = worker.ask(entry, timeout)
                    reason = "the process died"
                except queue.Empty:
                    answer, reason = None, f"it took longer than {timeout:.0f} s"
                if answer is None:
                    worker.end()
                    worker = None
                    row = {"class": entry.name, "module": entry.module.removeprefix("transformers.models."),
                           "model_type": entry.module.split(".")[2], "supports_backend": entry.supports_backend,
                           "status": "unbuildable", "reason": reason}  # fmt: skip
                else:
                    row = json.loads(answer)
                    if row.pop("poisoned", False):
                        worker.end()
                        worker = None
                        if entry not in again:
                            again.add(entry)
                            waiting.put(entry)  # an earlier class may have done it
                            continue
                done.put((entry, {**row, "seconds": round(time.monotonic() - began, 1)}))
        finally:
            if worker is not None:
                worker.end()
            done.put(None)

    threads = [
        threading.Thread(target=serve, args=(envs[number % len(envs)],), daemon=True)
        for number in range(min(jobs, len(entries)))
    ]
    for thread in threads:
        thread.start()
    running = len(threads)
    while running:
        item = done.get()
        if item is None:
            running -= 1
        else:
            yield item
