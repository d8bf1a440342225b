"""Write the README's table of GPU results from the JSON in scripts/results; nothing in it is typed.

usage: python scripts/readme_tables.py [--check]    --check only says whether the README is up to date
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def load(name: str) -> dict | None:
    """The record `name` of scripts/results, or None where it has not been made."""
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def where(record: dict) -> str:
    """On what a record was measured."""
    gpu = record.get("gpu", record.get("device"))
    versions = ", ".join(f"{name} {record[name]}" for name in ("torch", "triton", "transformers"))
    return f"{gpu}, {versions}, {record['date'][:10]}"


def lines() -> list[str]:
    """The Markdown between the markers."""
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
    for cell, times in record["decode_ms_per_token"].items():
        cache, batch_size = cell.split("-")
        padded = " left-padded" if int(batch_size) > 1 else ""
        out.append(
            f"| {model}: decode, {cache} cache, B={batch_size}{padded} | {times['flashcore']:.1f} ms per token "
            f"(`sdpa`: {times['sdpa']:.1f}) | {place} |"
        )
    prompt = record.get("long_prompt")
    if prompt:
        out.append(
            f"| {model}: prefill of {prompt['prompt']} tokens | {prompt['flashcore_prefill_ms']:.0f} ms "
            f"(`sdpa`: {prompt['sdpa_prefill_ms']:.0f}) | {place} |"
        )
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    updated = "\n".join([head + BEGIN, *lines(), END + tail])
    if arguments.check:
        return int(updated != text)
    readme.write_text(updated)
    return 0


if __name__ == "__main__":
    sys.exit(main())
