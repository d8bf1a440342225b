"""Every class of the installed Transformers that uses the attention interface, tiny, beside eager.

    python scripts/sweep_architectures.py                          # PyTorch path on the CPU
    python scripts/sweep_architectures.py --interpret FAMILIES     # those through the kernels, in Triton's interpreter
    python scripts/sweep_architectures.py --device cuda --dtypes float32 bfloat16 --jobs 16

Writes scripts/results/support-VERSION-{cpu,h200}.json, a row a class:

    status  match        eager's numbers in every check (see sweep/checks.py)
            refused      an error of flashcore's own, which is the reason
            unbuildable  no small model could be made, or no input was found; the reason says why
            unstable     off, but eager itself is as far off when its weights move by one unit in the last place
            wrong        none of these. The sweep then exits with 1
    checks  the largest error of each way of running, relative to the largest output; True where 32 greedy tokens agree;
            `control`: the error with a softmax scale that is wrong by half
    paths   attention calls by kernel and by kind of mask

Rows are kept as they come in a file beside the result, so that a sweep that was stopped goes on where it was.
"""

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FAMILIES = (
    "llama mistral mixtral qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text phi3 olmo2 granite starcoder2 stablelm "
    "cohere2 deepseek_v3 gpt_oss glm4 smollm3 falcon_h1"
).split()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one class")
    parser.add_argument("--only", default="", help="regular expression on MODULE.CLASS, as modeling_llama.Llama")
    parser.add_argument("--causal", action="store_true", help="causal language models alone")
    parser.add_argument("--interpret", nargs="*", default=None, metavar="FAMILY",
                        help="causal models that are also run through the kernels, in Triton's interpreter; "
                             "without names the 20 most used")  # fmt: skip
    parser.add_argument("--key-range-for-all", action="store_true",
                        help="not only for models.KEY_RANGE_MODELS: shows which models could join them")  # fmt: skip
    parser.add_argument("--limit", type=float, default=1e9, metavar="SECONDS",
                        help="begin no class after this; the next call goes on")  # fmt: skip
    parser.add_argument("--redo", nargs="*", default=[], help="statuses to run again, as wrong or unbuildable")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an earlier sweep that was stopped")
    parser.add_argument("--output", type=Path, help="of the result, instead of scripts/results/support-...json")
    parser.add_argument("--tokens", type=int, default=32, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.worker:
        from sweep.pool import work

        work(args.device, args.dtypes, args.tokens, args.key_range_for_all)
        return 0

    import transformers
    from sweep.classes import all_entries

    kind = "cpu" if args.device == "cpu" else "h200"
    output = args.output or RESULTS / f"support-{transformers.__version__}-{kind}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    entries, broken = all_entries()
    entries = [entry for entry in entries if re.search(args.only, entry.key)]
    if args.causal:
        entries = [entry for entry in entries if entry.name.endswith("ForCausalLM")]
    rows = collect(args, entries, output.with_suffix(".partial.jsonl"))
    record = {
        "environment": environment(args.device),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dtypes": args.dtypes,
        "counts": dict(Counter(row["status"] for row in rows)),
        "not_importable": broken,
        "rows": rows,
    }
    output.write_text(json.dumps(record, indent=None, separators=(", ", ": ")).replace('{"class"', '\n{"class"') + "\n")
    print(f"{output}: {record['counts']}")
    wrong = [row for row in rows if row["status"] == "wrong"]
    for row in wrong:
        print(f"wrong: {row['module']}.{row['class']}: {row['reason']}")
    return 1 if wrong else 0


def collect(args: argparse.Namespace, entries: list, partial: Path) -> list[dict]:
    """Sweep what is not in `partial` yet, and return all rows in the order of the entries."""
    if args.fresh:
        partial.unlink(missing_ok=True)
    found: dict[str, dict] = {}
    if partial.exists():
        for line in partial.read_text().splitlines():
            key, row = json.loads(line)
            found[key] = row
    todo = [entry for entry in entries if entry.key not in found or found[entry.key]["status"] in args.redo]
    # Causal language models first: what a sweep that is stopped should have.
    todo.sort(key=lambda entry: not entry.name.endswith("ForCausalLM"))
    began = time.monotonic()
    with partial.open("a") as file:

        def keep(entry, row: dict) -> None:
            found[entry.key] = row
            file.write(json.dumps([entry.key, row]) + "\n")
            file.flush()

        run(args, todo, ["--tokens", "32"], {}, args.timeout, began + args.limit, keep)
        families = directories(FAMILIES if args.interpret == [] else args.interpret or [])
        todo = [
            entry for entry in entries
            if entry.name.endswith("ForCausalLM") and entry.module.split(".")[2] in families
            and "interpreter" not in found.get(entry.key, {"interpreter": None})
        ]  # fmt: skip

        def add(entry, row: dict) -> None:
            kept = {name: row.get(name) for name in ("status", "reason", "checks", "paths", "seconds")}
            worse = found[entry.key] if row["status"] in ("match", "unbuildable") else row
            keep(entry, {**found[entry.key], "status": worse["status"], "reason": worse["reason"], "interpreter": kept})

        # A kernel takes a second there: a few tokens are what time allows, after the 32 above.
        interpreter = {"TRITON_INTERPRET": "1"}
        run(args, todo, ["--tokens", "3"], interpreter, 10 * args.timeout, began + args.limit, add)
    return [found[entry.key] for entry in entries if entry.key in found]


def run(args: argparse.Namespace, todo: list, options: list[str], env: dict, timeout: float, deadline: float, keep):
    """Sweep `todo` in workers with these options and environment, showing progress; keep(entry, row) for each."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from sweep.pool import sweep

    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--device", args.device]
    command += ["--dtypes", *args.dtypes, *options]
    command += ["--key-range-for-all"] if args.key_range_for_all else []
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(root), str(root / "kernels")])
    full = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    full.pop("TRITON_INTERPRET", None)
    envs = [full | env | gpu for gpu in gpus(args.device)]
    console = Console()
    columns = (TextColumn("{task.description:50}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(todo))
        for entry, row in sweep(
            todo, command, envs, args.jobs, timeout, deadline,
            lambda entry: progress.update(task, description=entry.name),
        ):  # fmt: skip
            keep(entry, row)
            progress.advance(task)
            if not console.is_terminal or row["status"] == "wrong":
                line = f"{row['status']:11} {entry.name} {row['reason'][:150]}"
                console.print(line, markup=False, highlight=False)


def gpus(device: str) -> list[dict[str, str]]:
    """An environment for each visible GPU; a single empty one on the CPU."""
    if device == "cpu":
        return [{}]
    import torch

    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return [{"CUDA_VISIBLE_DEVICES": name} for name in names.split(",")]


def directories(families: list[str]) -> set[str]:
    """Folders of transformers.models: gemma3_text lives in gemma3."""
    return {family.removesuffix("_text") for family in families}


def environment(device: str) -> dict[str, str]:
    """What was measured on."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def found(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "none"

    import transformers

    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return {
        "device": where, "torch": torch.__version__, "triton": found("triton"),
        "transformers": transformers.__version__, "python": sys.version.split()[0],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
