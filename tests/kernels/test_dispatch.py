"""From the name of a kernel to its launch module: every name that is chosen leads somewhere, and no other does."""

import importlib
import inspect
import itertools

import pytest
import torch
from flashcore_kernels import choose as choose_module
from flashcore_kernels import dispatch
from flashcore_kernels.choose import choose, choose_backward
from flashcore_kernels.device import Device
from flashcore_kernels.plan import Plan
from flashcore_kernels.problem import Inputs, check_problem

from .test_choose import problem

DEVICES = [Device("interpreter")] + [
    Device("cuda", arch, triton=triton) for arch in (80, 89, 90, 100, 120) for triton in ((3, 4), (3, 6), (3, 9))
]


def problems():
    """Calls of every kind that a family looks at."""
    for queries, dtype, fp8, aligned, layout, mask in itertools.product(
        (1, 64), (torch.bfloat16, torch.float32), (False, True), (False, True), (None, "sequence", "rows"),
        (None, "bool"),
    ):  # fmt: skip
        changed = {"fp8": fp8, "aligned": aligned, "range_layout": layout, "mask_kind": mask}
        yield problem(queries, dtype=dtype, **changed)


def test_every_kernel_that_is_chosen_has_a_launch_module():
    """And each that has one is chosen: a family that nobody reaches would be dead code."""
    chosen = {choose(asked, device).kernel for asked, device in itertools.product(problems(), DEVICES)}
    assert chosen - {"torch"} == set(dispatch.LAUNCHES)


def test_every_family_answers_with_names_of_the_list():
    """Asked one by one, so that none hides behind another."""
    families = [(each, dispatch.LAUNCHES) for each in choose_module.FAMILIES]
    families += [(each, dispatch.BACKWARDS) for each in choose_module.BACKWARD_FAMILIES]
    for family, known in families:
        answers = [family(asked, device) for asked, device in itertools.product(problems(), DEVICES)]
        names = {answer.kernel for answer in answers if isinstance(answer, Plan)}
        assert names and names <= set(known), family


def test_every_backward_that_is_chosen_is_listed_and_the_reverse():
    chosen = {choose_backward(asked, device).kernel for asked, device in itertools.product(problems(), DEVICES)}
    assert chosen - {"torch"} == set(dispatch.BACKWARDS)


def test_backwards_take_the_same_arguments():
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    ours, other = (importlib.import_module(module, "flashcore_kernels") for module in dispatch.BACKWARDS.values())
    assert list(inspect.signature(ours.run_backward).parameters) == list(
        inspect.signature(other.run_backward).parameters
    )


@pytest.mark.parametrize("kernel", dispatch.LAUNCHES)
def test_launch_modules_export_make_launch(kernel):
    pytest.importorskip("triton")
    if "hopper" in kernel:
        pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    module = importlib.import_module(dispatch.LAUNCHES[kernel], "flashcore_kernels")
    assert list(inspect.signature(module.make_launch).parameters) == [
        "problem", "config", "inputs", "output", "has_lse",
    ]  # fmt: skip


# What kernels call the operands of a Launch.
PARAMETERS = {
    "query": "Q", "key": "K", "value": "V", "output": "Out", "lse": "Lse", "key_range": "Range", "mask": "Mask",
    "sinks": "Sinks", "key_scale": "KeyScale", "value_scale": "ValueScale", "partials": "Partial", "counters": "Count",
    "philox": "Philox",
    "mask_lines": "Lines", "mask_bits": "Bits",
}  # fmt: skip


@pytest.mark.parametrize("kernel", dispatch.LAUNCHES)
def test_a_launch_has_the_kernels_parameters(kernel):
    """Positions, not names, go to Triton: one that is left out would shift all that follow."""
    pytest.importorskip("flashcore_kernels.hopper.prefill.launch" if "hopper" in kernel else "triton")
    from flashcore_kernels.runtime.launch import OPERANDS, Tile

    assert set(PARAMETERS) == set(OPERANDS) - {"absent"}
    keys = 64 if "short" in kernel else 2048
    queries = 1 if "decode" in kernel else keys
    inputs = Inputs(*[torch.zeros(1, 4, length, 64, dtype=torch.float16) for length in (queries, keys, keys)])
    asked = check_problem(inputs)._replace(aligned=True)
    chosen = choose(asked, Device("cuda", 90, triton=(3, 9) if "hopper" in kernel else (3, 4)))
    assert chosen.kernel == kernel
    output, _ = dispatch.empty_outputs(inputs.query, inputs.value, False)
    launch = dispatch.make_launch(chosen, asked, inputs, output, False)
    parameters = inspect.signature(launch.kernel.fn).parameters
    assert launch.kernel.fn.__name__ == kernel
    groups = (launch.operands, launch.integers, launch.scalars, launch.constants)
    assert sum(map(len, groups)) == len(parameters)
    constant = ["constexpr" in str(parameter.annotation) for parameter in parameters.values()]
    assert constant == [False] * (len(parameters) - len(launch.constants)) + [True] * len(launch.constants)
    for name, operand in zip(parameters, launch.operands):
        if isinstance(operand, Tile):
            assert name in (f"{operand.operand[0]}_desc", f"{operand.operand[0]}0_desc")
        elif operand != "absent":
            assert name.startswith(PARAMETERS[operand])
        else:
            lacking = ("q1_desc", "k1_desc", "v1_desc", "o1_desc", "Out", "mask_desc", "Bias", "Lines", "Bits")
            assert name in lacking, "of one tile, written by its descriptor, without a mask"


@pytest.mark.parametrize("kernel", ["flashcore_backward", "torch", ""])
def test_an_unknown_name_is_an_error(kernel):
    """It was taken for the portable forward."""
    asked = problem()
    config = choose(asked, DEVICES[1]).config
    inputs = Inputs(*torch.zeros(3, 2, 4, 64, 64))
    with pytest.raises(KeyError, match=f"'{kernel}'"):
        dispatch.make_launch(Plan(kernel, "", config), asked, inputs, inputs.query, False)
