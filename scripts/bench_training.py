"""Training steps of whole models under flashcore, sdpa and flex in turns in one process: ms a step, and the losses.

    python scripts/bench_training.py --part 1/2
    python scripts/bench_training.py --only 1B --implementations flashcore sdpa noop --steps 0
    python scripts/bench_training.py --tiny        # every case at a tiny size on the CPU, in a few minutes

A step is forward, loss, backward and AdamW (fused), in bfloat16 from random weights, on one batch. `noop` is the bound:
the same step with an attention that returns zeros, and whose gradients are zeros.

Losses of --steps steps from the same weights, on the same batch: ours may differ from sdpa's by LOSS of its value, or
three times as far as sdpa's own differ when the batch's rows are in another order, which is rounding too. noop's must
differ by more, or the check would see nothing. Two runs of ours must have the same losses and the same weights after,
bit for bit, wherever those of noop have (else it is the rest of the model that differs). With dropout sdpa's losses
are of other random numbers, and only the bits are held to each other.

A row: "flashcore", "sdpa", "flex", "noop": ms a step ("eager" where Transformers does not offer sdpa); "memory": peak
MiB of one step, weights and optimizer included; "losses": the largest differences; "same_bits"; "paths": which of our
kernels served how many calls of a step. A time whose losses are off is left out. Rows of the file that are not measured
again stay.
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
from training_cases import CASES, Case, make

LOSS = 0.003


class Training:
    """One model and batch, its weights put back before each run."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, tiny: bool):
        self.case, self.cuda = case, device == "cuda"
        self.model, self.batch = make(case, device, dtype, tiny)
        self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.rows = next(iter(self.batch.values())).shape[0]
        self.restart()

    def restart(self) -> None:
        """The weights, optimizer and random numbers of the beginning."""
        self.model.load_state_dict(self.start)
        self.model.zero_grad(set_to_none=True)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=self.case.learning_rate, fused=True)
        torch.manual_seed(0)

    def step(self, batch: dict | None = None, exactly: bool = False) -> torch.Tensor:
        """One step's loss, on the device.

        Args:
            exactly: in float32, also of models that add theirs up in bfloat16.
        """
        batch = batch or self.batch
        output = self.model(**batch)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if exactly and output.loss.dtype != torch.float32:
            logits = output.logits.detach().float()
            return torch.nn.functional.cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())
        return output.loss.detach()

    def losses(self, name: str, steps: int, turned: bool = False) -> tuple[torch.Tensor, dict]:
        """float32 losses `[steps]` from the beginning, and the weights after.

        Args:
            turned: with the batch's rows in reverse order.
        """
        switch(self.model, name)
        self.restart()
        batch = {key: tensor.flip(0) for key, tensor in self.batch.items()} if turned else self.batch
        losses = torch.stack([self.step(batch, exactly=True) for _ in range(steps)]).cpu()
        return losses, {key: tensor.clone() for key, tensor in self.model.state_dict().items()}

    def memory(self, name: str) -> int:
        """Peak MiB of one step, the copy of the beginning's weights left out."""
        switch(self.model, name)
        self.step()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        kept = sum(tensor.nbytes for tensor in self.start.values())
        return round((torch.cuda.max_memory_allocated() - kept) / 2**20)

    def times(self, names: list[str], seconds: float) -> dict[str, float]:
        """Median ms of a step under each implementation, in turn in each round."""
        taken: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            switch(self.model, name)
            self.wall(2)  # what is compiled, is compiled now
            taken[name].append(self.wall(1))
        once = {name: max(each.pop(), 0.1) for name, each in taken.items()}
        calls = {name: max(1, round(60.0 / once[name])) for name in names}
        round_ms = sum(once[name] * calls[name] for name in names)
        for _ in range(min(9, max(3, int(1e3 * seconds / round_ms)))):
            for name in names:
                switch(self.model, name)
                taken[name].append(self.wall(calls[name]))
        return {name: statistics.median(each) for name, each in taken.items()}

    def wall(self, steps: int) -> float:
        """ms of one of so many steps: the GPU's work and the host's, whichever takes longer."""
        self.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        self.synchronize()
        return (time.perf_counter() - began) * 1e3 / steps

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def compile_case(name: str, dtype: torch.dtype) -> None:
    """Our kernels of a case, once, by one row of its batch, or several processes would not fit a GPU's memory.

    Args:
        name: because what makes a configuration cannot be sent to a process.
    """
    case = next(case for case in CASES if case.name == name)
    model, batch = make(case, "cuda", dtype, tiny=False)
    switch(model, "flashcore")
    model(**{key: tensor[:1] for key, tensor in batch.items()}).loss.backward()
    del model, batch
    torch.cuda.empty_cache()


def measure(training: Training, names: list[str], steps: int, seconds: float) -> dict:
    """A row, without its case."""
    failed: dict[str, str] = {}
    memory, paths = {}, {}
    for name in names:
        try:
            switch(training.model, name)
            path_counts.clear()
            training.step()
            if name == "flashcore":
                paths = dict(path_counts)
            if training.cuda:
                memory[name] = training.memory(name)
        except Exception as error:  # noqa: BLE001 - a row says what failed, and the others go on
            offered = name == "flashcore" or "does not support" not in str(error)
            failed[name] = short(error) if offered else "is not offered"
    instead = ["eager"] if failed.get("sdpa") == "is not offered" and "eager" not in names else []
    names = [*names, *instead]
    row = {"losses": None, "same_bits": None}
    if steps and "flashcore" in names and "flashcore" not in failed:
        row = compare(training, steps, "sdpa" not in failed, failed)
    timed = [name for name in names if name not in failed]
    times = training.times(timed, seconds) if timed else {}
    row = {name: round(times[name], 3) if name in times else None for name in names} | row
    return {"unit": "ms", **row, "memory": memory, "paths": paths} | ({"failed": failed} if failed else {})


def compare(training: Training, steps: int, sdpa: bool, failed: dict) -> dict:
    """{"losses", "same_bits"} of a row; what is off goes to `failed`."""
    ours, weights = training.losses("flashcore", steps)
    again, weights_again = training.losses("flashcore", steps)
    bits = {"flashcore": same(ours, again, weights, weights_again)}
    del weights, weights_again
    noop, weights = training.losses("noop", steps)
    noop_again, weights_again = training.losses("noop", steps)
    bits["noop"] = same(noop, noop_again, weights, weights_again)
    del weights, weights_again
    if bits["noop"] and not bits["flashcore"]:
        failed["flashcore"] = "two runs differ"
    name = "sdpa" if sdpa else "eager"
    found = {"first": round(ours[0].item(), 4), "last": round(ours[-1].item(), 4)}
    if not training.case.dropout:
        theirs = training.losses(name, steps)[0]
        turned = training.losses(name, steps, turned=True)[0] if training.rows > 1 else theirs
        found |= {
            f"flashcore - {name}": far(ours, theirs),
            f"{name} - {name} in another order": far(turned, theirs),
            f"noop - {name}": far(noop, theirs),
        }
        limit = max(LOSS * theirs.abs().max().item(), 3 * far(turned, theirs))
        if not far(ours, theirs) <= limit:
            failed["flashcore"] = f"losses differ by {far(ours, theirs)} from {name}'s, and {limit:.3g} is allowed"
        elif not far(noop, theirs) > limit:
            failed["losses"] = f"noop's differ by no more than the {limit:.3g} that is allowed: they tell nothing"
    return {"losses": found, "same_bits": bits}


def same(losses: torch.Tensor, again: torch.Tensor, weights: dict, weights_again: dict) -> bool:
    """Whether two runs are equal bit for bit."""
    return torch.equal(losses, again) and all(torch.equal(weights[name], weights_again[name]) for name in weights)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of two curves."""
    return round((a - b).abs().max().item(), 6)


def told(row: dict) -> str:
    """A row for the eye: ms under each implementation, the ratio to sdpa, and to the bound."""
    times = {name: row[name] for name in IMPLEMENTATIONS if name in row}
    line = f"{row['case']:45s} " + ", ".join(f"{name} {ms}" for name, ms in times.items())
    ours, sdpa, noop = (times.get(name) for name in ("flashcore", "sdpa", "noop"))
    if ours and sdpa:
        line += f"  {sdpa / ours:.2f}x" + (f" (bound {sdpa / noop:.2f})" if noop else "")
    line += f"\n    losses {row.get('losses')}, same bits {row.get('same_bits')}, MiB {row.get('memory')}"
    return line + "".join(f"\n    {name}: {why}" for name, why in row.get("failed", {}).items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="cases with one of these texts in their names")
    parser.add_argument("--part", default="1/1", help="NUMBER/OF: a part of the cases, so that a run fits a time")
    parser.add_argument("--implementations", nargs="+", choices=list(IMPLEMENTATIONS),
                        default=["flashcore", "sdpa", "flex", "noop"])  # fmt: skip
    parser.add_argument("--steps", type=int, default=10, help="whose losses are compared; 0: none")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing, about, for each case")
    parser.add_argument("--tiny", action="store_true", help="try every case at a tiny size on the CPU")
    parser.add_argument("--list", action="store_true", help="say which cases there are")
    parser.add_argument("--minutes", type=float, help="begin no case after that")
    parser.add_argument(
        "--processes", type=int, default=4, help="that compile kernels ahead; 0: none, --minutes 0: no more"
    )
    parser.add_argument("--json", type=Path, help="training-h200.json of the results, where not --tiny")
    arguments = parser.parse_args()
    cases = [case for case, take in zip(CASES, named([case.name for case in CASES], arguments.only)) if take]
    cases = in_part(cases, arguments.part)
    if arguments.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    device, dtype = ("cpu", torch.float32) if arguments.tiny else ("cuda", torch.bfloat16)
    names = [name for name in arguments.implementations if not (arguments.tiny and name == "flex")]
    if arguments.tiny:
        torch.set_num_threads(1)
    register_noop()
    path = benchmarking.target(arguments, "training-h200.json")
    record = benchmarking.Record(path, minutes=arguments.minutes, dtype=str(dtype).removeprefix("torch."))
    began, wrong = time.perf_counter(), 0
    if device == "cuda":
        compiling = functools.partial(compile_case, dtype=dtype)
        benchmarking.compile_ahead(compiling, [case.name for case in cases], arguments.processes)
    for case in record.each(cases, lambda case: case.name):
        row = {"case": case.name}
        try:
            row |= measure(Training(case, device, dtype, arguments.tiny), names, arguments.steps, arguments.seconds)
        except Exception as error:  # noqa: BLE001
            row |= {"unit": "ms", "failed": {"case": short(error)}}
        wrong += any(why != "is not offered" for why in row.get("failed", {}).values())
        print(f"{time.perf_counter() - began:5.0f} s  {told(row)}", flush=True)
        record.add(row)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return 1 if arguments.tiny and wrong else 0


if __name__ == "__main__":
    sys.exit(main())
