"""nox -s tests | lint | full | legacy. `full` is the product of versions; it takes hours on a small machine.
`legacy` is the part of it before Transformers 4.53.

FLASHCORE_TORCH says which PyTorch every session installs first, before anything that depends on it could choose another
build: "torch==2.13.0" by default, from whatever index pip is set to.
"""

import json
import os
import platform
import time
import xml.etree.ElementTree as ElementTree
from datetime import datetime, timezone
from pathlib import Path

import nox

TORCH = os.environ.get("FLASHCORE_TORCH", "torch==2.13.0")
# Here the helper is the way in (flashcore_hf/legacy.py); tests/hf leaves out what does not apply.
LEGACY = ("4.40.2", "4.43.4", "4.45.2", "4.47.1", "4.48.3", "4.51.3", "4.52.4")
TRANSFORMERS = ("4.53.3", "4.57.6", "5.0.0", "5.4.0", "5.17.0", "5.23.0")
TRITON = ("3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
RESULTS = Path("scripts/results")

nox.options.sessions = ["lint", "tests"]
nox.options.error_on_missing_interpreters = True


def install(session: nox.Session) -> None:
    session.install(TORCH)
    session.install("-e", ".[test]")


@nox.session
def tests(session: nox.Session) -> None:
    """Everything, on the newest Transformers and Triton."""
    install(session)
    session.run("python", "-m", "pytest", "-n", "auto", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff: rules and format."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def full(session: nox.Session) -> None:
    """tests/hf on every Transformers, and every shipped configuration compiled by every Triton.

    The summary goes to scripts/results/full-matrix.{json,md}. One environment serves all versions, which replace each
    other in it: PyTorch alone would fill a disk otherwise. Arguments after -- narrow the versions, as in
    `nox -s full -- transformers==5.0.0 triton==3.5.1`; the summary is then only printed.
    """
    requirements = [(f"transformers=={version}", "tests/hf") for version in LEGACY + TRANSFORMERS]
    requirements += [(f"triton=={version}", "tests/kernels") for version in TRITON]
    run_matrix(session, requirements)


@nox.session
def legacy(session: nox.Session) -> None:
    """What `full` does, on the versions of Transformers that have the helper alone."""
    run_matrix(session, [(f"transformers=={version}", "tests/hf") for version in LEGACY])


def run_matrix(session: nox.Session, requirements: list[tuple[str, str]]) -> None:
    """Run the tests of each folder with each requirement; the summary is SESSION-matrix in scripts/results."""
    install(session)
    asked = set(session.posargs)
    rows = []
    for requirement, folder in requirements:
        if not asked or requirement in asked:
            if requirement.startswith("triton"):
                session.install("--upgrade", "transformers")
            rows.append(run_suite(session, requirement, folder))
    report = summary(session.name, rows)
    session.log("\n" + report)
    if not asked:
        record = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "rows": rows}
        (RESULTS / f"{session.name}-matrix.json").write_text(json.dumps(record, indent=1) + "\n")
        (RESULTS / f"{session.name}-matrix.md").write_text(report)
    failed = [row["requirement"] for row in rows if row["exit_status"] or row["failed"] or not row["passed"]]
    if failed:
        session.error(f"failed: {', '.join(failed)}")


def run_suite(session: nox.Session, requirement: str, folder: str) -> dict:
    """Install `requirement`, run the tests in `folder`, and return one row of the summary."""
    session.install(requirement)
    junit = Path(session.create_tmp()) / f"{requirement}.xml"
    junit.unlink(missing_ok=True)
    began = time.monotonic()
    # Any exit status: one version that fails must not hide the others.
    session.run(
        "python", "-m", "pytest", folder, "-q", "-n", "auto", f"--junitxml={junit}",
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
        **versions,
        "python": platform.python_version(),
        **counts,
        "exit_status": 0 if junit.exists() else 1,
        "seconds": round(seconds),
    }


def summary(name: str, rows: list[dict]) -> str:
    """The rows of session `name` as a Markdown table."""
    columns = ("tests", "transformers", "triton", "torch", "python", "passed", "failed", "skipped", "seconds")
    lines = ["# Tests over versions", "", f"Written by `nox -s {name}`.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"
