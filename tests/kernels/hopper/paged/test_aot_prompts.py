"""The Hopper kernel for pages compiles, fits, and its softmax runs beside its products, without a GPU."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

from . import aot_prompts

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

FULL = os.environ.get("FLASHCORE_TEST_FULL") == "1"


@pytest.fixture(scope="module")
def compiled():
    """compiled(*command line of aot_prompts.py) -> its reports."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as environment:
            environment.delenv("TRITON_INTERPRET", raising=False)
            pool.submit(os.getpid).result()  # the process begins here
        yield lambda *command: pool.submit(aot_prompts.all_reports, list(command)).result()


def test_compiles(compiled):
    every = ("--head-dim", "64", "128", "--page-size", "16", "256", "--group", "1", "4", "--features", "none", "all")
    reports = compiled(*(every if FULL else ("--head-dim", "128", "--page-size", "16", "--features", "none")))
    wrong = [f"{r['head_dim']} {r['page_size']} {r['features']}: {r['problems']}" for r in reports if r["problems"]]
    assert reports and not wrong, "\n".join(wrong)


def test_too_few_registers_show(compiled):
    """The control."""
    (report,) = compiled(
        "--head-dim", "128", "--page-size", "256", "--features", "none", "--row", "consumer_registers=152"
    )  # fmt: skip
    assert report["problems"]
