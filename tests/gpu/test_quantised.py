"""Quantised weights under real CUDA graphs: the tokens of the same model without them."""

import pytest
import torch

import flashcore_hf

from ..hf.compare import greedy
from ..hf.test_quantised import (
    bitsandbytes_4bit,
    bitsandbytes_8bit_without_outliers,
    load,  # noqa: F401 - a fixture
    torchao_int4,
    torchao_int8,
)
from .test_graphs import cuda_prompts, recordings  # noqa: F401 - a fixture

pytestmark = pytest.mark.filterwarnings("error::flashcore_hf.graphs.FlashcoreGraphWarning")
KINDS = [torchao_int8, torchao_int4, bitsandbytes_8bit_without_outliers, bitsandbytes_4bit]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_tokens(kind, load, recordings):  # noqa: F811
    _, model = load(kind(), device="cuda", dtype=torch.bfloat16)
    ids, mask = cuda_prompts(2, 9, "left")
    flashcore_hf.use_flashcore_cache(model)
    expected = greedy(model, ids, mask, 24)
    flashcore_hf.graphed(model)
    assert torch.equal(greedy(model, ids, mask, 24), expected) and len(recordings) == 1
