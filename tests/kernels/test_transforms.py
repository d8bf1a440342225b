"""Derivatives of every kind through the operator, and function transforms: naive's values, or an error, never zero."""

import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from flashcore_kernels import FlashcoreFallbackWarning, attention, make_key_range, naive_attention, op, path_counts
from flashcore_kernels.fallback import forget_warnings
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap

pytestmark = pytest.mark.filterwarnings(
    "ignore::flashcore_kernels.FlashcoreFallbackWarning", "ignore:There is a performance drop"
)

SINKS = torch.linspace(-1.0, 1.0, 4)
CALLS = {
    "causal": {"is_causal": True},
    "key_range": {"key_range": make_key_range(1, 6, query_start=2, first=1, right=0)},
    "sinks": {"is_causal": True, "sinks": SINKS},
    "softcap": {"softcap": 2.0},
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


QUERY, KEY, VALUE = normal(1, 4, 4, 16), normal(1, 2, 6, 16, seed=1), normal(1, 2, 6, 16, seed=2)
TANGENT, SEVERAL = normal(1, 4, 4, 16, seed=3), normal(3, 1, 4, 4, 16, seed=4)


def dual(function):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(QUERY, TANGENT))).tangent


def backward_inside_dual(function):
    """The gradient's own tangent: a Hessian times a vector."""
    leaf = QUERY.clone().requires_grad_()
    with forward_ad.dual_level():
        loss = function(forward_ad.make_dual(leaf, TANGENT)).square().sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        return forward_ad.unpack_dual(gradient).tangent


def loss(function):
    return lambda query: function(query).square().sum()


# From a function of query to what a user would ask of it.
TRANSFORMS = {
    "jvp": lambda f: jvp(f, (QUERY,), (TANGENT,))[1],
    "linearize": lambda f: linearize(f, QUERY)[1](TANGENT),
    "dual": dual,
    "backward inside dual": backward_inside_dual,
    "jacfwd": lambda f: jacfwd(f)(QUERY),
    "jacrev": lambda f: jacrev(f)(QUERY),
    "hessian": lambda f: hessian(loss(f))(QUERY),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(loss(f)))(QUERY),
    "vmap": lambda f: vmap(f)(SEVERAL),
    "vmap of grad": lambda f: vmap(grad(loss(f)))(SEVERAL),
    "grad of vmap": lambda f: grad(loss(vmap(f)))(SEVERAL),
    "vmap of jvp": lambda f: vmap(lambda q: jvp(f, (q,), (TANGENT,))[1])(SEVERAL),
    "jvp of vmap": lambda f: jvp(vmap(f), (SEVERAL,), (SEVERAL,))[1],
    "checkpoint": lambda f: grad_of_checkpoint(f),
}


def grad_of_checkpoint(function):
    from torch.utils.checkpoint import checkpoint

    leaf = QUERY.clone().requires_grad_()
    checkpoint(function, leaf, use_reentrant=False).square().sum().backward()
    return leaf.grad


@pytest.mark.parametrize("features", CALLS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_give_naives_values(transform, features):
    arguments = CALLS[features]
    got = TRANSFORMS[transform](lambda query: attention(query, KEY, VALUE, **arguments))
    want = TRANSFORMS[transform](lambda query: naive_attention(query, KEY, VALUE, **arguments)[0])
    assert want.abs().max() > 0.01
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("of", ["key", "value", "sinks"])
def test_a_tangent_of_another_argument_counts_too(of):
    tensors = {"query": QUERY, "key": KEY, "value": VALUE, "sinks": SINKS}

    def tangent(function):
        def changed(tensor):
            return function(**{**tensors, of: tensor})

        return jvp(changed, (tensors[of],), (torch.ones_like(tensors[of]),))[1]

    got, want = tangent(attention), tangent(lambda **arguments: naive_attention(**arguments)[0])
    # Equal ones added to all keys leave the softmax as it is.
    assert of == "key" or want.abs().max() > 0.01
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_what_a_kernel_alone_would_answer(monkeypatch):
    """Negative control: the kernels lose the tangent. So it once was for every caller."""
    monkeypatch.setattr(op, "any_tangent", lambda *tensors: False)
    assert not jvp(lambda query: attention(query, KEY, VALUE), (QUERY,), (TANGENT,))[1].any()


def test_forward_mode_is_said_and_counted(monkeypatch):
    forget_warnings()
    path_counts.clear()
    with pytest.warns(FlashcoreFallbackWarning, match="forward-mode derivatives are asked for"):
        jvp(lambda query: attention(query, KEY, VALUE), (QUERY,), (TANGENT,))
    assert dict(path_counts) == {"torch": 1}
    monkeypatch.setenv("FLASHCORE_STRICT", "1")
    with pytest.raises(NotImplementedError, match="forward-mode derivatives.*FLASHCORE_STRICT"):
        jvp(lambda query: attention(query, KEY, VALUE), (QUERY,), (TANGENT,))
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("error")
        attention(QUERY, KEY, VALUE)  # nothing here has a tangent


@pytest.mark.parametrize("transform", ["jvp", "grad"])
def test_transforms_inside_of_a_compiled_function(transform):
    def run(tensor):
        def function(query):
            return attention(query, KEY, VALUE, is_causal=True)

        if transform == "jvp":
            return jvp(function, (tensor,), (tensor,))[1]
        return grad(loss(function))(tensor)

    torch._dynamo.reset()
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(QUERY)
    torch.testing.assert_close(got, run(QUERY), atol=2e-5, rtol=2e-5)
    assert got.abs().max() > 0.01
