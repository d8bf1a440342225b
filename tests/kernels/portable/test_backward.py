"""Gradients by the portable kernels: every feature alone and in pairs, over odd lengths; NaN wherever nobody looks."""

import pytest
import torch
import torch.nn.functional as F
from flashcore_kernels import attention, make_key_range, make_row_ranges
from flashcore_kernels.portable import backward_key, backward_query
from flashcore_kernels.portable.backward import BackwardCall

from ..reference import DTYPES, FEATURES, PAIRS, Call, build, poison_unseen, strided
from .gradients import assert_errors, assert_gradients, autograd, config_of, problem_of, tiled, train

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def checked(call: Call, **options):
    training = train(call, **options)
    assert_gradients(training.gradients(), training)


@pytest.mark.parametrize("lengths", [(1, 5), (33, 49)], ids=str)
@pytest.mark.parametrize("feature", ["plain", *FEATURES])
def test_alone(feature, lengths, device):
    checked(build({feature} - {"plain"}, *lengths, head_dim=16, device=device, seed=lengths[0]))


@pytest.mark.parametrize("feature", ["plain", *FEATURES])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_alone_in_other_dtypes(feature, dtype, device):
    call = build({feature} - {"plain"}, 17, 41, head_dim=24, heads=(2, 1), dtype=DTYPES[dtype], device=device)
    checked(call, grad_lse=feature == "lse")


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_pair(pair, device):
    place = PAIRS.index(pair)
    lengths = ((17, 35), (33, 33), (19, 67))[place % 3]
    # Alone and with the lse's gradient in turn: by either peer.
    checked(build(set(pair), *lengths, heads=(2, 1), head_dim=16, device=device, seed=place), grad_lse=place % 2 == 0)


def test_everything_together(device):
    everything = set(FEATURES) - {"rows", "bool-mask", "mqa"}
    checked(build(everything, 19, 67, head_dim=24, device=device))


@pytest.mark.parametrize("head_dims", [(1, 1), (8, 8), (40, 40), (96, 96), (192, 128), (256, 256), (16, 64)], ids=str)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_head_dim(head_dims, dtype, device):
    call = build(
        {"causal"}, 17, 33, head_dim=head_dims[0], batch_size=1, heads=(2, 1), dtype=DTYPES[dtype], device=device
    )
    value = torch.randn(1, 1, 33, head_dims[1], dtype=DTYPES[dtype], device=device)
    checked(call._replace(value=value))


@pytest.mark.parametrize("scale", [0.02, 1.0, -0.5, 0.0])
@pytest.mark.parametrize("features", [("causal",), ("softcap", "float-mask")], ids="+".join)
def test_scale(scale, features, device):
    call = build(features, 17, 33, heads=(2, 1), head_dim=16, device=device)
    call.arguments["scale"] = scale
    checked(call)


@pytest.mark.parametrize("window", [1, (0, 4), (3, 5), (-1, 2), (2, -1), (10**6, 10**6)], ids=str)
def test_window_sides(window, device):
    call = build((), 33, 65, heads=(2, 1), head_dim=16, device=device)
    call.arguments["window"] = window
    checked(poison_unseen(call))


@pytest.mark.parametrize("shape", [(1, 1, 33, 49), (2, 1, 1, 49), (1, 4, 1, 1), (2, 1, 33, 1), (1, 4, 33, 49)], ids=str)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_mask_that_was_broadcast(shape, dtype, device):
    """Its gradient is summed over the batch, heads, queries and keys that share an element."""
    call = build({"causal"}, 33, 49, head_dim=16, dtype=DTYPES[dtype], device=device)
    call.arguments["mask"] = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(call.query)
    checked(call)


@pytest.mark.parametrize("features", [("sinks",), ("sinks", "left-padding"), ("float-mask",)], ids="+".join)
def test_gradients_that_nobody_asks_for(features, device):
    training = train(build(features, 17, 33, heads=(2, 1), head_dim=16, device=device))
    assert list(training.gradients(sinks_grad=False, mask_grad=False)) == ["dq", "dk", "dv"]


@pytest.mark.parametrize("kind", ["mask", "holes"])
def test_nan_of_rows_that_see_their_sink_alone(kind, device):
    """Their queries, and what comes back to them, reach no gradient, the sinks' neither."""
    call = build(("sinks",), 17, 17, head_dim=16, dtype=torch.float32, device=device)
    call.arguments.pop("is_causal")
    if kind == "mask":
        blind, mask = [5], torch.ones(2, 1, 17, 17, dtype=torch.bool)
        mask[:, :, blind] = False
        call.arguments["mask"] = mask.to(device)
    else:
        blind, there = [6, 7, 8, 9], torch.ones(2, 17, dtype=torch.bool)
        there[:, 4:10] = False
        call.arguments["key_range"] = make_key_range(2, 17, left=2, right=0, key_mask=there).to(device)
    training = train(call, grad_lse=False)
    want = training.gradients()
    query, grad_output = call.query.clone(), training.grad_output.clone()
    query[:, :, blind] = grad_output[:, :, blind] = torch.nan
    poisoned = training._replace(call=call._replace(query=query), grad_output=grad_output)
    assert all(torch.equal(grad, want[name]) for name, grad in poisoned.gradients().items())


class TestRowsThatSeeNothing:
    """Their own gradients are zeros, and NaN in them reaches no other."""

    def training(self, kind, device):
        call = build((), 40, 40, heads=(2, 1), head_dim=16, device=device)
        if kind == "range":
            key_range = make_key_range(2, 40, first=torch.tensor([0, 21]), right=0, left=30)
            call.arguments["key_range"] = key_range.to(device)
        elif kind == "rows":
            first = torch.arange(40).expand(2, 40) // 20 * 20
            end = first + 20
            end = end.masked_fill(torch.arange(40) % 7 == 3, 0)
            call.arguments["key_range"] = make_row_ranges(first, end, 40).to(device)
        else:
            mask = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(0)) < 0.5
            mask[:, :, 5:9] = False
            call.arguments["mask"] = mask.to(device)
        return train(poison_unseen(call))

    @pytest.mark.parametrize("kind", ["range", "rows", "mask"])
    def test_zeros(self, kind, device):
        training = self.training(kind, device)
        empty = training.lse == -torch.inf
        assert empty.any() and not empty.all()
        clean = training.gradients()
        query = training.call.query.masked_fill(empty[..., None], float("nan"))
        grad_output = training.grad_output.masked_fill(empty[..., None], float("nan"))
        got = training.gradients(query=query, grad_output=grad_output)
        for name in ("dq", "dk", "dv"):
            assert torch.equal(got[name], clean[name]), name
        assert (got["dq"][empty] == 0.0).all()
        assert_gradients(clean, training)


class TestControls:
    """Gradients of something else do not pass for the right ones."""

    def broken(self, features, match, device, **changed):
        training = train(build(features, 33, 49, head_dim=16, device=device))
        got = training.gradients(**{k: v(training) if callable(v) else v for k, v in changed.items()})
        with pytest.raises(AssertionError, match=match):
            assert_gradients(got, training)

    def test_scale(self, device):
        self.broken({"causal"}, "dq", device, problem=lambda t: t.problem._replace(scale=0.26))

    def test_window_off_by_one(self, device):
        self.broken({"causal", "window"}, "dq", device, problem=lambda t: t.problem._replace(left=t.problem.left + 1))

    def test_causal_off_by_one(self, device):
        self.broken({"causal"}, "dq", device, problem=lambda t: t.problem._replace(query_start=17))

    def test_padding_ignored(self, device):
        self.broken({"left-padding"}, "dq", device, key_range=lambda t: make_key_range(2, 49).to(device))

    def test_softcap_ignored(self, device):
        self.broken({"softcap"}, "dq", device, problem=lambda t: t.problem._replace(softcap=0.0))

    def test_lse_gradient_ignored(self, device):
        self.broken({"causal"}, "dq", device, grad_lse=None)

    def test_a_block_left_out(self, device):
        """The last keys are hidden: their own gradients and all others' parts from them are missing."""
        self.broken((), "dq", device, key_range=lambda t: make_key_range(2, 49, end=32).to(device),
                    problem=lambda t: t.problem._replace(range_layout="sequence"))  # fmt: skip

    def test_group_sum_left_out(self, device):
        """Gradients of one head of each group for those of all."""
        training = train(build({"causal"}, 33, 49, head_dim=16, device=device))
        one = train(training.call._replace(query=training.call.query[:, ::2]))
        one = one._replace(grad_output=training.grad_output[:, ::2], grad_lse=training.grad_lse[:, ::2])
        got = training.gradients() | {name: one.gradients()[name] for name in ("dk", "dv")}
        with pytest.raises(AssertionError, match="dk"):
            assert_gradients(got, training)


def test_gradients_of_an_expanded_gradient(device):
    """`out.sum().backward()` hands one element down, with strides of 0."""
    training = train(build({"causal"}, 17, 33, heads=(2, 1), head_dim=16, device=device))
    ones = torch.ones((), dtype=torch.float16, device=device).expand(training.output.shape)
    training = training._replace(grad_output=ones)
    assert_gradients(training.gradients(), training)


def test_gradients_lie_as_the_projection_wants_them(device):
    training = train(build({"causal", "strides"}, 17, 33, heads=(2, 1), head_dim=16, device=device))
    got = training.gradients()
    assert all(got[name].transpose(1, 2).is_contiguous() for name in ("dq", "dk", "dv"))


@pytest.mark.parametrize("how", ["bshd", "slice", "permuted"])
def test_strides(how, device):
    training = train(build({"causal"}, 17, 33, heads=(2, 1), head_dim=16, device=device))
    call = training.call
    other = {name: strided(getattr(call, name), how) for name in ("query", "key", "value")}
    other |= {name: strided(getattr(training, name), how) for name in ("output", "grad_output")}
    wanted, got = training.gradients(), training.gradients(**other)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


class TestRefusals:
    def test_dropout_without_a_seed(self, device):
        training = train(build({"causal"}, 5, 5, heads=(2, 1), head_dim=16, device=device))
        with pytest.raises(ValueError, match="dropout=0.1 with philox=None"):
            training.gradients(dropout=0.1)

    @pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5])
    def test_dropout_out_of_range(self, dropout, device):
        training = train(build({"causal"}, 5, 5, heads=(2, 1), head_dim=16, device=device))
        with pytest.raises(ValueError, match="at least 0 and below 1"):
            training.gradients(dropout=dropout, philox=torch.zeros(2, dtype=torch.int64, device=device))

    def test_a_bool_mask_has_no_gradient(self, device):
        training = train(build({"bool-mask"}, 5, 5, heads=(2, 1), head_dim=16, device=device))
        with pytest.raises(ValueError, match="only an additive mask"):
            training.gradients(mask_grad=True)

    def test_fp8(self, device):
        training = train(build({"causal"}, 5, 5, heads=(2, 1), head_dim=16, device=device))
        with pytest.raises(NotImplementedError, match="float8"):
            training.gradients(problem=training.problem._replace(fp8=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts calls in Triton's interpreter")
@pytest.mark.parametrize("features", ["window", "rows"])
def test_blocks_that_nobody_sees_cost_nothing(features, monkeypatch):
    """Of 96 x 96, in blocks of 16 x 32, kernels visit those alone that hold a pair of a query and a key it sees."""
    call = build((), 96, 96, batch_size=1, heads=(1, 1), head_dim=16)
    query = torch.arange(96)
    first, end = (query - 10).clamp(min=0), query + 1
    if features == "rows":
        call.arguments["key_range"] = make_row_ranges(first[None], end[None], 96)
    else:
        call.arguments["window"] = (10, 0)
    slot = torch.arange(96)
    seen = (slot >= first[:, None]) & (slot < end[:, None])
    pairs = seen.view(6, 16, 3, 32).any(dim=3).any(dim=1).sum().item()
    visited = {}

    def counted(name, step):
        def wrapper(*args, **kwargs):
            visited[name] = visited.get(name, 0) + 1
            return step(*args, **kwargs)

        return wrapper

    for module, name in ((backward_query, "add_key_block"), (backward_key, "add_query_block")):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    train(call).gradients()
    assert visited == {"add_key_block": pairs, "add_query_block": pairs} and pairs < 18


def test_configurations_agree(device):
    """Other tiles: the same gradients but for rounding."""
    training = train(build({"causal", "left-padding", "gqa-7to1"}, 33, 49, head_dim=16, device=device))
    config = config_of(training.problem)
    for block_m, block_n in ((16, 16), (32, 64)):
        assert_gradients(training.gradients(config=tiled(config, block_m, block_n)), training)


@pytest.mark.parametrize("features", [("causal", "window"), ("rows",), ("left-padding", "causal")], ids="+".join)
def test_jumping_over_checks_changes_no_bit(features, device):
    training = train(build(features, 33, 67, heads=(2, 1), head_dim=16, device=device))
    config = config_of(training.problem)
    answers = []
    for branch in (False, True):
        rows = {name: getattr(config, name)._replace(branch=branch) for name in ("dq", "dkdv")}
        answers.append(training.gradients(config=config._replace(**rows)))
    assert all(torch.equal(answers[0][name], answers[1][name]) for name in answers[0])
    assert_gradients(answers[1], training)


def test_reference_is_autograd_of_the_definition(device):
    """The error rule's own numbers, once by hand: full attention of one head."""
    call = build((), 3, 4, heads=(1, 1), head_dim=16, batch_size=1, dtype=torch.float32, device=device)
    training = train(call, grad_lse=False)
    q, k, v, grad = (t.double()[0, 0] for t in (call.query, call.key, call.value, training.grad_output))
    p = (q @ k.T * 0.25).softmax(-1)
    dp = grad @ v.T
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * 0.25
    want = autograd(training, torch.float64)
    for name, by_hand in (("dq", ds @ k), ("dk", ds.T @ q), ("dv", p.T @ grad)):
        torch.testing.assert_close(want[name][0, 0], by_hand)
    assert problem_of(call).scale == 0.25


class TestCoarseLse:
    """A bias of finfo.min on all keys that a row sees makes its weights uniform, and leaves its lse no digits:
    exp(score - lse) would be 1 or 0 for each. (So it is in the definition; the reference here is SDPA's softmax.)
    """

    def check(self, dtype, device):
        call = build({"causal"}, 33, 49, heads=(2, 1), head_dim=16, dtype=dtype, device=device)
        mask = torch.zeros(2, 1, 33, 49, dtype=dtype, device=device)
        mask[1, :, 3:20] = torch.finfo(dtype).min
        mask[0, :, 30] = 3000.0
        call.arguments["mask"] = mask
        training = train(call, grad_lse=False)
        output, lse = attention(*call[:3], **call.arguments, return_lse=True)
        training = training._replace(output=output, lse=lse)
        hidden = torch.ones(33, 49, dtype=torch.bool, device=device).tril(16).logical_not()
        answers = []
        for kind in (torch.float64, dtype):
            leaves = [t.detach().to(kind).requires_grad_() for t in (*call[:3], mask)]
            attend = leaves[3].masked_fill(hidden, -torch.inf)
            out = F.scaled_dot_product_attention(*leaves[:3], attn_mask=attend, enable_gqa=True)
            (out * training.grad_output.to(kind)).sum().backward()
            answers.append({name: t.grad for name, t in zip(("dq", "dk", "dv", "dmask"), leaves)})
        assert_errors(training.gradients(), *answers, dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradients(self, dtype, device):
        self.check(DTYPES[dtype], device)

    def test_weights_from_the_lse_alone_would_show(self, device, monkeypatch):
        """Negative control."""
        monkeypatch.setattr(BackwardCall, "launch_shift", lambda self, q, k, sinks, lse: (lse, torch.ones_like(lse)))
        with pytest.raises(AssertionError, match="dq|dk|dv"):
            self.check(torch.float32, device)
