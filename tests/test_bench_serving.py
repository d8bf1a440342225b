"""What a benchmark that ends early says: who was not measured, and why."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", minversion="5.17")
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench_serving  # noqa: E402

ROWS = {"first": ("tokens/s", ["flashcore", "fa3"]), "second": ("us", ["kernel"])}


def rows(path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def test_rows_name_who_is_left_out(tmp_path):
    """From the beginning on: the program may be ended at any time."""
    record = bench_serving.Record(tmp_path / "record.json", ROWS)
    record.write()
    assert [row["case"] for row in rows(record.path)] == ["first", "second"]
    assert rows(record.path)[0]["fa3 left out"] == rows(record.path)[1]["kernel left out"] == "not reached"
    record.measure("first", "flashcore", lambda: {"flashcore": 5.0})

    def fail():
        raise RuntimeError("no memory")

    record.measure("first", "fa3", fail)
    first, second = rows(record.path)
    assert first == {"case": "first", "unit": "tokens/s", "flashcore": 5.0, "fa3 left out": "RuntimeError: no memory"}
    assert second["kernel left out"] == "not reached"
    record.measure("second", "kernel", lambda: {"flashcore": 1.0})
    assert rows(record.path)[1] == {"case": "second", "unit": "us", "flashcore": 1.0}
    assert list(record.missing) == [("first", "fa3")]


@pytest.mark.parametrize("minutes, code", [("0", 1), ("5", 0)])
def test_command(minutes, code, tmp_path, monkeypatch):
    """What is not reached is told by the record and by the exit status; the most important cases come first."""
    measured, path = [], tmp_path / "record.json"
    monkeypatch.setattr(bench_serving, "end_all_after", lambda seconds: None)
    monkeypatch.setattr(bench_serving, "_measured", lambda models, case, who, small: measured.append((case, who)) or {})
    monkeypatch.setattr(bench_serving, "kernel_row", lambda *arguments: {})
    monkeypatch.setattr(sys, "argv", ["bench_serving.py", "--json", str(path), "--minutes", minutes])
    assert bench_serving.main() == code
    left_out = [key for row in rows(path) for key in row if key.endswith(" left out")]
    assert (len(left_out) > len(bench_serving.KERNELS)) == bool(code)
    names = [(case.name, who) for case, who in measured]
    assert names[:1] == ([] if code else [("generate_batch 8B 192 requests", "flashcore")])
    assert not names or names[-1][1] == "sdpa" and "window" in names[1][0]
