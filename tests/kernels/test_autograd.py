"""flash_attn_fwd and flash_attn_bwd as torch and its users see them: opcheck, gradcheck, compile, checkpointing."""

import pytest
import torch
from flashcore_kernels import FlashcoreFallbackWarning, autograd, path_counts  # noqa: F401 - defines the operators
from flashcore_kernels.fallback import forget_warnings
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from .portable.gradients import assert_gradients, problem_of, train
from .reference import build

forward = torch.ops.flashcore.flash_attn_fwd
backward = torch.ops.flashcore.flash_attn_bwd


def arguments_of(call, query, key, value, mask=None, sinks=None) -> tuple:
    problem = problem_of(call)
    return (
        query, key, value, call.arguments.get("key_range"), mask, sinks, problem.left, problem.right, problem.scale,
        problem.softcap,
    )  # fmt: skip


def leaves_of(call) -> list[torch.Tensor | None]:
    """query, key, value, mask, sinks; those that have a gradient ask for it."""
    tensors = (*call[:3], call.arguments.get("mask"), call.arguments.get("sinks"))
    tensors = [t if t is None else t.detach().clone() for t in tensors]
    return [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]


CALLS = [("causal",), ("sinks", "left-padding"), ("float-mask", "softcap"), ("bool-mask", "value-dim"), ("rows",)]


@pytest.mark.parametrize("features", CALLS, ids="+".join)
def test_gradients(features, device):
    """Through autograd, output and lse together: all that have a gradient, by the error rule."""
    training = train(build(features, 17, 33, heads=(2, 1), head_dim=16, device=device))
    leaves = leaves_of(training.call)
    output, lse = forward(*arguments_of(training.call, *leaves))
    weight = training.grad_lse.masked_fill(training.lse == -torch.inf, 0.0)
    torch.autograd.backward([output, lse], [training.grad_output, weight])
    names = ("dq", "dk", "dv", "dmask", "dsinks")
    got = {name: t.grad for name, t in zip(names, leaves) if t is not None and t.requires_grad}
    assert_gradients(got, training)


@pytest.mark.parametrize("features", [("causal",), ("sinks", "float-mask", "strides")], ids="+".join)
def test_opcheck(features, device):
    call = build({*features}, 5, 9, heads=(2, 1), head_dim=16, dtype=torch.float32, device=device)
    leaves = leaves_of(call)
    torch.library.opcheck(forward, arguments_of(call, *leaves))
    training = train(call)
    tensors = arguments_of(call, *(t if t is None else t.detach() for t in leaves))
    arguments = (
        training.grad_output, training.grad_lse, *tensors[:6], training.output, training.lse, *tensors[6:], 0.0, None,
        "sinks" in call.arguments, "mask" in call.arguments,
    )  # fmt: skip
    torch.library.opcheck(backward, arguments)


@pytest.mark.filterwarnings("ignore::flashcore_kernels.FlashcoreFallbackWarning")
@pytest.mark.parametrize(
    "features", [("causal", "gqa-7to1"), ("sinks", "window"), ("float-mask", "softcap")], ids="+".join
)
def test_gradcheck(features, device):
    """In float64, which PyTorch serves: analytic gradients are numerical ones."""
    call = build(features, 3, 5, batch_size=1, heads=(2, 1), head_dim=4, dtype=torch.float64, device=device)
    for name in ("sinks", "mask"):
        if name in call.arguments:
            # Steps from -inf are NaN.
            call.arguments[name] = call.arguments[name].double().nan_to_num(neginf=-1.0)
    call = call._replace(key=call.key.nan_to_num(0.5), value=call.value.nan_to_num(0.5))
    leaves = leaves_of(call)
    tensors = [t for t in leaves if t is not None]

    def function(*given):
        given = iter(given)
        return forward(*arguments_of(call, *(t if t is None else next(given) for t in leaves)))

    assert torch.autograd.gradcheck(function, tensors)


def test_the_fallback_says_so(device):
    forget_warnings()
    query = torch.randn(1, 1, 2, 4, dtype=torch.float64, requires_grad=True, device=device)
    with pytest.warns(FlashcoreFallbackWarning, match="float64"):
        forward(query, query, query, None, None, None, -1, 0, 0.5, 0.0)[0].sum().backward()
    assert query.grad.isfinite().all()


def test_only_what_is_asked_for(device):
    """sinks alone require a gradient: they get one, and nothing else does."""
    call = build({"sinks", "causal"}, 5, 9, heads=(2, 1), head_dim=16, device=device)
    sinks = call.arguments["sinks"].clone().requires_grad_()
    forward(*arguments_of(call, *call[:3], None, sinks))[0].sum().backward()
    assert sinks.grad.abs().max() > 0 and call.query.grad is None


def test_double_backward_is_refused(device):
    call = build({"causal"}, 5, 9, heads=(2, 1), head_dim=16, device=device)
    query = call.query.clone().requires_grad_()
    output, _ = forward(*arguments_of(call, query, *call[1:3]))
    (grad,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="attn_implementation='eager'"):
        grad.sum().backward()


def test_dropout_and_its_seed_belong_together(device):
    call = build({"causal"}, 5, 9, heads=(2, 1), head_dim=16, device=device)
    with pytest.raises(ValueError, match="a seed and offset belong to dropout"):
        forward(*arguments_of(call, *call[:3]), 0.1)


def test_compiles_without_a_break(device):
    call = build({"causal"}, 17, 33, heads=(2, 1), head_dim=16, device=device)

    def loss(query, key, value):
        output, lse = forward(*arguments_of(call, query * 1.0, key, value))
        return output.float().square().sum() + lse.sum()

    def gradients(function):
        leaves = leaves_of(call)[:3]
        function(*leaves).backward()
        return [t.grad for t in leaves]

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(loss), gradients(compiled)):
        assert torch.equal(one, other)


def test_selective_checkpointing_finds_it(device):
    """By name and by the schema's `window_size_left`: the forward then runs once, and twice where none is selected."""
    call = build({"causal"}, 5, 9, heads=(2, 1), head_dim=16, device=device)
    assert "window_size_left" in str(forward.default._schema)

    def layer(query):
        return forward(*arguments_of(call, query * 1.0, *call[1:3]))[0].sum()

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if "flash_attn" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    def gradient(function) -> tuple[torch.Tensor, int]:
        query = call.query.clone().requires_grad_()
        path_counts.clear()
        function(query).backward()
        assert path_counts.pop("flashcore_backward") == 1
        return query.grad, sum(path_counts.values())

    def selected():
        return create_selective_checkpoint_contexts(policy)

    wanted, runs = gradient(layer)
    whole, runs_whole = gradient(lambda query: checkpoint(layer, query, use_reentrant=False))
    kept, runs_kept = gradient(lambda query: checkpoint(layer, query, use_reentrant=False, context_fn=selected))
    assert torch.equal(whole, wanted) and torch.equal(kept, wanted)
    assert (runs, runs_whole, runs_kept) == (1, 2, 1)
