"""SUPPORT.md from the sweeps in scripts/results/support-*.json.

python scripts/support_table.py           # write it
python scripts/support_table.py --check   # exit 1 where it is not what the results say
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from sweep import CONTROL

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("wrong", "refused", "unstable", "match", "unbuildable")
CELL = {
    "match": "yes",
    "refused": "refused",
    "unstable": "see below",
    "wrong": "**wrong**",
    "unbuildable": "not checked",
}


def load(folder: Path = ROOT / "scripts" / "results") -> list[dict]:
    """The sweeps, oldest Transformers first."""
    records = [json.loads(file.read_text()) for file in folder.glob("support-*.json")]
    return sorted(records, key=lambda r: ([int(n) for n in r["environment"]["transformers"].split(".")], r["date"]))


def load_ratios(file: Path = ROOT / "scripts" / "results" / "models-h200.json") -> dict[str, list[float]]:
    """Class -> `sdpa`'s time over ours, of each case of it that bench_models.py has timed."""
    found: dict[str, list[float]] = {}
    for row in json.loads(file.read_text())["rows"] if file.exists() else ():
        if "class" in row and "ratio" in row:
            found.setdefault(row["class"], []).append(row["ratio"])
    return found


def times_as_fast(rows: list[dict], ratios: dict[str, list[float]]) -> str:
    """Like "1.19x", or "0.98x to 1.19x" of several cases."""
    found = sorted(ratio for name in {row["class"] for row in rows} for ratio in ratios.get(name, ()))
    ends = dict.fromkeys(f"{ratio:.2f}x" for ratio in (found[0], found[-1])) if found else {}
    return " to ".join(ends)


def label(record: dict) -> str:
    """Like "5.17.0, H200"."""
    device = record["environment"]["device"]
    return f"{record['environment']['transformers']}, {'CPU' if device == 'CPU' else device.split()[-1]}"


def is_causal(row: dict) -> bool:
    return row["class"].endswith("ForCausalLM")


def masks(rows: list[dict]) -> str:
    """Which masks attention got: key ranges alone (the fast path), dense ones, or none at all."""
    counts = Counter()
    for row in rows:
        counts.update(row.get("paths") or {})
    kinds = [name for key, name in (("key_range", "key range"), ("dense_mask", "dense")) if counts[key]]
    return " and ".join(kinds) or ("none needed" if counts["no_mask"] else "")


def checks(rows: list[dict]) -> str:
    """The ways of running that were compared in fp32, over all rows."""
    done = {}
    for row in rows:
        for name, result in row.get("checks", {}).get("float32", {}).items():
            if not isinstance(result, str) and name != "control":
                done[name] = None
    return ", ".join(done)


def status(rows: list[dict]) -> str:
    """One word for several classes: a match is what counts, where nothing is wrong."""
    found = {row["status"] for row in rows}
    for word in ("wrong", "match", "unstable", "refused", "unbuildable"):
        if word in found:
            return word
    return ""


def is_weak(row: dict) -> bool:
    """Whether a match says little: a softmax scale that is wrong by half hardly showed."""
    control = row.get("checks", {}).get("float32", {}).get("control")
    return row["status"] == "match" and called(row) and (control is None or control < CONTROL)


def called(row: dict) -> bool:
    """Whether any attention was."""
    return any((row.get("paths") or {}).values())


def cell(rows: list[dict]) -> str:
    """What the table says of several classes."""
    if status(rows) != "match":
        return CELL[status(rows)] if rows else ""
    matching = [row for row in rows if row["status"] == "match"]
    if not any(map(called, matching)):
        return "no attention"
    return "little felt" if all(is_weak(row) or not called(row) for row in matching) else CELL["match"]


def weakly(records: list[dict]) -> list[str]:
    """Matching rows that say little: those that call no attention, and those that feel it little."""
    rows = [row for record in records for row in record["rows"] if row["status"] == "match"]
    without = sorted({row["class"] for row in rows if not called(row)})
    little = sorted({row["class"] for row in rows if is_weak(row)})
    return [
        f"- No attention of the interface is called on the inputs that were found: {', '.join(without) or 'none'}.",
        f"- The control moves the outputs by less than {CONTROL:g}: {', '.join(little) or 'none'}.",
    ]


def table(records: list[dict], names: list[str], select, ratios: dict[str, list[float]]) -> list[str]:
    """A line for each name; `select(row)` is the name that a row belongs to, or None."""
    more = " beside `sdpa` |" if ratios else ""
    lines = ["| | " + " | ".join(label(r) for r in records) + " | masks | compared with eager |" + more]
    lines.append("|---|" + "---|" * (len(records) + 2 + bool(ratios)))
    for name in names:
        found = [[row for row in record["rows"] if select(row) == name] for record in records]
        every = [row for rows in found for row in rows]
        cells = [cell(rows) for rows in found]
        more = f" {times_as_fast(every, ratios)} |" if ratios else ""
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {masks(every)} | {checks(every)} |{more}")
    return lines


def why(records: list[dict], wanted: str) -> list[str]:
    """Rows of one status with their reasons: a line for each reason, with the classes that have it."""
    reasons: dict[str, dict[str, None]] = {}
    for record in records:
        for row in record["rows"]:
            if row["status"] == wanted:
                reason = re.sub(r"^\w+Error: ", "", row["reason"]).replace(row["class"], "this class")
                # Each refusal ends in what is supported and how to load the model instead.
                reason = reason.split(" Supported are ")[0].replace("|", "\\|")
                reasons.setdefault(reason, {})[row["class"]] = None
    return [f"- {', '.join(classes)}: {reason}" for reason, classes in sorted(reasons.items())]


def older(folder: Path = ROOT / "scripts" / "results") -> list[str]:
    """What is said of versions before 4.53, from the tests that `nox -s legacy` ran on them."""
    lines = [
        "## Transformers 4.40 to 4.52",
        "",
        "LLaMA, Mistral and Qwen2, through `flashcore_hf.replace_attention_with_flashcore(model)`. Their tests (64",
        "greedy tokens equal to eager's, by the kernels; dynamic and static caches; padding; gradients; restoring),",
        "run by `nox -s legacy` on two cores:",
        "",
    ]
    file = folder / "full-matrix.json"
    if not file.exists():
        return [*lines, "Not run yet.", ""]
    rows = [
        row for row in json.loads(file.read_text())["rows"]
        if row["tests"] == "tests/hf" and tuple(map(int, row["transformers"].split(".")[:2])) < (4, 53)
    ]  # fmt: skip
    lines += ["| Transformers | torch | Python | passed | failed | minutes | date |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['transformers']} | {row['torch']} | {row['python']} | {row['passed']} | {row['failed']} | "
            f"{row['seconds'] / 60:.1f} | {row['date'][:10]} |"
        )
    lines += ["", f"All of them took {sum(row['seconds'] for row in rows) / 60:.0f} minutes, without installing."]
    return [*lines, ""]


def build(records: list[dict], ratios: dict[str, list[float]] | None = None) -> str:
    """The whole of SUPPORT.md.

    Args:
        ratios: as of `load_ratios`, which is what None means.
    """
    ratios = load_ratios() if ratios is None else ratios
    causal = sorted({row["class"] for r in records for row in r["rows"] if is_causal(row)})
    others = sorted({row["module"].split(".")[0] for r in records for row in r["rows"] if not is_causal(row)})
    lines = [
        "# Which models run on flashcore",
        "",
        "Written by `scripts/support_table.py` from the sweeps in `scripts/results/support-*.json`; not to be",
        "edited. `scripts/sweep_architectures.py` builds every class of a Transformers release that uses its",
        "attention interface, small and with random weights, and compares it with `eager`: logits without",
        "padding, padded on the left and on the right, prefill in pieces, decoding token by token, packed rows,",
        "an image among the tokens, and 32 greedy tokens with dynamic and with static caches. In fp32 the largest",
        "error may be 2e-5 of the largest logit, and tokens must be equal; bf16 is measured against fp32, beside",
        'eager in bf16. "yes" is all of that, in every way that eager runs; "little felt" is that where a softmax',
        f"scale that is wrong by half moves the outputs by less than {CONTROL:g}, which proves little; and",
        '"no attention" where none of the interface is called. Classes that only a whole model can build or feed',
        "are compared inside it, on what it calls them with.",
        "",
        "| Transformers | device | dtypes | match | refused | unstable | wrong | not checked | date |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        count, env = Counter(row["status"] for row in record["rows"]), record["environment"]
        lines.append(
            f"| {env['transformers']} | {env['device']}, torch {env['torch']}, triton {env['triton']} | "
            f"{', '.join(record['dtypes'])} | {count['match']} | {count['refused']} | {count['unstable']} | "
            f"{count['wrong']} | {count['unbuildable']} | {record['date'][:10]} |"
        )
    lines += ["", *older(), "## Causal language models", ""]
    lines += ["Masks: `key range` is the fast path, a few words a sequence; `dense` is a mask of queries x keys."]
    if ratios:
        lines += [
            "Beside `sdpa`: its time over flashcore's, of a whole model at a size that people run, on an H200",
            "(`scripts/results/models-h200.json`; `eager`'s where a class does not offer `sdpa`).",
        ]
    lines += [""]
    lines += table(records, causal, lambda row: row["class"] if is_causal(row) else None, ratios)
    lines += ["", "## Other architectures", "", "A line for each folder of `transformers.models`.", ""]
    lines += table(records, others, lambda row: None if is_causal(row) else row["module"].split(".")[0], ratios)
    lines += [
        "",
        "## Refused",
        "",
        "An error at load, which ends in what is supported and how to load the model instead:",
        "",
        *why(records, "refused"),
    ]
    lines += ["", "## Where the reference is not one", "", *why(records, "unstable")]
    lines += ["", "## Matches that prove little", "", *weakly(records)]
    wrong = why(records, "wrong")
    if wrong:
        lines += ["", "## Wrong", "", *wrong]
    amended = [
        f"- {row['class']} ({label(record)}): was {row['amended']['status']}, is {row['status']}: "
        + row["amended"]["why"]
        for record in records
        for row in record["rows"]
        if "amended" in row
    ]
    if amended:
        lines += ["", "## Judged again after the run", "", *amended]
    lines += [
        "",
        "## Not checked",
        "",
        "No small model or no input could be made, or the class is checked by its parts alone.",
        "",
    ]
    lines += ["<details>", "", *why(records, "unbuildable"), "", "</details>", ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args()
    text, path = build(load()), ROOT / "SUPPORT.md"
    if not args.check:
        path.write_text(text)
        return 0
    if not path.exists() or path.read_text() != text:
        print("SUPPORT.md is not what scripts/results/support-*.json say; run python scripts/support_table.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
