"""The floors of the house: contracts that a planted import breaks, and a map that names every file."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("flashcore_hf", "kernels/flashcore_kernels")


@pytest.fixture
def lint_imports(tmp_path):
    """lint_imports(file, line) -> what it says of a copy of the sources with that line at the file's end."""
    pytest.importorskip("importlinter")
    shutil.copy(ROOT / ".importlinter", tmp_path)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))

    def run(file: str | None = None, line: str = "") -> tuple[int, str]:
        if file is not None:
            with (tmp_path / file).open("a") as source:
                source.write(f"\n{line}\n")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, tmp_path / "kernels")))}
        code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
        done = subprocess.run(
            [sys.executable, "-c", code, "--no-cache"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    return run


def test_contracts_hold(lint_imports):
    status, said = lint_imports()
    assert status == 0, said


@pytest.mark.parametrize(
    "file, line, said",
    [
        ("kernels/flashcore_kernels/key_range.py", "from .op import attention", "key_range -> flashcore_kernels.op"),
        ("kernels/flashcore_kernels/plan.py", "def later():\n    import triton", "plan -> triton"),
        ("kernels/flashcore_kernels/naive.py", "import transformers", "naive -> transformers"),
        ("flashcore_hf/masks.py", "import triton", "masks -> triton"),
        ("flashcore_hf/masks.py", "from flashcore_kernels.naive import naive_attention", "masks -> flashcore_kernels"),
        ("flashcore_hf/compat.py", "from .attention import flashcore_attention", "compat -> flashcore_hf.attention"),
    ],
    ids=["upward", "choice-with-triton", "kernels-with-transformers", "adapter-with-triton", "undeclared", "circle"],
)
def test_a_planted_import_shows(lint_imports, file, line, said):
    status, answer = lint_imports(file, line)
    assert status == 1 and "BROKEN" in answer and said in answer, answer


def map_of(text: str) -> set[str]:
    """Files that CONTRIBUTING.md's tables name, a folder's own relative to it."""
    named = set()
    section = text.split("## Where things live")[1].split("\n## ")[0]
    for package, table in zip(PACKAGES[::-1], re.split(r"\*\*`\w", section)[1:], strict=True):
        for line in table.splitlines():
            cells = [cell.strip() for cell in line.split("|")]
            if len(cells) < 3:
                continue
            folders = [word for word in re.findall(r"`([^`]+)`", cells[1]) if word.endswith("/")]
            for word in re.findall(r"`([\w./]+\.py)`", cells[1] + cells[2]):
                inside = folders[0] if folders and f"`{word}`" in cells[2] else ""
                named.add(f"{package}/{inside}{word}")
    return named


def test_the_map_names_every_file():
    files = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py" or path.parent == ROOT / package
    }
    named = map_of((ROOT / "CONTRIBUTING.md").read_text())
    assert files - named == set(), "files that the map leaves out"
    assert named - files == set(), "names on the map that are no files"
