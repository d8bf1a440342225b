"""The same bits of gradients: in two runs of one call, and for a sequence alone, batched or padded."""

import pytest
import torch
from flashcore_kernels import make_key_range

from ..reference import DTYPES, Call, build
from .gradients import Training, problem_of, train

pytestmark = pytest.mark.usefixtures("poisoned_empty", "products_row_by_row")
OWN, HEADS, KV_HEADS, HEAD_DIM = 45, 2, 1, 16


@pytest.mark.parametrize("features", [("causal", "sinks"), ("rows",), ("float-mask",)], ids="+".join)
def test_two_runs(features, device):
    training = train(build(features, 33, 49, heads=(2, 1), head_dim=16, device=device))
    one, two = training.gradients(), training.gradients()
    assert all(torch.equal(one[name], two[name]) for name in one)


def alone(dtype, device, **arguments) -> Training:
    generator = torch.Generator().manual_seed(0)
    sizes = (HEADS, KV_HEADS, KV_HEADS)
    tensors = (torch.randn(1, heads, OWN, HEAD_DIM, generator=generator).to(dtype).to(device) for heads in sizes)
    return train(Call(*tensors, arguments))


def padded(training: Training, before: int, after: int, arguments: dict) -> Training:
    """The same sequence as the second of a batch of two, with padding around it, NaN in its keys and values.

    Its output and lse are those of the sequence alone: they are inputs of a backward.
    """

    def pad(tensor, fill):
        shape = list(tensor.shape)
        shape[0], shape[2] = 2, before + OWN + after
        other = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(tensor)
        other[1] = fill
        other[1, :, before : before + OWN] = tensor[0]
        return other

    call = training.call
    call = Call(pad(call.query, 0.5), pad(call.key, float("nan")), pad(call.value, float("nan")), arguments)
    answered = pad(training.output, 0.0), pad(training.lse, -torch.inf)
    return Training(call, problem_of(call), *answered, pad(training.grad_output, 1.0), pad(training.grad_lse, 0.0))


def own(gradients: dict, before: int) -> dict:
    return {name: gradients[name][1:, :, before : before + OWN] for name in ("dq", "dk", "dv")}


@pytest.mark.parametrize("padding", [(7, 0), (0, 9), (35, 3), (50, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_alone_and_padded(dtype, padding, device):
    """Key blocks begin at the sequence's first key, query blocks at the query that stands there."""
    before, after = padding
    single = alone(DTYPES[dtype], device, is_causal=True)
    length = before + OWN + after
    first = torch.tensor([0, before], dtype=torch.int32)
    key_range = make_key_range(2, length, first=first, end=torch.tensor([length, before + OWN]), right=0).to(device)
    batched = padded(single, before, after, {"key_range": key_range})
    wanted, got = single.gradients(), own(batched.gradients(), before)
    for name in got:
        assert torch.equal(got[name], wanted[name]), name


@pytest.mark.parametrize("moved", ["queries", "keys"])
def test_it_matters_where_the_blocks_begin(moved, device):
    """The inverse: had padding moved the blocks, the bits above would have differed.

    A dense mask hides the padding instead, which moves all blocks; or padding queries alone come first, of which a
    KeyRange says that they stand at the first key, so that the grid of query blocks begins there (no phase).
    """
    single = alone(torch.float32, device)
    before = 7
    length = before + OWN
    if moved == "keys":
        mask = torch.zeros(1, 1, length, length, dtype=torch.bool, device=device)
        mask[..., before:, before:] = True
        other = padded(single, before, 0, {"mask": mask})
    else:
        first = torch.tensor([0, before], dtype=torch.int32)
        key_range = make_key_range(2, length, first=first, query_start=before).to(device)
        other = padded(single, before, 0, {"key_range": key_range})
        # The padding queries see the keys here, and add nothing.
        other.lse[1, :, :before] = -torch.inf
    wanted, got = single.gradients(), own(other.gradients(), before)
    for name in ("dk", "dv"):
        torch.testing.assert_close(got[name], wanted[name], atol=1e-5, rtol=1e-4)
        assert not torch.equal(got[name], wanted[name]), name
