"""What stands around the packages: constraints, workflows, the Dockerfile and the README's picture hold together."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from . import docker_steps

try:
    import tomllib
except ImportError:  # Python 3.10
    tomllib = None

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def constraints() -> dict[str, str]:
    """Package -> version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    return {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}


def project() -> dict:
    if tomllib is None:
        pytest.skip("needs tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def noxfile() -> tuple[dict[str, object], set[str]]:
    """The noxfile's constants, and the names of its sessions; nox itself need not be there."""
    values, sessions = {}, set()
    for node in ast.parse((ROOT / "noxfile.py").read_text()).body:
        if isinstance(node, ast.Assign):
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except (ValueError, AttributeError):
                continue
        elif isinstance(node, ast.FunctionDef) and any("session" in ast.unparse(d) for d in node.decorator_list):
            sessions.add(node.name)
    return values, sessions


def floating(pins: dict[str, str], wanted: list[Requirement]) -> set[str]:
    """What `wanted` brings, directly or not, that `pins` does not name, as far as the installed packages say.

    Only an installed version that is the pinned one is asked for its own requirements: another one may have new ones.
    """
    missing, seen = set(), set()
    queue = [(requirement, "") for requirement in wanted]
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if (name, *requirement.extras) in seen:
            continue
        seen.add((name, *requirement.extras))
        if name not in pins:
            missing.add(name)
            continue
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.version.partition("+")[0] == pins[name]:
            below = [Requirement(text) for text in found.requires or ()]
            queue += [(each, extra) for extra in {"", *requirement.extras} for each in below]
    return missing


def direct() -> list[Requirement]:
    """The requirements of `pip install -e '.[dev]'`."""
    extras = project()["optional-dependencies"]
    texts = [*project()["dependencies"], *extras["test"], *extras["dev"]]
    return [Requirement(text) for text in texts if not text.startswith("flashcore-hf")]


def test_nothing_that_tests_need_floats():
    """What constraints.txt does not name may be another version next year: Transformers 5.24 broke 42 tests."""
    pins = constraints()
    assert not floating(pins, direct())
    for requirement in direct():
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("name", ["pytest", "pluggy"])
def test_a_floating_one_would_be_noticed(name):
    """The negative control: one that is asked for, and one that only another one asks for."""
    pins = constraints()
    if importlib.metadata.version("pytest") != pins["pytest"]:
        pytest.skip("what another pytest needs says nothing")
    del pins[name]
    assert floating(pins, direct()) == {name}


def test_constraints_are_the_newest_tested():
    values, pins = noxfile()[0], constraints()
    assert values["TORCH"] == f"torch=={pins['torch']}"
    assert values["TRANSFORMERS"][-1] == pins["transformers"]
    assert values["TRITON"][-1] == pins["triton"]
    tested = re.search(r'^NEWEST_TESTED = "(.*)"', (ROOT / "flashcore_hf" / "compat.py").read_text(), re.MULTILINE)[1]
    assert tested == pins["transformers"]


def test_installing_never_chooses_another_torch():
    """A user's PyTorch stays: no extra holds torch or Triton to anything but a lower bound."""
    extras = project()["optional-dependencies"]
    every = [Requirement(text) for text in project()["dependencies"] + [t for texts in extras.values() for t in texts]]
    bounds = [str(r.specifier) for r in every if r.name in ("torch", "triton", "transformers")]
    assert len(bounds) == 3 and all(re.fullmatch(r">=[\d.]+", bound) for bound in bounds)


@pytest.mark.parametrize("file, extra", [("README.md", "test"), ("CONTRIBUTING.md", "dev")])
def test_install_lines_use_the_constraints(file, extra):
    text = (ROOT / file).read_text()
    assert f"pip install torch=={constraints()['torch']} --extra-index-url https://" in text
    assert f"\npip install -e '.[{extra}]' -c constraints.txt\n" in text
    assert "pip install --quiet -e '.[dev]' -c constraints.txt\n" in (ROOT / ".ci" / "run").read_text()


def unpinned(workflow: str) -> list[str]:
    """Actions that are not named by a full commit hash with the version beside it."""
    used = re.findall(r"^\s*-?\s*uses:\s*(.*)$", workflow, re.MULTILINE)
    return [action for action in used if not re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)+", action)]


def test_actions_are_pinned():
    assert {path.name for path in WORKFLOWS} >= {"ci.yml", "newest.yml"}
    assert not [action for path in WORKFLOWS for action in unpinned(path.read_text())]


def test_an_action_by_its_tag_would_be_noticed():
    text = "  - uses: actions/checkout@v7\n  - uses: a/b@" + "0" * 40 + " # v7.0.1\n    uses: a/b@" + "0" * 40 + "\n"
    assert unpinned(text) == ["actions/checkout@v7", "a/b@" + "0" * 40]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_little_and_end(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= 60 and "permissions" not in job for job in workflow["jobs"].values())


def test_workflows_run_what_is_there():
    runs = {path.name: [step["run"] for job in yaml.safe_load(path.read_text())["jobs"].values()
                        for step in job["steps"] if "run" in step] for path in WORKFLOWS}  # fmt: skip
    assert ".ci/run" in runs["ci.yml"] and os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "nox -s newest" in runs["newest.yml"]


def test_documents_name_what_is_there():
    """Sessions of nox, and programs, wherever a document or a workflow says to run one."""
    texts = [(ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "noxfile.py", "constraints.txt")]
    texts += [path.read_text() for path in WORKFLOWS]
    named = {name for text in texts for name in re.findall(r"nox -s (\w+)", text)}
    assert {"newest", "constraints", "docker_steps"} <= named <= noxfile()[1]
    programs = {name for text in texts for name in re.findall(r"python ((?:scripts|tests)/\w+\.py)", text)}
    assert "scripts/plot_generate.py" in programs and all((ROOT / name).exists() for name in programs)


def test_bug_form_asks_for_the_environment():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    (field,) = (field for field in form["body"] if field.get("id") == "env")
    assert "python -m flashcore_hf env" in field["attributes"]["label"] and field["validations"]["required"]


# Stands in for the image's Python: notes what it is asked, with the files that a build would then see.
PYTHON = """#!/bin/bash
echo "$*" >> "$NOTES"
if [[ $* == "-m venv env" ]]; then mkdir -p env/bin; fi
if [[ $* == *./source* ]]; then (cd source; find . -type f) > "$NOTES.files"; fi
"""


def steps(tmp_path: Path, dockerfile: str) -> tuple[list[str], set[str], str]:
    """Run the Dockerfile's steps without installing: what Python was asked, the files to build, and the constraints."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    notes = tmp_path / "notes"
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "NOTES": str(notes)}
    script = docker_steps.script(dockerfile, tmp_path / "home")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = {name.removeprefix("./") for name in (tmp_path / "notes.files").read_text().splitlines()}
    return notes.read_text().splitlines(), files, (tmp_path / "home" / "versions.txt").read_text()


def needed() -> set[str]:
    """The files that a build of the image needs."""
    packages = [ROOT / "flashcore_hf", ROOT / "kernels" / "flashcore_kernels"]
    paths = [path for folder in packages for path in folder.rglob("*") if "__pycache__" not in path.parts]
    names = {path.relative_to(ROOT).as_posix() for path in paths if path.is_file()}
    return names | {"pyproject.toml", "README.md", "LICENSE"}


def test_docker_steps(tmp_path):
    """Every step but the downloads; `nox -s docker_steps` and CI run those too."""
    asked, files, versions = steps(tmp_path, (ROOT / "Dockerfile").read_text())
    assert asked == [
        "-m venv env", "-m pip install torch -c versions.txt", "-m pip install ./source -c versions.txt",
        "-m flashcore_hf env",
    ]  # fmt: skip
    assert needed() <= files
    # PyTorch's CUDA build asks for a Triton of its own.
    assert f"torch=={constraints()['torch']}\n" in versions and "triton" not in versions
    assert not (tmp_path / "home" / "source").exists() and (tmp_path / "home" / "examples").is_dir()


def test_a_missing_docker_step_would_be_noticed(tmp_path):
    text = (ROOT / "Dockerfile").read_text()
    _, files, _ = steps(tmp_path, text.replace("COPY --chown=flashcore kernels source/kernels\n", ""))
    assert not needed() <= files
    with pytest.raises(ValueError, match="there is no setup.cfg"):
        docker_steps.script(text + "COPY setup.cfg ./\n", tmp_path)
    with pytest.raises(ValueError, match="ADD"):
        docker_steps.script(text + "ADD x y\n", tmp_path)


def test_the_image_is_not_run_by_root():
    names = [name for name, _ in docker_steps.instructions((ROOT / "Dockerfile").read_text())]
    users = [words for name, words in docker_steps.instructions((ROOT / "Dockerfile").read_text()) if name == "USER"]
    assert users == ["flashcore"] and names.index("USER") < names.index("CMD")


@pytest.fixture(scope="module")
def plot_generate():
    spec = importlib.util.spec_from_file_location("plot_generate", ROOT / "scripts" / "plot_generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["light", "dark"])
def test_picture_is_what_the_results_say(name, plot_generate):
    record = json.loads(plot_generate.SOURCE.read_text())
    path = plot_generate.target(name)
    theme = plot_generate.THEMES[name]
    assert path.read_text() == plot_generate.draw(record, theme), "run python scripts/plot_generate.py"
    assert path.stat().st_size < 60_000
    assert path.relative_to(ROOT).as_posix() in (ROOT / "README.md").read_text()
    # The control: another figure is another picture.
    record["rows"][0]["flashcore"] += 1
    assert path.read_text() != plot_generate.draw(record, theme)


def test_picture_has_a_bar_for_every_figure(plot_generate):
    record = json.loads(plot_generate.SOURCE.read_text())
    drawn = plot_generate.draw(record, plot_generate.THEMES["light"])
    complete = [row for row in record["rows"] if "flashcore" in row and "sdpa" in row]
    assert drawn.count("<rect ") == 2 * len(complete) > 0
    assert all(f">{row[name]:.1f}" in drawn for row in complete for name in ("flashcore", "sdpa"))
