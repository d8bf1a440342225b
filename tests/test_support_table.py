"""SUPPORT.md is what the sweeps found, and the sweeps found what is promised."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "scripts" / "results"


@pytest.fixture(scope="module")
def support_table():
    spec = importlib.util.spec_from_file_location("support_table", ROOT / "scripts" / "support_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(version: str, where: str = "cpu") -> list[dict]:
    return json.loads((RESULTS / f"support-{version}-{where}.json").read_text())["rows"]


def test_table_and_data_agree(support_table):
    assert (ROOT / "SUPPORT.md").read_text() == support_table.build(support_table.load())


def test_a_changed_result_changes_the_table(support_table):
    """The control: one row that turns wrong, and one that is gone, are seen."""
    records = support_table.load()
    before = support_table.build(records)
    changed = copy.deepcopy(records)
    next(row for row in changed[-1]["rows"] if row["class"] == "LlamaForCausalLM")["status"] = "wrong"
    assert support_table.build(changed) != before and "**wrong**" in support_table.build(changed)
    shorter = copy.deepcopy(records)
    shorter[-1]["rows"].pop()
    assert support_table.build(shorter) != before


def test_times_beside_sdpa_stand_in_the_table(support_table, tmp_path):
    file = tmp_path / "models.json"
    timed = [("LlamaForCausalLM", 1.337), ("LlamaForCausalLM", 0.981), ("BertModel", 1.125)]
    rows = [{"case": str(i), "class": name, "ratio": ratio} for i, (name, ratio) in enumerate(timed)]
    file.write_text(json.dumps({"rows": [*rows, {"case": "failed", "class": "BertModel", "flashcore": None}]}))
    ratios = support_table.load_ratios(file)
    lines = support_table.build(support_table.load(), ratios).splitlines()
    assert [line for line in lines if line.startswith("| LlamaForCausalLM |")][0].endswith("| 0.98x to 1.34x |")
    assert [line for line in lines if line.startswith("| bert |")][0].endswith("| 1.12x |")
    assert [line for line in lines if line.startswith("| MistralForCausalLM |")][0].endswith("|  |")
    # The control: without times there is no such column.
    assert "beside `sdpa`" not in support_table.build(support_table.load(), {})


def test_nothing_supported_is_wrong():
    for file in RESULTS.glob("support-*.json"):
        assert not [row["class"] for row in json.loads(file.read_text())["rows"] if row["status"] == "wrong"], file.name


def test_causal_models_of_the_newest():
    causal = [row for row in rows("5.24.0") if row["class"].endswith("ForCausalLM") and row["supports_backend"]]
    assert len(causal) == 124
    assert sum(row["status"] == "match" for row in causal) >= 121
    assert all(row["reason"] for row in causal if row["status"] != "match")


def test_every_key_range_model_was_run_on_key_ranges():
    from flashcore_hf.models import KEY_RANGE_MODELS

    found = {row["model_type"]: row for row in rows("5.24.0") if row["class"].endswith("ForCausalLM")}
    for model_type in KEY_RANGE_MODELS:
        row = found[model_type]
        assert row["status"] == "match" and row["paths"]["key_range"] > 0, model_type
        assert "dense_mask" not in row["paths"], model_type


@pytest.fixture(scope="module")
def families() -> list[str]:
    sys.path.insert(0, str(ROOT / "scripts"))
    from sweep_architectures import FAMILIES

    return FAMILIES


def test_the_most_used_families_on_a_gpu(families):
    """Native kernels alone, on key ranges alone; a scale that is wrong by half shows."""
    found = {row["model_type"]: row for row in rows("5.17.0", "h200") if row["class"].endswith("ForCausalLM")}
    for family in families:
        row = found[family]
        assert row["status"] == "match" and row["paths"]["decode"] > 0 and row["paths"]["key_range"] > 0, family
        assert "dense_mask" not in row["paths"] and "torch" not in row["paths"], family
        assert row["checks"]["float32"]["control"] > 1e-3, family


def test_the_most_used_families_in_the_interpreter(families):
    """What `--interpret` ran: the same calls through the kernels on a CPU."""
    found = {row["model_type"]: row for row in rows("5.24.0") if row["class"].endswith("ForCausalLM")}
    interpreted = {family: found[family]["interpreter"] for family in families if "interpreter" in found[family]}
    assert len(interpreted) >= 10
    for family, row in interpreted.items():
        assert row["status"] == "match" and row["paths"]["decode"] > 0 and row["paths"]["key_range"] > 0, family
        assert "dense_mask" not in row["paths"] and "torch" not in row["paths"], family
