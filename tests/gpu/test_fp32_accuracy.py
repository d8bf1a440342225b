"""fp32 where scores are large, compiled, at lengths and deviations that the interpreter has no time for."""

import pytest

from ..kernels.reference import assert_right
from ..kernels.test_fp32_accuracy import large_scores


@pytest.mark.parametrize("deviation", [1, 3, 8])
@pytest.mark.parametrize("num_keys", [127, 1023, 8191])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_decode(head_dim, num_keys, deviation):
    call = large_scores(head_dim, num_keys, deviation, "cuda", batch_size=16, heads=(32, 8))
    assert_right(call.run(), call)


@pytest.mark.parametrize("deviation", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_prefill(head_dim, deviation):
    call = large_scores(head_dim, 1023, deviation, "cuda", batch_size=1, heads=(8, 2), num_queries=300)
    assert_right(call.run(), call)
