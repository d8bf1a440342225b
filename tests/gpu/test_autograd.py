"""Training through `attention` on a GPU, whichever kernels are chosen: errors, NaN in padding, dropout, bits."""

import contextlib
import random

import pytest
import torch
from flashcore_kernels import attention, make_key_range, path_counts
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.portable.gradients import assert_gradients, train
from ..kernels.reference import DTYPES, build, together

# What the Hopper backward serves, beside any length and number of heads.
FEATURES = ("causal", "window", "softcap", "sinks", "left-padding", "unfilled", "holes", "mqa", "strides", "rows")
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def gradients(training, **more) -> dict[str, torch.Tensor]:
    """By autograd, through the output and, where the call has a gradient of it, the lse."""
    call = training.call
    arguments = {name: a for name, a in call.arguments.items() if name != "return_lse"}
    leaves = {"dq": call.query, "dk": call.key, "dv": call.value, "dsinks": arguments.get("sinks")}
    if training.problem.mask_kind == "float":
        leaves["dmask"] = arguments["mask"]
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items() if t is not None}
    arguments |= {name[1:]: leaves[name] for name in ("dsinks", "dmask") if name in leaves}
    output, lse = attention(*list(leaves.values())[:3], **arguments, return_lse=True, **more)
    outputs, grads = [output], [training.grad_output]
    if training.grad_lse is not None:
        outputs.append(lse)
        grads.append(training.grad_lse.masked_fill(training.lse == -torch.inf, 0.0))
    torch.autograd.backward(outputs, grads)
    return {name: leaf.grad for name, leaf in leaves.items()}


def seeded(seed: int):
    """Up to three features that go together, 16 bits, and lengths up to 900."""
    draw = random.Random(seed)
    features = set()
    for feature in draw.sample(FEATURES, draw.randrange(4)):
        if all(together(feature, other) for other in features):
            features.add(feature)
    num_queries = draw.randrange(17, 900)
    num_keys = num_queries + draw.choice((0, 0, draw.randrange(300)))
    call = build(
        features, num_queries, num_keys, heads=draw.choice(((4, 4), (6, 2), (8, 1))),
        head_dim=draw.choice((64, 128, 96, 40)), dtype=DTYPES[draw.choice(("bf16", "fp16"))], device="cuda", seed=seed,
    )  # fmt: skip
    return train(call, grad_lse=draw.random() < 0.3, seed=seed)


@pytest.mark.parametrize("block", range(40))
def test_seeded(block, poisoned_empty):
    path_counts.clear()
    for seed in range(50 * block, 50 * block + 50):
        training = seeded(seed)
        try:
            assert_gradients(gradients(training), training)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
    assert not path_counts["torch"]
    if HOPPER:
        assert path_counts["flashcore_hopper_backward"] > 40


@pytest.mark.parametrize(
    "features", [("float-mask",), ("bool-mask", "gqa-7to1"), ("value-dim", "causal")], ids="+".join
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_what_the_portable_backward_serves(features, dtype, poisoned_empty):
    training = train(build(features, 333, 400, head_dim=64, dtype=DTYPES[dtype], device="cuda"))
    path_counts.clear()
    assert_gradients(gradients(training), training)
    assert path_counts["flashcore_backward"] == 1


@pytest.mark.parametrize("kind", ["float", "float of one row", "bool", "scattered", "expanded"])
@pytest.mark.parametrize("mask_grad", [False, True])
def test_masked_calls_are_made_again(kind, mask_grad, poisoned_empty, monkeypatch):
    """The launches of a call before, on this one's tensors: the operators' own bits, which a listener gets."""
    if kind == "bool" and mask_grad:
        pytest.skip("a bool mask has no gradient")

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    def run(seed: int, listened: bool):
        generator = torch.Generator("cuda").manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, device="cuda", generator=generator).bfloat16()

        leaves = [draw(2, heads, length, 64).requires_grad_() for heads, length in ((4, 130), (2, 200), (2, 200))]
        mask = {
            "float": lambda: draw(1, 4, 130, 200), "float of one row": lambda: draw(2, 1, 1, 200),
            "bool": lambda: draw(2, 1, 130, 200) > -1, "scattered": lambda: draw(130, 200, 4).permute(2, 0, 1)[None],
            "expanded": lambda: draw(130, 200, 2).permute(2, 0, 1)[None, :1].expand(2, 4, 130, 200),
        }[kind]()  # fmt: skip
        if mask_grad:
            leaves.append(mask.requires_grad_())
        with Listener() if listened else contextlib.nullcontext():
            output = attention(*leaves[:3], mask=mask)
            return output, *torch.autograd.grad(output, leaves, draw(2, 4, 130, 64))

    path_counts.clear()
    backwards = {}
    monkeypatch.setattr("flashcore_kernels.training._backwards", backwards)
    for seed in (0, 1, 2):
        got, want = run(seed, False), run(seed, True)
        assert all(map(torch.equal, got, want)), seed
    assert not torch.equal(run(0, False)[1], run(1, False)[1])
    assert not path_counts["torch"]
    assert len(backwards) == 1, "nothing was kept, and the host pays for each call"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("before", [1, 77, 128, 200])
def test_nan_in_left_padding(head_dim, before):
    """Queries of padding, and what comes back to them, may be NaN: nobody else's gradient sees it."""
    first = torch.tensor([0, before], dtype=torch.int32)
    key_range = make_key_range(2, 400, first=first, right=0).cuda()
    padded = (torch.arange(400) < first[:, None])[:, None, :, None].cuda()

    def run(hole: float):
        states = [
            torch.randn(2, heads, 400, head_dim, generator=torch.Generator().manual_seed(heads)).cuda()
            for heads in (4, 2, 2, 4)
        ]
        states = [t.bfloat16().masked_fill(padded, hole) for t in states]
        leaves = [t.requires_grad_() for t in states[:3]]
        output = attention(*leaves, key_range=key_range)
        return torch.autograd.grad(output, leaves, states[3])

    for got, want in zip(run(torch.nan), run(0.0)):
        assert torch.equal(got, want)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_dropout_under_checkpointing(head_dim):
    """The same weights are dropped again; another seed drops others; the mean over many is the answer without."""
    from torch.utils.checkpoint import checkpoint

    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(4, 8, 300, head_dim, generator=generator).bfloat16().cuda() for _ in range(4)]

    def run(seed, way):
        torch.manual_seed(seed)
        leaves = [t.clone().requires_grad_() for t in states[:3]]
        layer = lambda *x: attention(*x, dropout=0.2)  # noqa: E731
        output = layer(*leaves) if way is None else checkpoint(layer, *leaves, use_reentrant=way)
        return output, torch.autograd.grad(output, leaves, states[3]) if way is not True else None

    output, grads = run(1, None)
    again, grads_again = run(1, False)
    assert torch.equal(output, again) and all(map(torch.equal, grads, grads_again))
    assert not torch.equal(output, run(2, None)[0])
    mean = torch.stack([run(seed, None)[0].float() for seed in range(200)]).mean(0)
    plain = attention(*states[:3]).float()
    assert (mean - plain).abs().mean() < 0.15 * (output.float() - plain).abs().mean()


def test_sinks_alone_want_a_gradient_behind_remembered_calls():
    call = build({"sinks", "causal"}, 64, 64, head_dim=64, device="cuda")
    for _ in range(3):
        attention(*call[:3], **call.arguments)
    sinks = call.arguments["sinks"].clone().requires_grad_()
    attention(*call[:3], is_causal=True, sinks=sinks).float().sum().backward()
    assert sinks.grad.abs().max() > 0


def test_bits_of_a_thousand_repeats():
    training = train(
        build({"causal", "holes"}, 700, 700, heads=(8, 2), head_dim=128, dtype=torch.bfloat16, device="cuda")
    )
    first = gradients(training)
    for _ in range(1000):
        again = gradients(training)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_compiles_fullgraph():
    """A compiled training step without a break computes the eager gradients' bits."""
    states = [torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def loss(query, key, value):
        return attention(query * 1.0, key, value, is_causal=True).float().square().sum()

    def run(function):
        leaves = [t.clone().requires_grad_() for t in states]
        function(*leaves).backward()
        return [t.grad for t in leaves]

    torch._dynamo.reset()
    for one, other in zip(run(loss), run(torch.compile(loss, fullgraph=True))):
        torch.testing.assert_close(one, other)
