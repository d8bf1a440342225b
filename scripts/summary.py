"""Median ratios of the published benchmarks: to FlashAttention-3, and to the better of it and cuDNN; of a backward also
to the FlashAttention-3 that is deterministic.

usage: python scripts/summary.py [FILE ...]     by default every benchmark in scripts/results with a peer in it
"""

import json
import statistics
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def ratio(row: dict, peers: tuple[str, ...]) -> float | None:
    """How many times as fast flashcore is as the best of `peers`, or None where a figure is missing."""
    figures = [row[peer] for peer in peers if isinstance(row.get(peer), int | float)]
    ours = row.get("flashcore")
    if not figures or not isinstance(ours, int | float):
        return None
    if row["unit"].endswith("/s"):
        return ours / max(figures)
    return min(figures) / ours


def group_of(case: str) -> str:
    """The cases that are summed up together: their kind, and for prefill and backward the head dimension."""
    words = case.split()
    dims = [word for word in words if word[0] == "D" and word[1:2].isdigit()]
    if words[0] == "backward":  # of a window, of packed rows, or of plain ones
        return " ".join(words[:2] if words[1] in ("window", "packed", "padded") else ["backward", *dims])
    return " ".join([words[0], *dims]) if words[0] == "prefill" else words[0]


PEERS = {
    "to fa3": ("fa3",),
    "to the better of fa3 and cudnn": ("fa3", "cudnn"),
    "to fa3_deterministic": ("fa3_deterministic",),
}


def summary(rows: list[dict]) -> list[str]:
    """Lines: a group, how many cases, and the median and least ratio to each of PEERS."""
    groups: dict[str, list[dict]] = {"all": rows}
    for row in rows:
        groups.setdefault(group_of(row["case"]), []).append(row)
    lines = [f"{'median, least':<20}{'cases':>6}  " + "".join(f"{name:<34}" for name in PEERS)]
    for name, members in groups.items():
        cells = []
        for peers in PEERS.values():
            ratios = [each for each in (ratio(row, peers) for row in members) if each is not None]
            cells.append(f"{statistics.median(ratios):.3f}, {min(ratios):.3f}" if ratios else "-")
        lines.append(f"{name:<20}{len(members):>6}  " + "".join(f"{cell:<34}" for cell in cells))
    return lines


def main() -> int:
    files = [Path(name) for name in sys.argv[1:]] or sorted(RESULTS.glob("*.json"))
    for file in files:
        record = json.loads(file.read_text())
        rows = [row for row in record.get("rows", ()) if "case" in row and "unit" in row]
        if any(ratio(row, ("fa3", "cudnn")) for row in rows):
            print(f"{file.name}: {record.get('gpu')}, {record.get('date', '')[:10]}", *summary(rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
