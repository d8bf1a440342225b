"""Everything in this folder needs an NVIDIA GPU, and runs compiled kernels."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def compiled_kernels():
    assert os.environ.get("TRITON_INTERPRET", "0") == "0", "the GPU tests are about compiled kernels"
