"""Dropout in the Hopper kernels: the weights that the portable kernels drop, gradients against float64, its bits.

What is dropped is read off each kernel's answer, one weight a number: tensors of zeros and ones leave nothing else.
"""

import pytest
import torch
from flashcore_kernels import attention, make_key_range, path_counts, training
from flashcore_kernels.choose import choose, choose_backward
from flashcore_kernels.device import device_of
from flashcore_kernels.dispatch import empty_outputs, serve, serve_backward
from flashcore_kernels.hopper.prefill import choose as prefill_choose
from flashcore_kernels.portable.backward_table import choose_portable_backward
from flashcore_kernels.portable.choose import choose_forward
from flashcore_kernels.problem import Inputs, check_problem, with_alignment

from ..kernels.portable.test_dropout import explicit_mask, words
from . import test_hopper_backward as backward
from .test_hopper_backward import Case

if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("the Gluon kernels are for compute capability 9.0", allow_module_level=True)

RATE = 0.3
SEED = (1234567890123, 4)
HOPPER = {"flashcore_hopper", "flashcore_hopper_short"}
poisoned = backward.poisoned


def forward_plan(problem, kernel=None):
    """The Plan of `choose`, or the one that would serve the call without the other kernels."""
    device = device_of(torch.device("cuda"))
    if kernel == "flashcore_forward":
        return choose_forward(problem, device)
    with pytest.MonkeyPatch.context() as patched:
        if kernel == "flashcore_hopper":
            patched.setattr(prefill_choose, "short_row_for", lambda *sizes, **features: None)
        plan = choose(problem, device)
    assert plan.kernel == kernel or kernel is None and plan.kernel in HOPPER, plan
    return plan


def forward(problem, inputs, kernel=None):
    """(output, lse) by `kernel`."""
    problem = with_alignment(problem, inputs)
    output, lse = empty_outputs(inputs.query, inputs.value, True)
    serve(forward_plan(problem, kernel), problem, inputs, output.fill_(torch.nan), lse)
    return output, lse


class Asked:
    """A call of which only what it sees and drops matters: `[B, H, Q]` queries on `[B, Hkv, K]` keys of head_dim.

    Args:
        key_range: of B, Q and K.
        arguments: of `check_problem`.
    """

    def __init__(self, heads, num_queries, num_keys, head_dim, key_range=None, dropout=RATE, **arguments):
        self.heads, self.num_queries, self.num_keys, self.head_dim = heads, num_queries, num_keys, head_dim
        self.key_range = key_range(2, num_queries, num_keys) if key_range else None
        self.philox = words(*SEED, "cuda")
        self.problem = with_alignment(check_problem(self.inputs(), dropout=dropout, **arguments), self.inputs())
        seen = backward.visible_mask(self.problem, torch.device("cuda"), self.key_range, None)
        self.seen = seen.expand(2, heads[0], num_queries, num_keys)
        self.keep = explicit_mask(self.problem, self.key_range, self.philox, dropout) & self.seen

    def zeros(self, heads, length):
        return torch.zeros(2, heads, length, self.head_dim, dtype=torch.bfloat16, device="cuda")

    def inputs(self, **given):
        query, key = self.zeros(self.heads[0], self.num_queries), self.zeros(self.heads[1], self.num_keys)
        inputs = Inputs(query, key, torch.zeros_like(key), self.key_range, philox=self.philox)
        return inputs._replace(**given)

    def ones_from(self, heads, length, first):
        """`[2, heads, length, head_dim]`: row `first` + i is 1 in column i, and 0 elsewhere."""
        ones = self.zeros(heads, length)
        columns = torch.arange(min(self.head_dim, length - first), device="cuda")
        ones[:, :, first + columns, columns] = 1.0
        return ones

    def forward_keeps(self, kernel):
        """bool `[B, H, Q, K]` by columns of V: all scores are 0."""
        columns = []
        for first in range(0, self.num_keys, self.head_dim):
            inputs = self.inputs(value=self.ones_from(self.heads[1], self.num_keys, first))
            columns.append(forward(self.problem, inputs, kernel)[0])
        return torch.cat(columns, -1)[..., : self.num_keys] > 0

    def backward_keeps(self, plan):
        """The same as dQ, dK and dV have it: three of bool `[B, H, Q, K]`.

        Delta is 0 because the output is said to be. dP is 1 because V and dO are, in their first column.
        """
        problem, group = self.problem, self.problem.group
        count = self.seen.sum(-1)
        lse = count.float().log()
        output = torch.zeros_like(self.inputs().query)
        one_query, one_key = self.zeros(self.heads[0], self.num_queries), self.zeros(self.heads[1], self.num_keys)
        one_query[..., 0] = one_key[..., 0] = 1.0

        def run(inputs, grad_output):
            return serve_backward(
                plan, problem, inputs, output, lse, grad_output, None, sinks_grad=False, mask_grad=False
            )

        by_query = []
        for first in range(0, self.num_keys, self.head_dim):
            key = self.ones_from(self.heads[1], self.num_keys, first)
            by_query.append(run(self.inputs(key=key, value=one_key), one_query)[0])
        by_query = torch.cat(by_query, -1)[..., : self.num_keys] > 0
        # dK and dV are sums over the heads of a group: one of them at a time.
        by_key, by_value = (torch.zeros_like(by_query) for _ in range(2))
        for member in range(group):
            own = torch.zeros(self.heads[0], 1, 1, dtype=torch.bool, device="cuda")
            own[member::group] = True
            for first in range(0, self.num_queries, self.head_dim):
                columns = slice(first, min(first + self.head_dim, self.num_queries))
                ones = self.ones_from(self.heads[0], self.num_queries, first)
                width = columns.stop - first
                grad_key = run(self.inputs(query=ones, value=one_key), one_query.where(own, 0.0))[1]
                grad_value = run(self.inputs(), ones.where(own, 0.0))[2]
                for into, grad in ((by_key, grad_key), (by_value, grad_value)):
                    into[:, member::group, columns] = (grad[..., :width] > 0).mT
        return by_query, by_key, by_value


SEES = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window": (30, 20)},
    "left padding": {"key_range": backward.left_padding},
    "right padding": {"key_range": backward.right_padding},
    "holes": {"key_range": backward.holes},
    "documents": {"key_range": backward.documents},
}
SIZES = [((3, 3), 200, 200, 64), ((4, 2), 130, 333, 64), ((4, 1), 333, 200, 128), ((2, 2), 129, 129, 256)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("sees", SEES)
def test_forward_drops_what_the_portable_kernel_drops(sees, sizes):
    asked = Asked(*sizes, **SEES[sees])
    kernels = {"flashcore_forward", "flashcore_hopper", forward_plan(asked.problem).kernel}
    for kernel in kernels:
        assert torch.equal(asked.forward_keeps(kernel), asked.keep), kernel


def both_sides(batch_size, num_queries, num_keys):
    """The KeyRange of encoders, which the kernel for short sequences serves."""
    end = num_keys - torch.arange(batch_size, device="cuda") * 29 % (num_keys // 2)
    return make_key_range(batch_size, num_keys, end=end)


@pytest.mark.parametrize("length", [17, 64, 65, 128, 200, 512])
def test_short_forward_drops_what_the_portable_kernel_drops(length):
    for key_range in (None, both_sides):
        asked = Asked((4, 4), length, length, 64, key_range)
        for kernel in ("flashcore_hopper_short", "flashcore_hopper", "flashcore_forward"):
            assert torch.equal(asked.forward_keeps(kernel), asked.keep), kernel


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("sees", SEES)
def test_backward_drops_what_the_portable_kernel_drops(sees, sizes):
    asked = Asked(*sizes, **SEES[sees])
    device = device_of(torch.device("cuda"))
    plans = choose_backward(asked.problem, device), choose_portable_backward(asked.problem, device)
    assert [plan.kernel for plan in plans] == ["flashcore_hopper_backward", "flashcore_backward"]
    for plan in plans:
        for name, keeps in zip(("dq", "dk", "dv"), asked.backward_keeps(plan), strict=True):
            assert torch.equal(keeps, asked.keep), (plan.kernel, name)


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
def test_rate(dropout):
    asked = Asked((8, 8), 512, 512, 64, dropout=dropout)
    keeps = asked.forward_keeps("flashcore_hopper_short").double()
    spread = (dropout * (1 - dropout) / keeps.numel()) ** 0.5
    assert abs(keeps.mean().item() - (1 - dropout)) <= 4 * spread
    # And neighbours along keys and queries know nothing of each other.
    for axis in (-1, -2):
        both = (keeps * keeps.roll(1, axis)).mean().item()
        assert abs(both - (1 - dropout) ** 2) <= 8 * spread


class DroppedCase(Case):
    """A Case whose weights are dropped by an explicit mask; its peer computes that formula in the call's dtype.

    Args:
        dropout: as in `attention`; the rest are Case's.
    """

    def __init__(self, *sizes, dropout=RATE, **arguments):
        self.dropout, self.factor = dropout, None
        self.philox = words(*SEED, "cuda")
        super().__init__(*sizes, dropout=dropout, **arguments)

    @property
    def inputs(self):
        return super().inputs._replace(philox=self.philox)

    def reference(self):
        """Case's; and in float64 and of the peer the output, before what nobody sees becomes NaN."""
        with torch.no_grad():
            self.exact = self.attended(torch.float64, *self.leaves(torch.float64))[0]
            self.fused = self.attended(torch.float32, *self.leaves(self.query.dtype))[0]
        return super().reference()

    def weights(self, probabilities):
        if self.factor is None:
            keep = explicit_mask(self.problem, self.key_range, self.philox, self.dropout)
            self.factor = keep.float() / (1.0 - self.dropout)
        return probabilities * self.factor.to(probabilities.dtype)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("feature", backward.FEATURES)
def test_gradients(feature, head_dim):
    for lengths, heads in (((333, 333), (4, 2)), ((200, 333), (3, 3)), ((333, 200), (8, 1)), ((64, 64), (2, 2))):
        case = DroppedCase(2, heads, *lengths, head_dim, **backward.FEATURES[feature])
        assert not case.wrong(case.run()), (lengths, heads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [(40, 40), (96, 96), (64, 128), (192, 128)], ids=str)
def test_head_dims(dims, dtype):
    case = DroppedCase(2, (4, 2), 200, 333, *dims, dtype=dtype, is_causal=True)
    assert not case.wrong(case.run())


@pytest.mark.parametrize("dropout", [1e-3, 0.1, 0.9])
def test_rates_of_gradients(dropout):
    case = DroppedCase(2, (4, 2), 333, 333, 64, dropout=dropout, is_causal=True)
    assert not case.wrong(case.run())


def test_another_mask_would_show():
    """Negative control: gradients with another seed, another offset, at another head, and without dropout."""
    case = DroppedCase(2, (4, 2), 333, 333, 64, is_causal=True)
    assert not case.wrong(case.run())
    for other in ((SEED[0] + 1, SEED[1]), (SEED[0], SEED[1] + 1)):
        wrong = case.wrong(case.run(inputs=case.inputs._replace(philox=words(*other, "cuda"))))
        assert {"dq", "dk", "dv"} <= {word for line in wrong for word in line.split()}, other
    assert case.wrong(case.run(case.problem._replace(dropout=0.0), inputs=case.inputs._replace(philox=None)))


@pytest.fixture
def seeded(monkeypatch):
    """Training draws SEED."""
    monkeypatch.setattr(training, "draw_philox", lambda device: words(*SEED, device))


TRAINED = {
    "BERT": ("flashcore_hopper_short", dict(heads=(12, 12), length=512, key_range=both_sides)),
    "GPT-2": ("flashcore_hopper", dict(heads=(12, 12), length=1024, is_causal=True)),
    "left-padded": ("flashcore_hopper", dict(heads=(8, 2), length=1100, key_range=backward.left_padding)),
    "head_dim 128": ("flashcore_hopper", dict(heads=(4, 2), length=333, head_dim=128, is_causal=True)),
    "head_dim 256": ("flashcore_hopper", dict(heads=(4, 4), length=200, head_dim=256)),
}


@pytest.mark.parametrize("name", TRAINED)
def test_attention(name, seeded):
    """`attention` and its backward through autograd: by the Gluon kernels, right, and the same bits each time."""
    kernel, arguments = TRAINED[name]
    heads, length = arguments["heads"], arguments["length"]
    options = {name: arguments[name] for name in ("key_range", "is_causal") if name in arguments}
    case = DroppedCase(2, heads, length, length, arguments.get("head_dim", 64), transposed=True, **options)
    given = {"key_range": case.key_range, "is_causal": options.get("is_causal", False), "dropout": RATE}

    def run():
        leaves = [t.detach().clone().requires_grad_() for t in (case.query, case.key, case.value)]
        output = attention(*leaves, **given)
        return output, torch.autograd.grad(output, leaves, case.grad)

    path_counts.clear()
    output, gradients = run()
    assert dict(path_counts) == {kernel: 1, "flashcore_hopper_backward": 1}
    error, yardstick = ((t.double() - case.exact).abs().max() for t in (output, case.fused))
    assert error <= 3 * yardstick + torch.finfo(output.dtype).eps * case.exact.abs().max()
    assert not case.wrong(gradients)
    for _ in range(20):
        again, gradients_again = run()
        assert torch.equal(again, output) and all(map(torch.equal, gradients_again, gradients))


def test_short_sequences_have_the_same_bits():
    """As flashcore_hopper: a call's length may choose between them."""
    generator = torch.Generator("cuda").manual_seed(0)
    for length in (17, 64, 65, 197, 512, 1000):
        tensors = [torch.randn(3, 4, length, 64, device="cuda", generator=generator).bfloat16() for _ in range(3)]
        for key_range in (None, both_sides(3, length, length)):
            inputs = Inputs(*tensors, key_range, philox=words(*SEED, "cuda"))
            problem = check_problem(inputs, dropout=0.1)
            short, long = (forward(problem, inputs, name) for name in ("flashcore_hopper_short", "flashcore_hopper"))
            assert all(map(torch.equal, short, long)), length


def test_forward_by_one_kernel_and_backward_by_the_other():
    """What one keeps the other knows: gradients by the portable backward of what the Gluon forward answered."""
    case = DroppedCase(2, (4, 2), 333, 333, 64, is_causal=True)
    output, lse = forward(case.problem, case.inputs)
    plan = choose_portable_backward(case.problem, device_of(torch.device("cuda")))
    gradients = serve_backward(
        plan, case.problem, case.inputs, output, lse, case.grad, None, sinks_grad=False, mask_grad=False
    )
    assert not case.wrong(gradients[:3])
    output, lse = forward(case.problem, case.inputs, "flashcore_forward")
    assert not case.wrong(case.run(output=output, lse=lse))


class TestEdges:
    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_a_rate_too_small_to_drop_anything_gives_the_bits_of_none(self, head_dim):
        """lse is that of all weights whatever the rate."""
        case = Case(2, (4, 2), 333, 333, head_dim)
        inputs = case.inputs._replace(philox=words(*SEED, "cuda"))
        whole = forward(case.problem, case.inputs)
        assert all(map(torch.equal, forward(case.problem._replace(dropout=1e-12), inputs), whole))
        output, lse = forward(case.problem._replace(dropout=0.5), inputs)
        assert torch.equal(lse, whole[1]) and not torch.equal(output, whole[0])

    def test_zero_is_no_dropout(self):
        case = Case(2, (4, 2), 333, 333, 64)
        given = case.query, case.key, case.value
        path_counts.clear()
        assert torch.equal(attention(*given, dropout=0.0), attention(*given))
        assert set(path_counts) == {"flashcore_hopper_short"}

    def test_one_is_an_error_and_nearly_one_drops_everything(self):
        case = Case(2, (4, 2), 200, 200, 64)
        with pytest.raises(ValueError, match="dropout"):
            attention(case.query, case.key, case.value, dropout=1.0)
        inputs, problem = case.inputs._replace(philox=words(*SEED, "cuda")), case.problem._replace(dropout=1 - 1e-12)
        output, lse = forward(problem, inputs)
        assert not output.any() and torch.equal(lse, forward(case.problem, case.inputs)[1])
        gradients = case.run(problem, inputs=inputs, output=output, lse=lse)
        assert not any(gradient.any() for gradient in gradients)
