"""Training by PyTorch's path, on a CPU: the losses of `sdpa` (of eager, where there is no `sdpa`), step after step."""

import pytest

from .training import MODELS, STEPS_ON_A_CPU, difference, losses_of

pytestmark = pytest.mark.filterwarnings("ignore::flashcore_kernels.FlashcoreFallbackWarning")


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_sdpas(name, through_torch):
    reference, ours = losses_of(name, STEPS_ON_A_CPU)
    assert difference(reference, ours) <= 1e-4
    assert reference[-1] < reference[0] - 0.1, "it must learn something, or equal losses say little"
    # The control: a softmax scale that is wrong by a tenth shows.
    _, wrong = losses_of(name, 3, scale=1.1)
    assert difference(reference[:3], wrong) > 1e-3
