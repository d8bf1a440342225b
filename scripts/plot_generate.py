"""Draw the picture at the top of the README: a whole model's time a token beside sdpa, for light and for dark pages.

usage: python scripts/plot_generate.py    scripts/results/generate-h200.json -> generate-h200-{light,dark}.svg beside it

The SVG is written by hand: the same file gives the same bytes on every machine, and a page's own font is used.
"""

import json
import re
import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).parent / "results" / "generate-h200.json"


class Theme(NamedTuple):
    """Colours of text, of what is beside the point, and of the two backends' bars."""

    text: str
    muted: str
    flashcore: str
    sdpa: str


THEMES = {
    "light": Theme(text="#1f2328", muted="#59636e", flashcore="#0969da", sdpa="#c4ccd4"),
    "dark": Theme(text="#f0f6fc", muted="#9198a1", flashcore="#4493f8", sdpa="#484f58"),
}
# How a case's name ends -> the heading that it stands under.
HEADINGS = {
    "default graphed": "Default cache, flashcore with graphed(model)",
    "graphed liger": "Default cache, flashcore with Liger's kernels and graphed(model)",
    "default": "Default cache",
    "static": "Static cache, compiled by generate()",
}
WIDTH, LEFT, BAR_END = 800, 262, 690  # bars begin at LEFT; one that ends at BAR_END has room for its figure behind it
BAR, PAIR, HEADING, TOP = 12, 34, 30, 62


def groups(rows: list[dict]) -> dict[str, list[tuple[str, dict]]]:
    """Heading -> (what a row measured, the row), in the order of the record; without rows that lack a figure."""
    found: dict[str, list] = {}
    for row in rows:
        match = re.fullmatch(
            r"generate B(\d+) P(\d+)( left-padded)? (default graphed|graphed liger|default|static)( .*)?", row["case"]
        )
        if match and row.get("flashcore") and row.get("sdpa"):
            batch, prompt = int(match[1]), int(match[2])
            sequences = f"{batch} sequences, padded" if batch > 1 else "1 sequence"
            slots = f" in {match[5].strip()}" if match[5] else ""
            found.setdefault(HEADINGS[match[4]], []).append((f"{sequences}, {prompt:,} tokens{slots}", row))
    return found


def text(x: float, y: float, words: str, fill: str, size: int = 12, anchor: str = "start", weight: int = 400) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{fill}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )


def draw(record: dict, theme: Theme) -> str:
    """The picture as the text of an SVG file."""
    found = groups(record["rows"])
    longest = max(row[name] for rows in found.values() for _, row in rows for name in ("flashcore", "sdpa"))
    out, y, named = [], TOP, False
    out.append(text(0, 18, f"Milliseconds per generated token, {record['model']}", theme.text, 16, weight=600))
    out.append(text(0, 38, f"{record['gpu']}, {record['dtype']}; shorter is faster", theme.muted, 13))
    out.append(text(WIDTH, TOP + 14, "speed-up", theme.muted, 12, "end"))
    for heading, rows in found.items():
        out.append(text(0, y + 14, heading, theme.text, 13, weight=600))
        y += HEADING
        for label, row in rows:
            out.append(text(0, y + BAR + 5, label, theme.muted))
            for offset, name, fill in ((0, "sdpa", theme.sdpa), (BAR + 1, "flashcore", theme.flashcore)):
                length = row[name] / longest * (BAR_END - LEFT)
                out.append(f'<rect x="{LEFT}" y="{y + offset}" width="{length:.1f}" height="{BAR}" fill="{fill}"/>')
                # The first pair names the bars, so that nobody looks for a legend.
                figure = f"{row[name]:.1f}" + ("" if named else f" {name}")
                ink, weight = (theme.text, 600) if name == "flashcore" else (theme.muted, 400)
                out.append(text(round(LEFT + length + 6, 1), y + offset + 10, figure, ink, weight=weight))
            out.append(text(WIDTH, y + BAR + 5, f"{row['sdpa'] / row['flashcore']:.1f}x", theme.text, 14, "end", 600))
            named = True
            y += PAIR
        y += 4
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        "font-family=\"-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif\">"
    )
    return "\n".join([head, *out, "</svg>"]) + "\n"


def target(theme: str) -> Path:
    """Where the picture for `theme` ("light" or "dark") lies."""
    return SOURCE.with_name(f"{SOURCE.stem}-{theme}.svg")


def main() -> int:
    record = json.loads(SOURCE.read_text())
    for name, theme in THEMES.items():
        target(name).write_text(draw(record, theme))
    return 0


if __name__ == "__main__":
    sys.exit(main())
