"""The Hopper kernels for pages compile, fit, and do not spill where it costs time, without a GPU."""

import os

import pytest

from . import aot_pages

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

FULL = os.environ.get("FLASHCORE_TEST_FULL") == "1"


@pytest.fixture
def compiled(compiling):
    """compiled(*command line of aot_pages.py) -> its reports."""
    return lambda *command: compiling(aot_pages.all_reports, list(command))


def test_compiles(compiled):
    every = ("--head-dim", "64", "128", "--page-size", "16", "256", "--group", "1", "4", "--sequences", "1", "192")
    reports = compiled(*(every if FULL else ("--head-dim", "128", "--page-size", "16", "--features", "none")))
    wrong = [
        f"{r['kernel']} {r['head_dim']} {r['page_size']} {r['features']} {r['sequences']}: {r['problems']}"
        for r in reports
        if r["problems"]
    ]
    assert len(reports) >= 2 and not wrong, "\n".join(wrong)


def test_too_few_registers_show(compiled):
    """The control."""
    (report,) = compiled(
        "--kernel", "prompts", "--head-dim", "128", "--page-size", "256", "--features", "none", "--row",
        "consumer_registers=152",
    )  # fmt: skip
    assert report["problems"]
