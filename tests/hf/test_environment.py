"""`env` must print whatever is broken, and its exit status must say whether the kernels work."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from flashcore_hf import compat, environment
from flashcore_hf.__main__ import main


def env_command(*path, **variables) -> subprocess.CompletedProcess:
    """`python -m flashcore_hf env` in a process of its own, with folders in front of its path."""
    search = [str(folder) for folder in path] + [entry for entry in sys.path if entry]
    settings = {**os.environ, "PYTHONPATH": os.pathsep.join(search), **variables}
    return subprocess.run(
        [sys.executable, "-m", "flashcore_hf", "env"], env=settings, capture_output=True, text=True, timeout=300
    )


def test_report(capsys):
    assert main(["env"]) == 0
    report = capsys.readouterr().out
    for name in ("torch", "triton", "transformers", "accelerate", "safetensors"):
        assert f"- {name}: {version(name)}" in report
    lines = ["GPU", "driver", "way in: attention interface", "attention function: registered", "mask function"]
    if not compat.HAS_INTERFACE:
        lines[2:] = ["way in: helper for older versions", "PreTrainedModel._autoset_attn_implementation: patched"]
    for line in lines:
        assert f"- {line}" in report
    assert "flashcore_forward right" in report and "flashcore_decode right" in report and "SUCCESS" in report


@pytest.mark.parametrize("package", ["transformers", "triton", "flashcore_kernels"])
def test_report_prints_where_an_import_fails(package, tmp_path):
    """A package that breaks while it is imported is in front of the real one."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise RuntimeError('broken on purpose')\n")
    done = env_command(tmp_path)
    assert f"- torch: {version('torch')}" in done.stdout, done.stderr
    if package == "transformers":
        # The kernels know nothing of Transformers and still work; the adapter says why it does not.
        assert "NOT ENABLED: RuntimeError: broken on purpose" in done.stdout
        assert done.returncode == 0, done.stdout
    else:
        assert "broken on purpose" in done.stdout
        assert done.returncode == 1 and "FAILED" in done.stdout


def test_wrong_kernel_is_noticed(capsys, monkeypatch):
    """The negative control: the check itself, with a scale that is off."""
    import flashcore_kernels

    right = flashcore_kernels.attention
    monkeypatch.setattr(flashcore_kernels, "attention", lambda *args, **kw: right(*args, **kw, scale=0.2))
    environment.check_kernels("cpu")
    assert '"right": false' in capsys.readouterr().out


@pytest.mark.parametrize(
    "printed, status, reason",
    [
        ('[{"kernel": "flashcore_decode", "error": 1.0, "tolerance": 1e-5, "right": false, "reason": ""}]', 0, "WRONG"),
        ('[{"kernel": "torch", "error": 0, "tolerance": 1e-5, "right": true, "reason": "no GPU"}]', 0, "no GPU"),
        ("", 139, "exit status 139"),
    ],
)
def test_failed_checks(monkeypatch, capsys, printed, status, reason):
    done = subprocess.CompletedProcess([], status, stdout=printed, stderr="")
    monkeypatch.setattr(environment.subprocess, "run", lambda *args, **kwargs: done)
    assert environment.main() == 1
    assert reason in capsys.readouterr().out


def test_check_that_hangs(monkeypatch):
    def hang(*args, **kwargs):
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(environment.subprocess, "run", hang)
    passed, text = environment.kernel_check()
    assert not passed and "did not end" in text


def test_probes_are_guarded(monkeypatch):
    """Whatever a probe raises becomes a line of the report."""

    def broken(name):
        raise OSError("libcuda is somebody else's")

    monkeypatch.setattr(environment, "_import", broken)
    facts = environment.collect()
    assert "libcuda" in facts["GPU"] and "libcuda" in facts["registered"]
    assert not environment.gpu_present()


@pytest.mark.parametrize(
    "found, way",
    [
        ("5.0.0", "attention interface"),
        ("4.53.3", "attention interface"),
        ("4.52.4", "helper for older versions: .* registry"),
        ("4.48.3", "helper for older versions: .* registry"),
        ("4.47.1", "helper for older versions: .* classes"),
        ("4.40.2", "helper for older versions: .* classes"),
        ("4.39.3", "none for transformers 4.39.3"),
    ],
)
def test_way_in(found, way, monkeypatch):
    monkeypatch.setattr(environment, "version", lambda name: found)
    assert re.match(way, environment.collect()["way in"])


def test_only_the_standard_library_is_imported_at_the_top():
    top = ast.parse(Path(environment.__file__).read_text()).body
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in top if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)
