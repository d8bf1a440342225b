"""nox -s tests | lint | trl | hub | docker_steps | newest | constraints | full | legacy.

`tests`, `docker_steps` and what `full` begins with have the versions of constraints.txt, which `constraints` writes;
`newest` has the newest of everything. `full` is the product of versions; it takes hours on a small machine. `legacy` is
the part of it before Transformers 4.53, one environment a version.

The tests need the CPU build of PyTorch alone. Where pip's own index has it with CUDA, PIP_EXTRA_INDEX_URL chooses:
https://download.pytorch.org/whl/cpu
"""

import json
import platform
import re
import time
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path

import nox

TORCH = "torch==2.13.0"
# Here the helper is the way in (flashcore_hf/legacy); tests/hf leaves out what does not apply.
LEGACY = ("4.40.2", "4.43.4", "4.45.2", "4.47.1", "4.48.3", "4.51.3", "4.52.4")
TRANSFORMERS = ("4.53.3", "4.57.6", "5.0.0", "5.4.0", "5.17.0", "5.23.0", "5.24.0")
TRITON = ("3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
CONSTRAINTS = Path("constraints.txt")
# What the newest of those Transformers needs.
OLDEST_PYTHON = "3.11"
HEADER = f"""\
# The versions that this commit was tested with: pip install -e '.[test]' -c constraints.txt
# For Python {OLDEST_PYTHON} and newer, and the CPU build of PyTorch (CUDA builds ask for a Triton of their own).
# Written by `nox -s constraints`; do not edit.
"""
RESULTS = Path("scripts/results")

nox.options.sessions = ["lint", "tests"]
nox.options.error_on_missing_interpreters = True


def install(session: nox.Session) -> None:
    session.install("-e", ".[test]", "-c", str(CONSTRAINTS))


@nox.session
def tests(session: nox.Session) -> None:
    """Everything, on the newest Transformers and Triton that were tested."""
    install(session)
    session.run("python", "-m", "pytest", "-n", "auto", "--dist", "worksteal", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: rules and format; what may import what; the schemas of GitHub's files."""
    session.install("-e", ".", "ruff", "check-jsonschema", "import-linter", "-c", str(CONSTRAINTS))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")
    workflows = sorted(map(str, Path(".github/workflows").glob("*.yml")))
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    form = ".github/ISSUE_TEMPLATE/bug.yml"
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-issue-forms", form)


@nox.session
def newest(session: nox.Session) -> None:
    """Everything and the tripwire, on the newest release of all dependencies, and which of them are newer than tested.

    Arguments after -- hold something back, as in `nox -s newest -- torch==2.13.0`.
    """
    session.install("--upgrade", "--upgrade-strategy", "eager", "-e", ".[test]", "torch", *session.posargs)
    newer = newer_than_tested(session.run("pip", "freeze", silent=True))
    said = f"newer than tested: {', '.join(newer) or 'nothing'}"
    session.log(said)
    try:
        session.run("python", "-m", "pytest", "-m", "not gpu", "-n", "auto", "--dist", "worksteal")
    except nox.command.CommandFailed:
        session.error(f"{said}. CONTRIBUTING.md says what to do for a new release")


@nox.session
def docker_steps(session: nox.Session) -> None:
    """The Dockerfile's steps as a script, in a folder of their own."""
    session.run("python", "tests/docker_steps.py")


def newer_than_tested(frozen: str) -> list[str]:
    """Of the output of `pip freeze`, what is of a newer release than in constraints.txt, with both versions."""
    found, tested = pins(frozen), pins(CONSTRAINTS.read_text())
    return [f"{name} {found[name]} (tested: {tested[name]})" for name in tested
            if name in found and as_numbers(found[name]) > as_numbers(tested[name])]  # fmt: skip


def pins(text: str) -> dict[str, str]:
    """Package, spelt as constraints.txt does it -> version, from lines `package==version`."""
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def as_numbers(version: str) -> tuple[int, ...]:
    """The numbers of a release in front of its suffixes: "2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(map(int, re.match(r"\d+(?:\.\d+)*", version)[0].split(".")))


@nox.session
def constraints(session: nox.Session) -> None:
    """Write constraints.txt: PyTorch, Transformers and Triton as above, the newest release of all else that works."""
    session.install("uv")
    scratch = Path(session.create_tmp())
    chosen = scratch / "chosen.txt"
    chosen.write_text(f"{TORCH}\ntransformers=={TRANSFORMERS[-1]}\n")
    # The CUDA build of PyTorch asks for a Triton of its own, the CPU build, which tests run on, for none.
    override = scratch / "override.txt"
    override.write_text(f"triton=={TRITON[-1]}; sys_platform == 'linux'\n")
    text = session.run(
        "uv", "pip", "compile", "pyproject.toml", "--extra", "dev", "--universal", "--python-version", OLDEST_PYTHON,
        "--fork-strategy", "fewest", "--constraints", str(chosen), "--overrides", str(override), "--no-annotate",
        "--no-header", "--quiet", silent=True,
    )  # fmt: skip
    lines = [line for line in text.splitlines() if not re.match("nvidia-|cuda-", line)]
    CONSTRAINTS.write_text(HEADER + "\n".join(lines) + "\n")


@nox.session
def trl(session: nox.Session) -> None:
    """TRL's trainers on tiny models, beside `sdpa`; elsewhere these tests are skipped."""
    install(session)
    session.install("trl==1.16.0", "peft==0.21.2")
    session.run("python", "-m", "pytest", "tests/hf/trl", "tests/hf/test_examples.py", "-q", *session.posargs)


@nox.session
def hub(session: nox.Session) -> None:
    """The kernel for the Hub, by `kernels` and the newest Transformers that takes a published version of it."""
    install(session)
    session.install("transformers==5.17.0", "kernels==0.16.2")
    session.run("python", "-m", "pytest", "tests/test_hub_kernel.py", "-q", *session.posargs)


@nox.session
def full(session: nox.Session) -> None:
    """tests/hf on every Transformers, and the kernels' tests (every table's rows compiled) on every Triton.

    The summary goes to scripts/results/full-matrix.{json,md}, a row for each version, written as soon as it is known.
    One environment serves all versions, which replace each other in it: PyTorch alone would fill a disk otherwise.
    Arguments after -- narrow the versions, as in `nox -s full -- transformers==5.0.0 triton==3.5.1`; rows of the others
    stay as an earlier run left them, with its date and commit.
    """
    requirements = {f"transformers=={version}": "tests/hf" for version in LEGACY + TRANSFORMERS}
    requirements |= {f"triton=={version}": "tests/kernels" for version in TRITON}
    run_matrix(session, requirements, session.posargs or list(requirements))


@nox.session
@nox.parametrize("version", LEGACY)
def legacy(session: nox.Session, version: str) -> None:
    """A row of `full` in an environment of its own, for each Transformers that has the helper alone."""
    run_matrix(session, {f"transformers=={version}": "tests/hf"})


def run_matrix(session: nox.Session, folders: dict[str, str], asked: list[str] | None = None) -> None:
    """Run the tests in the folder of each requirement asked for (all by default), and enter each in the summary."""
    unknown = set(asked or ()) - set(folders)
    if unknown:
        session.error(f"{', '.join(sorted(unknown))}: known are {', '.join(folders)}")
    install(session)
    json_file, failed = RESULTS / "full-matrix.json", []
    for requirement in asked or folders:
        if requirement.startswith("triton"):
            # The interpreters before 3.7 and NumPy 2.4 do not go together (device.py).
            session.install("--upgrade", "transformers", "numpy<2.4")
        row = run_suite(session, requirement, folders[requirement])
        known = json.loads(json_file.read_text())["rows"] if json_file.exists() else []
        rows = sorted([r for r in known if r["requirement"] != requirement] + [row], key=by_version)
        json_file.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        json_file.with_suffix(".md").write_text(summary(rows))
        if row["exit_status"] or row["failed"] or not row["passed"]:
            failed.append(requirement)
    session.log("\n" + json_file.with_suffix(".md").read_text())
    if failed:
        session.error(f"failed: {', '.join(failed)}")


def by_version(row: dict) -> tuple:
    """Key to sort rows by: transformers before triton, each from old to new."""
    name, _, version = row["requirement"].partition("==")
    return name, tuple(map(int, version.split(".")))


def run_suite(session: nox.Session, requirement: str, folder: str) -> dict:
    """Install `requirement`, run the tests in `folder`, and return one row of the summary."""
    session.install(requirement)
    junit = Path(session.create_tmp()) / f"{requirement}.xml"
    junit.unlink(missing_ok=True)
    commit = session.run("git", "rev-parse", "--short", "HEAD", silent=True, external=True).strip()
    began = time.monotonic()
    # Any exit status: one version that fails must not hide the others.
    session.run(
        "python", "-m", "pytest", folder, "-q", "-n", "auto", "--dist", "worksteal", f"--junitxml={junit}",
        env={"FLASHCORE_TEST_FULL": "1"}, success_codes=list(range(256)),
    )  # fmt: skip
    seconds = time.monotonic() - began
    names = ("torch", "triton", "transformers")
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names}}}))"
    versions = json.loads(session.run("python", "-c", code, silent=True).strip().splitlines()[-1])
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    # No file: pytest itself did not get through.
    if junit.exists():
        for suite in ElementTree.parse(junit).getroot().iter("testsuite"):
            failed = int(suite.get("failures")) + int(suite.get("errors"))
            skipped = int(suite.get("skipped"))
            counts["failed"] += failed
            counts["skipped"] += skipped
            counts["passed"] += int(suite.get("tests")) - failed - skipped
    return {
        "requirement": requirement,
        "tests": folder,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        **versions,
        "python": platform.python_version(),
        **counts,
        "exit_status": 0 if junit.exists() else 1,
        "seconds": round(seconds),
    }


def summary(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    columns = (
        "tests", "transformers", "triton", "torch", "python", "passed", "failed", "skipped", "seconds", "date", "commit"
    )  # fmt: skip
    lines = ["# Tests over versions", "", "Written by `nox -s full`.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]).partition("T")[0] for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"
