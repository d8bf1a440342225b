"""What tests that compile share: a process to do it in, since this one interprets."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest


@pytest.fixture(scope="session")
def compiling():
    """compiling(function, *arguments) -> the list that it returns in a process that compiles; it must not be empty.

    One for all tests, whatever a worker steals between them: importing PyTorch and Triton costs as much as compiling a
    small kernel. It is not measured for coverage: that makes a compiler written in Python slower, and what these tests
    are about is not which lines run.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as environment:
            for name in ("TRITON_INTERPRET", "COVERAGE_PROCESS_CONFIG"):
                environment.delenv(name, raising=False)
            pool.submit(os.getpid).result()  # the process begins here

        def compiling(function, *arguments) -> list:
            found = pool.submit(function, *arguments).result()
            assert found, arguments
            return found

        yield compiling
