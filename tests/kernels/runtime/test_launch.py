"""From Python to a launch: when a compiled kernel is used again, and what Triton's launcher gets. No GPU is needed."""

import inspect

import pytest
import torch
from flashcore_kernels.runtime import launch


class FakeKernel:
    """Stands where a triton.jit function stands, and counts how often it is compiled."""

    def __init__(self):
        self.compiled = self.reused = 0

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, num_warps, num_stages):
            self.compiled += 1
            return self.Compiled(self)

        return compile_and_launch

    class Compiled:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch_again(*arguments):
                self.kernel.reused += 1

            return launch_again


class FakeTensor(torch.Tensor):
    """A CPU tensor that says it is on a GPU, at an address of our choice."""

    address = 0
    device = torch.device("cuda", 0)

    def data_ptr(self):
        return self.address


def fake(dtype=torch.float16, address=4096, index=0):
    tensor = torch.zeros(1, dtype=dtype).as_subclass(FakeTensor)
    tensor.address, tensor.device = address, torch.device("cuda", index)
    return tensor


class TestLaunchCache:
    """A compiled kernel is used again exactly where Triton itself would have compiled the same one."""

    BASE = ((fake(), 64, 3), (5, 0.5), (64, True))

    @pytest.fixture(autouse=True)
    def empty_cache(self, monkeypatch):
        monkeypatch.setattr(launch, "_compiled", {})

    def launched(self, first, second, **changed):
        """`changed` are options of the second launch."""
        kernel = FakeKernel()
        usual = {"num_warps": 4, "num_stages": 2}
        launch.launch(kernel, 7, *first, **usual)
        launch.launch(kernel, 7, *second, **{**usual, **changed})
        return kernel.compiled, kernel.reused

    def test_reused(self):
        assert self.launched(self.BASE, self.BASE) == (1, 1)

    @pytest.mark.parametrize(
        "arguments",
        [(fake(), 128, 3), (fake(), 64, 5), (fake(address=8192), 64, 3)],
        ids=["another multiple of 16", "another odd int", "another aligned address"],
    )
    def test_reused_for(self, arguments):
        assert self.launched(self.BASE, (arguments, *self.BASE[1:])) == (1, 1)

    def test_reused_for_other_scalars(self):
        """Lengths must not compile anew: one kernel serves every length."""
        assert self.launched(self.BASE, (self.BASE[0], (4096, 2.5), self.BASE[2])) == (1, 1)

    @pytest.mark.parametrize(
        "arguments",
        [
            (fake(torch.bfloat16), 64, 3),
            (fake(address=4098), 64, 3),
            (fake(index=1), 64, 3),
            (None, 64, 3),
            (fake(), 65, 3),
            (fake(), 64, 1),
            (fake(), 64, 16),
            (fake(), 2**40, 3),
        ],
        ids=["dtype", "alignment", "device", "None", "% 16", "== 1", "3 -> 16", "int64"],
    )
    def test_compiled_anew_for(self, arguments):
        first = self.BASE if arguments[0] is not None else ((fake(), fake(), 64), *self.BASE[1:])
        second = arguments if arguments[0] is not None else (fake(), None, 64)
        assert self.launched(first, (second, *self.BASE[1:])) == (2, 0)

    def test_compiled_anew_for_constants(self):
        assert self.launched(self.BASE, (*self.BASE[:2], (64, False))) == (2, 0)

    @pytest.mark.parametrize("field", ["num_warps", "num_stages"])
    def test_compiled_anew_for_options(self, field):
        assert self.launched(self.BASE, self.BASE, **{field: 7}) == (2, 0)

    def test_a_grid_too_large_is_refused(self):
        with pytest.raises(ValueError, match="more than a grid holds"):
            launch.launch(FakeKernel(), 2**31, *self.BASE)
        with pytest.raises(ValueError, match="more than a grid holds"):
            launch.launch(FakeKernel(), (7, 2**16), *self.BASE)

    def test_arguments_are_the_kernels_parameters(self):
        """Positions, not names, go to Triton: a parameter moved in one place alone would go unnoticed."""
        from flashcore_kernels.portable.decode import flashcore_decode
        from flashcore_kernels.portable.forward import flashcore_forward

        for kernel in (flashcore_forward, flashcore_decode):
            parameters = inspect.signature(kernel.fn).parameters
            assert list(parameters)[:4] == ["Q", "K", "V", "Out"]
            constant = ["constexpr" in str(parameter.annotation) for parameter in parameters.values()]
            assert constant == sorted(constant), "constexprs stand last"


def test_aligned_and_unaligned_calls_get_kernels_of_their_own():
    """What Triton compiles a variant for is in the key under which a compiled kernel is kept."""
    tensor = torch.zeros(64, dtype=torch.float16)
    keys = [
        launch._key("kernel", (pointer, number), (), 4, 2)
        for pointer, number in ((tensor, 16), (tensor[1:], 16), (tensor, 17), (tensor, 1), (tensor, 2**33))
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == launch._key("kernel", (torch.zeros(64, dtype=torch.float16), 32), (), 4, 2)
