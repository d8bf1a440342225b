"""Write the README's tables of GPU results from the JSON in scripts/results; nothing in them is typed.

usage: python scripts/readme_tables.py [--check]    --check only says whether the README is up to date
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import plot_generate
import summary

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"


def load(name: str) -> dict | None:
    """The record `name` of scripts/results, or None where it has not been made."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def where(record: dict) -> str:
    """On what a record was measured."""
    gpu = record.get("gpu", record.get("device"))
    versions = ", ".join(f"{name} {record[name]}" for name in ("torch", "triton", "transformers"))
    commit = f", commit {record['commit']}" if record.get("commit") else ""
    return f"{gpu}, {versions}, {record['date'][:10]}{commit}"


def measured() -> list[str]:
    """What was measured on a GPU, one line each."""
    out = ["| what | result | where |", "|---|---|---|"]
    tests = load("gpu-tests.json")
    if tests:
        failed = len(tests["failed"])
        passed = tests["tests"] - failed - tests["skipped"]
        out.append(f"| `pytest -m gpu` | {passed} passed, {failed} failed | {where(tests)} |")
    parity = load("parity-float32.json")
    if parity:
        passed = sum(row["passed"] for row in parity["rows"])
        out.append(f"| `parity` in float32 | {passed} of {len(parity['rows'])} rows token-exact | {where(parity)} |")
    parity = load("parity-bfloat16.json")
    if parity:
        passed = sum(row["passed"] for row in parity["rows"])
        out.append(f"| `parity` in bfloat16 | {passed} of {len(parity['rows'])} rows by its rule | {where(parity)} |")
    for name in ("llama-3.1-8b.json", "mistral-7b.json"):
        record = load(name)
        if record:
            out += model_lines(record)
    return out


def model_lines(record: dict) -> list[str]:
    """Rows for one full-size model."""
    place, model = where(record), record["model"]
    passed = sum(row["passed"] for row in record["parity"])
    share = record["memory"]["share_of_mha"]
    out = [
        f"| {model}: bf16 parity beside `sdpa` | {passed} of {len(record['parity'])} rows passed | {place} |",
        f"| {model}: bytes of the KV cache | {share:.2f} of what multi-head attention would need | {place} |",
    ]
    for row in record["parity"]:
        # With a dynamic cache a step waits for Python, whose speed changes in the minutes between the two runs.
        if row["cell"].startswith("static"):
            out.append(
                f"| {model}: {row['cell']}, prefill included | {row['milliseconds']:.1f} ms per token "
                f"(`sdpa`: {row['reference_milliseconds']:.1f}) | {place} |"
            )
    prompt = record.get("long_prompt")
    if prompt:
        out.append(
            f"| {model}: prefill of {prompt['prompt']} tokens | {prompt['flashcore_prefill_ms']:.0f} ms "
            f"(`sdpa`: {prompt['sdpa_prefill_ms']:.0f}) | {place} |"
        )
    return out


def benchmark_lines(name: str, columns: dict[str, str], wanted: str = "") -> list[str]:
    """A table of the benchmark `name`.json: its cases that begin with `wanted`, and `columns`, key -> heading."""
    record = load(f"{name}.json")
    rows = [row for row in record["rows"] if row["case"].startswith(wanted)] if record else []
    rows = [row for row in rows if any(isinstance(row.get(key), int | float) for key in columns)]
    if not rows:
        return [f"Not measured yet: `scripts/bench_{name.partition('-')[0]}.py`."]
    shown = {key: heading for key, heading in columns.items() if any(key in row for row in rows)}
    unit = rows[0]["unit"]
    out = [f"| {unit} | {' | '.join(shown.values())} |", "|---" + "|---:" * len(shown) + "|"]
    for row in rows:
        figures = (f"{row[key]:.1f}" if isinstance(row.get(key), int | float) else "" for key in shown)
        older = f" (commit {row['commit']})" if "commit" in row else ""
        out.append(f"| {row['case'].partition(' ')[2]}{older} | {' | '.join(figures)} |")
    return [*out, "", f"{where(record)}"]


def prefill() -> list[str]:
    """Prefill beside FlashAttention-3 and cuDNN: for each group of cases the rates and the ratios."""
    record = load("prefill-h200.json")
    if record is None:
        return []
    groups: dict[str, list[dict]] = {}
    for row in record["rows"]:
        groups.setdefault(summary.group_of(row["case"]), []).append(row)
    groups["all"] = record["rows"]
    out = [
        "| cases | how many | flashcore | FlashAttention-3 | cuDNN | to FlashAttention-3 | to the better of both |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, rows in groups.items():
        cells = [name, str(len(rows))]
        unit = rows[0]["unit"]
        for contender in ("flashcore", "fa3", "cudnn"):
            figures = [row[contender] for row in rows if row.get(contender)]
            spread = f"{min(figures):.0f} to {max(figures):.0f} {unit}" if len(figures) > 1 else None
            cells.append("" if name == "all" or not figures else spread or f"{figures[0]:.0f} {unit}")
        for peers in (("fa3",), ("fa3", "cudnn")):
            ratios = [each for each in (summary.ratio(row, peers) for row in rows) if each is not None]
            median = statistics.median(ratios) if ratios else None
            cells.append(f"{median:.2f}x (least {min(ratios):.2f})" if ratios else "")
        out.append("| " + " | ".join(cells) + " |")
    return [*out, "", f"Medians over the cases, ratios above 1 are faster; {where(record)}."]


DECODE = {
    "flashcore": "flashcore", "flashcore_range": "with a key range", "fa3": "FlashAttention-3", "cudnn": "cuDNN",
    "read": "only reading",
}  # fmt: skip
BACKWARD = {
    "flashcore": "flashcore", "fa3": "FlashAttention-3", "fa3_deterministic": "the same, deterministic",
    "cudnn": "cuDNN", "flash": "PyTorch's flash",
}  # fmt: skip
TRAINING = {"flashcore": "flashcore", "sdpa": "sdpa", "flex": "flex", "noop": "attention for nothing"}
GENERATE = {"flashcore": "flashcore", "sdpa": "sdpa", "seconds": "first call, s"}
SERVING = {
    "flashcore": "flashcore", "fa3": "FlashAttention-3", "sdpa": "sdpa", "first answer": "first answer, s",
    "without pages GiB": "GiB beside pages", "without pages GiB fa3": "FlashAttention-3's",
}  # fmt: skip
PAGED = {"flashcore": "flashcore", "fa3": "FlashAttention-3", "without pages": "flashcore without pages"}
ARRIVALS = {"p50": "between tokens, p50", "p99": "p99", "first p50": "to the first token, p50", "first p99": "p99"}


def serving() -> list[str]:
    """Throughput of continuous batching, time between tokens of requests that arrive, and the kernels for pages."""
    record = load("serving-h200.json")
    rows = [] if record is None else record["rows"]
    if not any(row["case"].startswith("generate_batch ") and "flashcore" in row for row in rows):
        return ["Not measured yet: `scripts/bench_serving.py`."]
    *out, _, place = benchmark_lines("serving-h200", SERVING, "generate_batch ")
    for row in record["rows"]:
        shown = {"flashcore": "", "FlashAttention-3": " fa3"} if row["case"].startswith("arrivals") else {}
        figures = {name: [row.get(f"{key}{column}") for key in ARRIVALS] for name, column in shown.items()}
        lines = [
            f"| {name} | {' | '.join(f'{figure:.1f}' for figure in each)} |"
            for name, each in figures.items()
            if None not in each
        ]
        if lines:
            heading = f"| ms, {row['case']} | {' | '.join(ARRIVALS.values())} |"
            out += ["", heading, "|---" + "|---:" * len(ARRIVALS) + "|", *lines]
    if any(row["case"].startswith("paged ") for row in record["rows"]):
        out += ["", *benchmark_lines("serving-h200", PAGED, "paged ")[:-2]]
    return [*out, "", place]


def picture() -> list[str]:
    """The picture that scripts/plot_generate.py draws, for pages of either colour; where it was measured below it."""
    record = load(plot_generate.SOURCE.name)
    light, dark = (plot_generate.target(name).relative_to(ROOT) for name in ("light", "dark"))
    alt = f"Milliseconds per generated token of {record['model']}, flashcore beside sdpa (in figures: Generate faster)"
    return [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{dark}">',
        f'  <img alt="{alt}" src="{light}">',
        "</picture>",
        "",
        f"<sub>{where(record)}</sub>",
    ]


# Marker in the README -> what stands between its begin and its end.
SECTIONS = {
    "picture": picture,
    "measured": measured,
    "decode": lambda: benchmark_lines("decode-h200", DECODE, "decode "),
    "decode-fp8": lambda: benchmark_lines("decode-h200", DECODE, "decode-fp8 "),
    "prefill": prefill,
    "backward": lambda: benchmark_lines("backward-h200", BACKWARD),
    "training": lambda: benchmark_lines("training-h200", TRAINING),
    "generate": lambda: benchmark_lines("generate-h200", GENERATE),
    "serving": serving,
}


def filled(text: str) -> str:
    """The README with every section that it has markers for written anew."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin in text:
            head, rest = text.split(begin)
            text = "\n".join([head + begin, *section(), end + rest.split(end)[1]])
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    updated = filled(text)
    if arguments.check:
        return int(updated != text)
    readme.write_text(updated)
    return 0


if __name__ == "__main__":
    sys.exit(main())
