"""The kernel for short sequences against float64 by the error rule, and its bits against those of flashcore_hopper."""

import pytest
import torch
from flashcore_kernels import attention, make_key_range, path_counts
from flashcore_kernels.hopper.prefill import choose as prefill_choose
from flashcore_kernels.hopper.prefill.table import MOST_SHORT_KEYS
from flashcore_kernels.runtime import prepared

from ..kernels.reference import Call, assert_right, build, check, poison_unseen, strided

if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("the Gluon kernel is for compute capability 9.0", allow_module_level=True)

LENGTHS = (17, 63, 64, 65, 127, 128, 129, 191, 197, 255, 256, 333, 512, 577, 1000, MOST_SHORT_KEYS)
SHORT, LONG = "flashcore_hopper_short", "flashcore_hopper"


@pytest.fixture
def persistent(monkeypatch):
    """persistent(call) -> what flashcore_hopper answers where the short kernel is not asked."""

    def run(call, **changed):
        with monkeypatch.context() as patched:
            patched.setattr(prefill_choose, "short_row_for", lambda *sizes, **features: None)
            patched.setattr(prepared, "_calls", {})
            path_counts.clear()
            out = call.run(**changed)
            assert set(path_counts) == {LONG}
        return out

    return run


def on_short(call):
    """What the short kernel answers to `call`, checked: the output, and the lse where it is asked for."""
    path_counts.clear()
    check(call)
    out = call.run()
    assert set(path_counts) == {SHORT}, dict(path_counts)
    return out


def parts(answer) -> tuple[torch.Tensor, ...]:
    return answer if isinstance(answer, tuple) else (answer,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "features", [(), ("lse",), ("gqa-7to1", "strides"), ("left-padding",), ("right-padding", "lse"), ("holes", "lse"),
                 ("holes", "window"), ("left-padding", "causal"), ("right-padding", "window", "causal", "lse"),
                 ("unfilled", "strides", "mqa")], ids="+".join
)  # fmt: skip
def test_same_bits(features, dtype, persistent, poisoned_empty):
    """As flashcore_hopper, and right, on lengths around the edges of tiles and blocks; unseen keys are NaN."""
    for length in LENGTHS:
        for head_dim in (64, 40):
            call = build(features, length, length, batch_size=5, head_dim=head_dim, dtype=dtype, device="cuda")
            out = on_short(call)
            for ours, theirs in zip(parts(out), parts(persistent(call)), strict=True):
                assert torch.equal(ours, theirs), (length, head_dim)


@pytest.mark.parametrize("num_queries, num_keys", [(17, 1), (4096, 77), (100, 2), (65, 256), (300, 129), (1000, 64)])
def test_other_keys_than_queries(num_queries, num_keys, persistent, poisoned_empty):
    call = build(("lse",), num_queries, num_keys, dtype=torch.bfloat16, head_dim=64, device="cuda")
    for ours, theirs in zip(on_short(call), persistent(call), strict=True):
        assert torch.equal(ours, theirs)


def test_views_of_one_projection(persistent, poisoned_empty):
    """Q, K and V of `[B, S, 3, H, D]`."""
    packed = torch.randn(7, 197, 3, 12, 64, device="cuda", dtype=torch.bfloat16)
    call = build((), 197, 197, batch_size=7, heads=(12, 12), head_dim=64, dtype=torch.bfloat16, device="cuda")
    query, key, value = (each.transpose(1, 2) for each in packed.unbind(2))
    call = call._replace(query=query, key=key, value=value)
    assert torch.equal(on_short(call), persistent(call))
    shifted = call._replace(value=strided(call.value, "slice"))
    assert torch.equal(on_short(shifted), persistent(call))


@pytest.mark.parametrize("length", [64, 129, 256])
def test_sequences_that_see_nothing(length, persistent, poisoned_empty):
    call = build(("lse",), length, length, batch_size=4, head_dim=64, dtype=torch.bfloat16, device="cuda")
    end = torch.tensor([0, 1, length, 2], device="cuda")
    call.arguments.pop("is_causal")
    call.arguments["key_range"] = make_key_range(4, length, first=torch.tensor([0, 0, 3, 2], device="cuda"), end=end)
    output, lse = on_short(poison_unseen(call))
    assert not output[0].any() and (lse[0] == -torch.inf).all() and not output[3].any() and output[2].any()
    for ours, theirs in zip((output, lse), persistent(call), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("slots", [200, MOST_SHORT_KEYS, MOST_SHORT_KEYS + 44])
def test_alone_batched_and_padded(slots, side, poisoned_empty):
    """Each sequence of a batch gives the bits that it gives alone, also where the two take different kernels."""
    lengths = torch.tensor([slots, 17, 64, 65, 128, 129, 197], device="cuda")
    call = build((), slots, slots, batch_size=7, heads=(8, 2), head_dim=64, dtype=torch.bfloat16, device="cuda")
    first, end = (slots - lengths, slots) if side == "left" else (0, lengths)
    call.arguments.pop("is_causal")
    call.arguments["key_range"] = make_key_range(7, slots, first=first, end=end, device="cuda")
    path_counts.clear()
    batched = poison_unseen(call).run()
    assert set(path_counts) == {SHORT if slots <= MOST_SHORT_KEYS else LONG}
    for b, length in enumerate(lengths.tolist()):
        own = slice(slots - length, slots) if side == "left" else slice(0, length)
        alone = attention(*(tensor[b : b + 1, :, own] for tensor in (call.query, call.key, call.value)))
        assert torch.equal(batched[b : b + 1, :, own], alone), length
    assert SHORT in path_counts


def test_training(persistent):
    """The forward keeps its log-sum-exp for the backward of flashcore_hopper."""
    call = build(("right-padding",), 197, 197, batch_size=3, head_dim=64, dtype=torch.bfloat16, device="cuda")
    grads = []
    for kernel, run in ((SHORT, Call.run), (LONG, persistent)):
        tensors = [tensor.detach().nan_to_num().requires_grad_() for tensor in (call.query, call.key, call.value)]
        new = call._replace(query=tensors[0], key=tensors[1], value=tensors[2])
        path_counts.clear()
        out = run(new)
        assert set(path_counts) == {kernel}
        out.square().sum().backward()
        grads.append([tensor.grad for tensor in tensors])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs) and ours.any()


def test_repeats(poisoned_empty):
    """Many programs beside each other, with values scrubbed in some."""
    for features in ((), ("holes",), ("right-padding",)):
        call = build(features, 250, 250, batch_size=64, heads=(12, 12), head_dim=64, device="cuda")
        first = on_short(call)
        for _ in range(300):
            assert torch.equal(call.run(), first)


def test_negative_controls():
    call = build(("right-padding",), 129, 129, head_dim=64, dtype=torch.bfloat16, device="cuda")
    on_short(call)
    for changed in ({"scale": 1.5 / 8}, {"key_range": None}):
        with pytest.raises(AssertionError):
            assert_right(call.run(**changed), call)
