"""A KeyRange for packed documents: by PyTorch's operators, and by the kernel that takes their place on a GPU."""

import pytest
import torch
from flashcore_kernels import document_ranges, make_document_ranges, visible
from flashcore_kernels.device import Device
from flashcore_kernels.key_range import rows_shape

PATTERNS = [
    {}, {"right": 0}, {"left": 2, "right": 0}, {"left": 1, "right": 3}, {"chunk": 3}, {"chunk": 4, "right": 0},
    {"chunk": 5, "left": 2}, {"left": 1 << 40, "right": 1 << 40},
]  # fmt: skip
# Queries and keys of each document.
LENGTHS = [(0, 0), (4, 4), (0, 3), (3, 7), (6, 2), (2, 0), (0, 0), (1, 9)]


def lengths_of(each) -> torch.Tensor:
    return torch.tensor([0, *each], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def expected(num_queries, num_keys, cu_queries, first, end, used=None, left=-1, right=-1, chunk=0):
    """bool `[Q, K]`, one pair at a time."""
    mask = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for d in range(len(first)):
        count = int(cu_queries[d + 1] - cu_queries[d]) if used is None else int(used[d])
        for i in range(count):
            at = int(end[d]) - count + i
            for k in range(int(first[d]), int(end[d])):
                near = (left < 0 or k >= at - left) and (right < 0 or k <= at + right)
                same = not chunk or (k - int(first[d])) // chunk == (at - int(first[d])) // chunk
                mask[int(cu_queries[d]) + i, k] = near and same
    return mask


@pytest.fixture(params=["operators", "kernel"])
def make(request, device, monkeypatch):
    """make_document_ranges(...) on the CPU's tensors, both ways."""
    if request.param == "operators":
        return make_document_ranges
    pytest.importorskip("flashcore_kernels.portable.document_ranges_kernel")
    monkeypatch.setattr(document_ranges, "_in_one_launch", lambda tensors: True)

    def make(num_queries, num_keys, *tensors, used_queries=None, **pattern):
        used_queries = None if used_queries is None else used_queries.to(device)
        tensors = [t.to(device) for t in tensors]
        return make_document_ranges(num_queries, num_keys, *tensors, used_queries=used_queries, **pattern).cpu()

    return make


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_patterns(make, pattern, dtype):
    """With tokens in front of the first document and behind the last, and keys that are nobody's."""
    cu_q, cu_k = (lengths_of(each).to(dtype) for each in zip(*LENGTHS))
    cu_q, first, end = cu_q + 2, cu_k[:-1] + 1, cu_k[1:] + 1
    num_queries, num_keys = int(cu_q[-1]) + 3, int(cu_k[-1]) + 5
    got = make(num_queries, num_keys, cu_q, first, end, **pattern)
    assert got.shape == rows_shape(1, num_queries, num_keys) and got.dtype == torch.int32
    want = expected(num_queries, num_keys, cu_q, first, end, **pattern)
    assert torch.equal(visible(got, num_queries, num_keys)[0, 0], want)
    assert want.any() and not torch.equal(want, expected(num_queries, num_keys, cu_q, first, end, left=0, right=0))


@pytest.mark.parametrize("pattern", PATTERNS[:6], ids=str)
def test_used_queries(make, pattern):
    cu_q, cu_k = (lengths_of(each) for each in zip(*LENGTHS))
    used = torch.tensor([0, 3, 0, 3, 1, 0, 0, 1], dtype=torch.int32)
    end = cu_k[1:] - torch.tensor([0, 1, 3, 0, 0, 0, 0, 2], dtype=torch.int32)
    num_queries, num_keys = int(cu_q[-1]), int(cu_k[-1])
    got = make(num_queries, num_keys, cu_q, cu_k[:-1], end, used_queries=used, **pattern)
    want = expected(num_queries, num_keys, cu_q, cu_k[:-1], end, used, **pattern)
    assert torch.equal(visible(got, num_queries, num_keys)[0, 0], want)


@pytest.mark.parametrize("documents", [1, 2, 3, 64, 257])
def test_many_documents(make, documents):
    generator = torch.Generator().manual_seed(documents)
    lengths = torch.randint(0, 4, (documents,), generator=generator).tolist()
    lengths[-1] = 3
    cu = lengths_of(lengths)
    total = int(cu[-1])
    rows = make(total, total, cu, cu[:-1], cu[1:], right=0)[0, 0, :total]
    document = torch.repeat_interleave(torch.arange(documents), torch.tensor(lengths))
    assert torch.equal(rows[:, 0], cu[:-1][document])
    assert torch.equal(rows[:, 1], torch.arange(1, total + 1, dtype=torch.int32))


def test_one_document_of_no_slack(make):
    """Two keys: a line has a third word, so that no mask has this shape."""
    cu = lengths_of([3])
    got = make(3, 2, cu, torch.tensor([0]), torch.tensor([2]), right=0)
    assert visible(got, 3, 2)[0, 0].int().tolist() == [[0, 0], [1, 0], [1, 1]]


def test_a_gpu_takes_the_kernel(monkeypatch):
    """And torch.compile, other dtypes and tensors of two devices take the operators."""
    kernel = pytest.importorskip("flashcore_kernels.portable.document_ranges_kernel")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(document_ranges, "device_of", lambda device: Device("cuda", 90))
    launched = []
    monkeypatch.setattr(kernel, "launch", lambda *args: launched.append(args))
    cu = lengths_of([4, 3])
    make_document_ranges(7, 7, cu, cu[:-1], cu[1:])
    assert len(launched) == 1
    make_document_ranges(7, 7, cu.to(torch.int16), cu[:-1], cu[1:])
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    make_document_ranges(7, 7, cu, cu[:-1], cu[1:])
    assert len(launched) == 1
