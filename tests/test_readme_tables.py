"""scripts/readme_tables.py: what its tables say of a record."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAD = {"gpu": "G", "torch": "1", "triton": "2", "transformers": "3", "date": "2026-01-01T00:00", "commit": "new"}


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """The module, whose records are in `tmp_path`."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "scripts" / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    yield module
    for name in ("summary", "plot_generate"):
        sys.modules.pop(name, None)


def record(folder: Path, name: str, *rows: dict) -> None:
    (folder / f"{name}-h200.json").write_text(json.dumps({**HEAD, "rows": rows}))


def rate(case: str, **figures) -> dict:
    return {"case": case, "unit": "TFLOP/s", **figures}


def test_backward(tables, tmp_path):
    record(
        tmp_path, "backward",
        rate("backward B4 S4096 H32:8 D128 causal", flashcore=400.0, fa3=500.0, fa3_deterministic=320.0, cudnn=None),
        rate("backward B4 S4096 H32:8 D128 full", flashcore=450.0, fa3=500.0, fa3_deterministic=450.0, cudnn=900.0),
        rate("backward packed B1 S16384 H32:8 D128 causal", flashcore=300.0, fa3=150.0, commit="older"),
    )  # fmt: skip
    lines = tables.backward()
    assert "| D128 | 2 | 400 to 450 TFLOP/s | 500 TFLOP/s | 320 to 450 TFLOP/s | 900 TFLOP/s |" in lines[2]
    assert lines[2].endswith("| 0.65x (least 0.50) | 1.12x (least 1.00) |")
    assert lines[3].startswith("| packed | 1 |") and "2.00x" in lines[3]
    assert lines[-1].endswith("commit new, some rows at older.")


def test_the_better_of_two_is_not_said_of_one(tables, tmp_path):
    record(tmp_path, "backward", rate("backward B1 S512 H8:8 D64 causal", flashcore=2.0, fa3=None, cudnn=1.0))
    assert "| to cuDNN |" in tables.backward()[0] and "better" not in tables.backward()[0]


def test_pages_are_held_against_none(tables, tmp_path):
    record(
        tmp_path, "prefill",
        rate("prefill B8 S2048 H32:8 D128 causal", flashcore=600.0, fa3=500.0, cudnn=400.0, paged=570.0, varlen=594.0),
    )  # fmt: skip
    assert tables.prefill()[2].endswith("| 0.95x (least 0.95) | 0.99x (least 0.99) |")


def test_masks(tables, tmp_path):
    eager = {"flashcore": 50.0, "cudnn": 40.0, "sdpa": 40.0, "best": "cudnn"}
    record(
        tmp_path, "masks",
        {"case": "full padded B64 S512 H12 D64", "unit": "us", "flashcore": 20.0, "sdpa": 30.0, "eager": eager},
        {"case": "bool B64 S512 H12 D64", "unit": "us", "flashcore": 30.0, "sdpa": 60.0, "plain": 20.0, "range": None},
        {"case": "bool B4 S4096 H12 D64", "unit": "us", "flashcore": None, "sdpa": 60.0, "plain": 20.0, "range": 10.0},
    )  # fmt: skip
    lines = tables.masks()
    assert lines[2] == "| full padded | 1 | 20 us | 30 us | 1.50x (least 1.50) | 0.80x (least 0.80) |  |"
    assert lines[3] == "| bool | 2 | 30 us | 60 us | 2.00x (least 2.00) |  | 1.50x (most 1.50) |"


def test_models(tables, tmp_path):
    record(
        tmp_path, "models",
        {"case": "a", "unit": "ms", "group": "text", "flashcore": 10.0, "sdpa": 12.0, "noop": 8.0},
        {"case": "b", "unit": "ms", "group": "text", "flashcore": 10.0, "sdpa": 9.0, "noop": 8.0},
        {"case": "c", "unit": "ms/token", "group": "audio", "flashcore": 10.0, "sdpa": None, "eager": 20.0},
        {"case": "d", "unit": "ms", "group": "audio", "flashcore": None, "sdpa": 9.0, "noop": 8.0},
    )  # fmt: skip
    lines = tables.models()
    assert lines[2] == "| text | 2 | 1.05x (least 0.90) | 1.25x (most 2.00) | 1 |"
    assert lines[3] == "| audio | 1 | 2.00x (least 2.00) |  | 0 |"
    assert lines[4].startswith("| all | 3 |")


def test_what_is_not_there_is_said(tables):
    for section in (tables.backward, tables.masks, tables.models, tables.prefill):
        assert section()[0].startswith("Not measured yet: `scripts/bench_")
