"""Tests of the adapter: importing it registers the backend for the whole run."""

import pytest
import transformers
from flashcore_kernels import path_counts

import flashcore_hf  # noqa: F401

transformers.logging.set_verbosity_error()


@pytest.fixture
def paths():
    """Counter of attention calls by the path that served them, empty at the start of the test."""
    path_counts.clear()
    return path_counts
