"""Write the README's tables of GPU results from the JSON in scripts/results; nothing in them is typed.

usage: python scripts/readme_tables.py [--check]    --check only says whether the README is up to date
"""

import argparse
import json
import re
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


def origin(record: dict) -> str:
    """`where`, and which other commits some of the rows are of."""
    older = {row["commit"] for row in record["rows"] if "commit" in row}
    return where(record) + (f", some rows at {', '.join(sorted(older))}" if older else "")


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


def benchmark_lines(
    name: str, columns: dict[str, str], wanted: str = "", ratios: dict[str, tuple[str, str]] | None = None
) -> list[str]:
    """A table of the benchmark `name`.json: its cases that begin with `wanted`, and `columns`, key -> heading.

    Args:
        ratios: heading -> (key of the one, key of the other), columns of one figure over another.
    """
    record = load(f"{name}.json")
    rows = [row for row in record["rows"] if row["case"].startswith(wanted)] if record else []
    rows = [row for row in rows if any(isinstance(row.get(key), int | float) for key in columns)]
    if not rows:
        return [not_measured(name)]
    shown = {key: heading for key, heading in columns.items() if any(number(row, key) for row in rows)}
    over = {
        heading: keys
        for heading, keys in (ratios or {}).items()
        if any(all(number(row, key) for key in keys) for row in rows)
    }
    out = [f"| {rows[0]['unit']} | {' | '.join([*shown.values(), *over])} |"]
    out.append("|---" + "|---:" * (len(shown) + len(over)) + "|")
    for row in rows:
        cells = [f"{row[key]:.1f}" if number(row, key) else "" for key in shown]
        for one, other in over.values():
            cells.append(f"{row[one] / row[other]:.2f}x" if number(row, one) and number(row, other) else "")
        older = f" (commit {row['commit']})" if "commit" in row else ""
        out.append(f"| {row['case'].partition(' ')[2]}{older} | {' | '.join(cells)} |")
    return [*out, "", f"{where(record)}"]


def not_measured(name: str) -> str:
    return f"Not measured yet: `scripts/bench_{name.partition('-')[0]}.py`."


def number(row: dict, key: str) -> bool:
    """Whether a row has a figure there."""
    return isinstance(row.get(key), int | float) and not isinstance(row.get(key), bool)


def spread(figures: list[float], unit: str = "") -> str:
    """The least and the largest of some figures."""
    if not figures:
        return ""
    low, high = f"{min(figures):.0f}", f"{max(figures):.0f}"
    return f"{low if low == high else f'{low} to {high}'} {unit}".strip()


def middle(ratios: list[float], worst=min) -> str:
    """The median of some ratios, and the worst."""
    if not ratios:
        return ""
    word = "least" if worst is min else "most"
    return f"{statistics.median(ratios):.2f}x ({word} {worst(ratios):.2f})"


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    """Lines of cells, without the columns that are empty."""
    kept = [i for i in range(len(head)) if any(line[i] for line in lines)]
    rows = [[line[i] for i in kept] for line in (head, ["---"] * len(head), *lines)]
    return ["| " + " | ".join(row) + " |" for row in rows]


def grouped(rows: list[dict], group) -> dict[str, list[dict]]:
    """Rows by what `group` says of them."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(group(row), []).append(row)
    return found


def figures(rows: list[dict], key: str) -> list[float]:
    return [row[key] for row in rows if number(row, key)]


def quotients(rows: list[dict], one: str, other: str) -> list[float]:
    """How many times as fast `one` is as `other`, of the rows that have both."""
    found = [row for row in rows if number(row, one) and number(row, other) and row[one] and row[other]]
    return [row[one] / row[other] if row["unit"].endswith("/s") else row[other] / row[one] for row in found]


def rates(name: str, contenders: dict[str, str], ratios: dict[str, tuple[str, ...]], beside: dict[str, str]):
    """For each group of the cases of one kernel the figures and the ratios.

    Args:
        contenders: key -> heading.
        ratios: heading -> the peers of which the better is meant.
        beside: heading -> key of a figure that is held against flashcore's own.
    """
    record = load(f"{name}.json")
    if record is None:
        return [not_measured(name)]
    groups = grouped(record["rows"], lambda row: summary.group_of(row["case"])) | {"all": record["rows"]}
    # The better of two is said only where both were there.
    absent = {key for key in contenders if not figures(record["rows"], key)}
    there = {heading: [key for key in peers if key not in absent] for heading, peers in ratios.items()}
    ratios = {
        heading if len(peers) == len(ratios[heading]) else f"to {contenders[peers[0]]}": tuple(peers)
        for heading, peers in there.items() if peers
    }  # fmt: skip
    head = ["cases", "how many", *contenders.values(), *ratios, *beside]
    lines = []
    for group, rows in groups.items():
        cells = [group.removeprefix("backward "), str(len(rows))]
        cells += ["" if group == "all" else spread(figures(rows, key), rows[0]["unit"]) for key in contenders]
        for peers in ratios.values():
            cells.append(middle([each for each in (summary.ratio(row, peers) for row in rows) if each is not None]))
        cells += [middle(quotients(rows, key, "flashcore")) for key in beside.values()]
        lines.append(cells)
    return [*table(head, lines), "", f"Medians over the cases, ratios above 1 are faster; {origin(record)}."]


def prefill() -> list[str]:
    """Prefill beside FlashAttention-3 and cuDNN."""
    return rates(
        "prefill-h200",
        {"flashcore": "flashcore", "fa3": "FlashAttention-3", "cudnn": "cuDNN"},
        {"to FlashAttention-3": ("fa3",), "to the better of both": ("fa3", "cudnn")},
        {"in pages, to without": "paged", "packed, to one by one": "varlen"},
    )


def backward() -> list[str]:
    """The backward beside FlashAttention-3, free to add up in any order and not, cuDNN and PyTorch's flash."""
    return rates(
        "backward-h200",
        BACKWARD,
        {
            "to the better of FlashAttention-3 and cuDNN": ("fa3", "cudnn"),
            "to the deterministic FlashAttention-3": ("fa3_deterministic",),
        },
        {},
    )


def masks() -> list[str]:
    """Attention in full and under masks: for each kind the ratio to SDPA's best backend, and what a mask costs."""
    record = load("masks-h200.json")
    if record is None:
        return [not_measured("masks-h200")]
    head = [
        "kind", "how many", "flashcore", "the best of `sdpa`", "to it", "to it, from Python", "no mask, to it",
        "a key range, to it",
    ]  # fmt: skip
    lines = []
    for kind, rows in grouped(record["rows"], lambda row: re.split(r" B\d", row["case"])[0]).items():
        eager = [row["eager"] | {"unit": "us"} for row in rows if isinstance(row.get("eager"), dict)]
        cells = [kind, str(len(rows)), *(spread(figures(rows, key), "us") for key in ("flashcore", "sdpa"))]
        cells += [middle(quotients(rows, "flashcore", "sdpa")), middle(quotients(eager, "flashcore", "sdpa"))]
        cells += [middle(quotients(rows, other, "flashcore"), max) for other in ("plain", "range")]
        lines.append(cells)
    said = "Medians; to it: above 1 is faster; what a mask costs beside none, and beside a key range that hides as much"
    return [*table(head, lines), "", f"{said}; {origin(record)}."]


def models() -> list[str]:
    """Whole models beside sdpa: for each group the ratio, and attention's own time."""
    record = load("models-h200.json")
    if record is None:
        return [not_measured("models-h200")]
    groups = grouped([row for row in record["rows"] if "group" in row], lambda row: row["group"])
    head = ["models", "how many", "to `sdpa`", "attention's own time, of `sdpa`'s", "more than 2 % behind"]
    lines = []
    for group, rows in (groups | {"all": record["rows"]}).items():
        # Where Transformers does not offer sdpa, eager was timed.
        timed = [row | {"sdpa": row["eager"]} if number(row, "eager") else row for row in rows]
        ratios = quotients(timed, "flashcore", "sdpa")
        own = [
            (row["flashcore"] - row["noop"]) / (row["sdpa"] - row["noop"])
            for row in timed
            if all(number(row, key) for key in ("flashcore", "sdpa", "noop")) and row["sdpa"] > row["noop"]
        ]
        behind = sum(ratio < 1 / 1.02 for ratio in ratios)
        lines.append([group, str(len(ratios)), middle(ratios), middle(own, max), str(behind)])
    return [*table(head, lines), "", f"Medians; to `sdpa`: above 1 is faster; {origin(record)}."]


DECODE = {
    "flashcore": "flashcore", "flashcore_range": "with a key range", "flashcore_paged": "in pages",
    "fa3": "FlashAttention-3", "fa3_paged": "in pages", "cudnn": "cuDNN", "read": "only reading",
}  # fmt: skip
BACKWARD = {
    "flashcore": "flashcore", "fa3": "FlashAttention-3", "fa3_deterministic": "the same, deterministic",
    "cudnn": "cuDNN", "flash": "PyTorch's flash", "flex": "FlexAttention",
}  # fmt: skip
TRAINING = {"flashcore": "flashcore", "sdpa": "sdpa", "flex": "flex", "noop": "attention for nothing"}
TRAINING_RATIOS = {"to sdpa": ("sdpa", "flashcore"), "bound": ("sdpa", "noop")}
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
    "backward": backward,
    "masks": masks,
    "models": models,
    "training": lambda: benchmark_lines("training-h200", TRAINING, ratios=TRAINING_RATIOS),
    "generate": lambda: benchmark_lines("generate-h200", GENERATE),
    "generate-5.24": lambda: benchmark_lines("generate-5.24-h200", GENERATE),
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
