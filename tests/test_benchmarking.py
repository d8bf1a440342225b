"""scripts/benchmarking.py: the record that benchmarks write."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def benchmarking():
    spec = importlib.util.spec_from_file_location("benchmarking", ROOT / "scripts" / "benchmarking.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def rows(path: Path) -> dict[str, dict]:
    return {row["case"]: row for row in json.loads(path.read_text())["rows"]}


def amended(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_run_that_is_ended_keeps_its_rows_and_names_the_others(benchmarking, tmp_path):
    path = tmp_path / "r.json"
    record = benchmarking.Record(path, dtype="bfloat16")
    for case in record.each(["a", "b", "c"]):
        if case == "b":
            break
        record.add({"case": case, "unit": "us", "flashcore": 1.0})
    written = json.loads(path.read_text())
    assert written["not reached"] == ["b", "c"] and written["dtype"] == "bfloat16" and list(rows(path)) == ["a"]


def test_no_case_begins_when_the_minutes_are_over(benchmarking, tmp_path, capsys):
    record = benchmarking.Record(tmp_path / "r.json", minutes=0)
    assert list(record.each([("a", 1), ("b", 2)], lambda case: [f"{case[0]} {case[1]}"])) == []
    assert json.loads((tmp_path / "r.json").read_text())["not reached"] == ["a 1", "b 2"]
    assert "a 1" in capsys.readouterr().out
    # The control: with time there are all.
    assert list(benchmarking.Record(None).each(["a", "b"])) == ["a", "b"]


def test_rows_of_other_calls_stay_with_their_commit(benchmarking, tmp_path):
    path = tmp_path / "r.json"
    benchmarking.Record(path).add({"case": "a", "unit": "us", "flashcore": 1.0})
    record = benchmarking.Record(path)
    record.add({"case": "b", "unit": "us", "flashcore": 2.0})
    assert list(rows(path)) == ["a", "b"] and "commit" not in rows(path)["a"]

    amended(path, commit="older", memory=3)
    record = benchmarking.Record(path)
    record.add({"case": "b", "unit": "us", "flashcore": 4.0})
    assert rows(path)["a"]["commit"] == "older" and "commit" not in rows(path)["b"]
    assert rows(path)["b"]["flashcore"] == 4.0 and "memory" not in json.loads(path.read_text())


def test_rows_of_another_machine_are_not_mixed_in(benchmarking, tmp_path):
    path = tmp_path / "r.json"
    benchmarking.Record(path).add({"case": "a", "unit": "us"})
    amended(path, torch="1.0")
    with pytest.raises(ValueError, match="of another torch"):
        benchmarking.Record(path)
