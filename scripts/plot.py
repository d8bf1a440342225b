"""Draw a benchmark of prefill, backward or full attention (over sequence length, a panel for each kind) or of serving.

usage: python scripts/plot.py scripts/results/{prefill,backward,masks,serving}-h200.json [OUT.svg]
       needs matplotlib (pip install '.[bench]')
"""

import json
import re
import sys
from pathlib import Path

CONTENDERS = {
    "flashcore": "C3", "fa3": "C0", "fa3_deterministic": "C9", "cudnn": "C2", "flash": "C7", "efficient": "C5",
    "portable": "C1", "flex": "C4",
}  # fmt: skip
LABELS = {
    "fa3": "FlashAttention-3", "fa3_deterministic": "FlashAttention-3, deterministic", "cudnn": "cuDNN",
    "flash": "PyTorch flash (FA2)", "flex": "FlexAttention", "portable": "flashcore, portable",
}  # fmt: skip


def panels(rows: list[dict]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Title -> contender -> (sequence length, TFLOP/s, or us of full attention)."""
    found: dict[str, dict] = {}
    for row in rows:
        match = re.fullmatch(r"(?:prefill|backward|(full)( padded)?) B\d+ S(\d+) (H\S+ D\S+(?: \w+)?)", row["case"])
        if match and row["unit"] == ("us" if match[1] else "TFLOP/s"):
            panel = found.setdefault(f"{match[4]}{match[2] or ''}", {})
            for name in CONTENDERS:
                if row.get(name):
                    panel.setdefault(name, []).append((int(match[3]), row[name]))
    return {title: panel for title, panel in found.items() if len(panel.get("flashcore", ())) > 2}


def bars(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Case -> contender -> tokens a second, of the rows that have that unit."""
    contenders = ("flashcore", "fa3", "sdpa")
    found = {}
    for row in rows:
        if row["unit"] == "tokens/s":
            found[row["case"].partition(" ")[2]] = {name: row[name] for name in contenders if row.get(name)}
    return {case: rates for case, rates in found.items() if rates}


def draw_serving(record: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = bars(record["rows"])
    figure, axes = plt.subplots(1, len(found), figsize=(3.6 * len(found), 3.4), squeeze=False)
    for axis, (title, rates) in zip(axes.flat, found.items()):
        names = [LABELS.get(name, name) for name in rates]
        drawn = axis.bar(names, list(rates.values()), color=[CONTENDERS.get(name, "C7") for name in rates])
        axis.bar_label(drawn, fmt="{:,.0f}", fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.set(ylabel="tokens/s")
        axis.tick_params(axis="x", labelsize=8)
    figure.suptitle(f"generate_batch, random weights, bf16, {record['gpu']}, {record['date'][:10]}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path)


def draw(record: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = panels(record["rows"])
    columns = 2
    lines = -(-len(found) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(10, 3.2 * lines), squeeze=False)
    kind = record["rows"][0]["case"].split()[0]
    what, tokens, unit = {
        "prefill": ("Prefill", "16K", "TFLOP/s"), "backward": ("Backward", "16K", "TFLOP/s"),
    }.get(kind, ("Attention", "32K", "us"))  # fmt: skip
    for axis, (title, panel) in zip(axes.flat, found.items()):
        for name, points in panel.items():
            axis.plot(*zip(*points), "o-", color=CONTENDERS[name], label=LABELS.get(name, name),
                      linewidth=2.5 if name == "flashcore" else 1.2, markersize=4)  # fmt: skip
        axis.set(title=title, xscale="log", ylabel=unit, ylim=(0, None))
        axis.set_xticks([x for x, _ in panel["flashcore"]], [str(x) for x, _ in panel["flashcore"]])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    for axis in axes.flat[len(found) :]:
        axis.set_axis_off()
    figure.suptitle(f"{what}, bf16, {tokens} tokens, {record['gpu']}, {record['date'][:10]}")
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    source = Path(sys.argv[1])
    record, path = (
        json.loads(source.read_text()),
        Path(sys.argv[2]) if len(sys.argv) > 2 else source.with_suffix(".svg"),
    )
    (draw_serving if bars(record["rows"]) else draw)(record, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
