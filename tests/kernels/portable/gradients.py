"""The error rule for gradients, and the calls that tests of the backward make. Works on any device.

The rule: against float64 autograd of `naive_attention`, a gradient's largest error is at most 3x and its RMS error at
most 2x that of a peer, plus a floor of two roundings. The peer is autograd through PyTorch's fused SDPA in the same
dtype; where SDPA lacks a feature it is autograd through `naive_attention` with fp32 scores and probabilities in dtype.
"""

from typing import NamedTuple

import torch
from flashcore_kernels import naive_attention
from flashcore_kernels.portable.backward import run_backward
from flashcore_kernels.portable.backward_table import backward_config
from flashcore_kernels.portable.naive_backward import naive_backward
from flashcore_kernels.problem import Inputs, Problem, check_problem, split_arguments

from ..reference import Call, peer

MAX_RATIO, RMS_RATIO = 3.0, 2.0
NAMES = ("dq", "dk", "dv", "dsinks", "dmask")


class Training(NamedTuple):
    """A call, what its forward answered, and the gradients that come back to it."""

    call: Call
    problem: Problem
    output: torch.Tensor
    lse: torch.Tensor
    grad_output: torch.Tensor
    grad_lse: torch.Tensor | None

    def gradients(self, config=None, problem=None, **changed) -> dict[str, torch.Tensor]:
        """What the kernels answer, by name."""
        call, problem = self.call, problem or self.problem
        arguments = call.arguments
        tensors = {name: arguments.get(name) for name in ("key_range", "mask", "sinks")}
        inputs = Inputs(call.query, call.key, call.value, **tensors)
        inputs = inputs._replace(**{name: changed.pop(name) for name in Inputs._fields if name in changed})
        problem = problem._replace(dropout=changed.pop("dropout", 0.0))
        options = {
            "output": self.output, "lse": self.lse, "grad_output": self.grad_output, "grad_lse": self.grad_lse,
            "sinks_grad": problem.has_sinks, "mask_grad": problem.mask_kind == "float",
        }  # fmt: skip
        got = run_backward(problem, config or config_of(problem), inputs, **{**options, **changed})
        return {name: grad for name, grad in zip(NAMES, got) if grad is not None}


def config_of(problem: Problem):
    """The table's tiles, made small: lengths of tests then have blocks of every kind."""
    arch = torch.cuda.get_device_capability()[0] * 10 if torch.cuda.is_available() else 0
    config = backward_config(problem, arch)
    if arch:
        return config
    return tiled(config, 16, 32)


def tiled(config, block_m: int, block_n: int):
    """`config` with other tiles."""
    rows = {name: getattr(config, name) for name in ("dq", "dkdv", "mask")}
    return config._replace(**{name: row._replace(tile=(block_m, block_n, *row.tile[2:])) for name, row in rows.items()})


def train(call: Call, grad_lse: bool = True, seed: int = 0) -> Training:
    """What the forward of `call` answers, and random gradients of its output and, with `grad_lse`, of its lse."""
    arguments = {name: a for name, a in call.arguments.items() if name != "return_lse"}
    with torch.no_grad():
        # The definition in fp32: a tenth of the time that the interpreter takes for the forward.
        output, lse = naive_attention(call.query, call.key, call.value, **arguments)
    generator = torch.Generator().manual_seed(1000 + seed)
    grad_output = torch.randn(output.shape, generator=generator).to(output)
    weight = torch.randn(lse.shape, generator=generator).to(lse) if grad_lse else None
    return Training(call, problem_of(call), output, lse, grad_output, weight)


def problem_of(call: Call) -> Problem:
    arguments = {name: a for name, a in call.arguments.items() if name != "return_lse"}
    inputs, options = split_arguments(call.query, call.key, call.value, **arguments)
    return check_problem(inputs, **options)


def autograd(training: Training, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gradients by autograd: of the definition in float64, or of the peer where `dtype` is the call's."""
    call = training.call
    arguments = {name: a for name, a in call.arguments.items() if name != "return_lse"}
    exact = dtype == torch.float64
    leaves = {"dq": call.query, "dk": call.key, "dv": call.value}
    if "sinks" in arguments:
        leaves["dsinks"] = arguments["sinks"]
    if training.problem.mask_kind == "float":
        leaves["dmask"] = arguments["mask"]
    leaves = {name: (t.double() if exact else t.clone()).detach().requires_grad_() for name, t in leaves.items()}
    arguments |= {name: leaves["d" + name] for name in ("sinks", "mask") if "d" + name in leaves}
    tensors = leaves["dq"], leaves["dk"], leaves["dv"]
    if exact:
        output, lse = naive_attention(*tensors, **arguments)
    elif training.grad_lse is None:
        output, lse = peer(Call(*tensors, arguments)), None
        if "dmask" in leaves:
            own = _mask_gradient(training, output, leaves["dmask"])
            output = peer(Call(*tensors, arguments | {"mask": leaves["dmask"].detach()}))
            leaves["dmask"].grad = own
    else:
        output, lse = naive_attention(*tensors, probability_dtype=dtype, **arguments)
    loss = (output * training.grad_output.to(output)).sum()
    if training.grad_lse is not None:
        # Where a row sees nothing the lse is -inf, a constant.
        loss = loss + (lse * training.grad_lse.to(lse)).masked_fill(training.lse == -torch.inf, 0.0).sum()
    loss.backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def _mask_gradient(training: Training, output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The peer's gradient of a mask, from a pass of its own: SDPA is not fused where the mask wants one.

    In fp32 it is by the fused formula, p * (dP - dO * O). Unfused, the sum of p * dP is subtracted, whose rounding is
    dP's own where p is nearly 1: the difference of the two then has half the error, which no fused kernel has.
    """
    if training.call.query.dtype != torch.float32:
        return torch.autograd.grad((output * training.grad_output).sum(), mask)[0]
    call = training.call
    others = {name: call.arguments.get(name) for name in ("key_range", "sinks")}
    inputs = Inputs(*call[:3], mask=mask.detach(), **others)
    return naive_backward(
        training.problem, inputs, training.output, training.lse, training.grad_output, mask_grad=True
    )[4]


def assert_gradients(got: dict[str, torch.Tensor], training: Training) -> None:
    """Hold gradients against the error rule.

    Raises:
        AssertionError: says which bound of which gradient was broken, and by how much.
    """
    want, yardstick = autograd(training, torch.float64), autograd(training, training.call.query.dtype)
    for name, grad in got.items():
        leaf = dict(zip(NAMES, (*training.call[:3], *map(training.call.arguments.get, ("sinks", "mask")))))[name]
        assert grad.shape == leaf.shape and grad.dtype == leaf.dtype, name
    sizes = {}
    if "dsinks" in want:
        sizes["dsinks"] = torch.maximum(want["dsinks"].abs(), sum_of_terms(training))
    assert_errors(got, want, yardstick, training.call.query.dtype, sizes)


def sum_of_terms(training: Training) -> torch.Tensor:
    """`[H]`: the root of the squares that a sink's gradient sums up, share * dO * O of every query and column.

    One number of each head is a sum over all queries that may cancel. The rounding of each output to 16 bits alone
    changes it by so much, times a rounding, which the peer may have the luck not to show.
    """
    sinks, output = training.call.arguments["sinks"], training.output
    share = torch.exp(sinks.double()[None, :, None] - training.lse.double())  # [B, H, Q]
    terms = share[..., None] * training.grad_output.double().nan_to_num() * output.double()
    return terms.square().sum((0, 2, 3)).sqrt()


def assert_errors(got: dict, want: dict, yardstick: dict, dtype: torch.dtype, sizes: dict | None = None) -> None:
    """The rule itself, for gradients of inputs in `dtype`; `sizes`: what rounds, where it is more than the gradient."""
    assert got.keys() == want.keys()
    for name, grad in got.items():
        assert torch.isfinite(grad).all(), f"{name}: {(~torch.isfinite(grad)).sum().item()} are not finite"
        # Autograd's own gradients of what nobody sees are 0 * NaN in places; there the answer is 0.
        reference, own = want[name].nan_to_num(0.0), yardstick[name].double().nan_to_num(0.0)
        error, peers = (grad.double() - reference).abs(), (own - reference).abs()
        rounding = torch.finfo(dtype).eps / 2
        for what, of, ratio in (("largest", _largest, MAX_RATIO), ("RMS", _rms, RMS_RATIO)):
            bound = ratio * of(peers) + 2 * rounding * of((sizes or {}).get(name, reference))
            assert of(error) <= bound, f"{name}: {what} error {of(error):.3g}, at most {bound:.3g} ({of(peers):.3g})"


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


def _rms(x: torch.Tensor) -> float:
    return x.pow(2).mean().sqrt().item()
