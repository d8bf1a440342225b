"""Launches like one before: what Triton's launcher gets, and which maps of tensors are kept. No GPU is needed."""

import threading
import types

import pytest
import torch
from flashcore_kernels.runtime import repeated
from flashcore_kernels.runtime.repeated import Operand


class CudaLauncher:
    """Triton's, as of 3.5 and 3.6."""

    launch_cooperative_grid, launch_pdl, global_scratch_size, profile_scratch_size = False, True, 0, 0

    def __init__(self):
        self.caught = []

    def launch(self, *arguments):
        self.caught.append(arguments)

    def __call__(self, x, y, z, stream, function, *rest):
        scratch = [f"{size} bytes" if size else None for size in (self.global_scratch_size, self.profile_scratch_size)]
        self.launch(x, y, z, stream, function, self.launch_cooperative_grid, self.launch_pdl, *scratch, *rest)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("scratch", [0, 128])
def test_past_tritons_own_launcher(monkeypatch, known, scratch):
    """Straight to its C function, with the arguments that it would pass on; never where it has more to do."""
    monkeypatch.setattr(repeated, "_has_known_launcher", lambda: known)
    monkeypatch.setattr(CudaLauncher, "global_scratch_size", scratch)
    run = CudaLauncher()
    call, prefix, encoders = repeated.launcher(
        types.SimpleNamespace(run=run, function="function", packed_metadata="metadata")
    )
    assert encoders is None, "there are no tensor descriptors"
    assert (call == run.launch) == (known and not scratch)
    call(5, 1, 1, "stream", *prefix, "query", "key")
    run(5, 1, 1, "stream", "function", "metadata", None, None, None, "query", "key")
    assert run.caught[0] == run.caught[1]


def test_what_is_known_of_tritons_launcher():
    """The signature of these versions, read from their source where one of them is installed."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="before 3.5 nobody has asked")
    expected = "iiiKKppOOOOOO"  # grid, stream, function, two flags; scratch x 2, metadata x 2, hooks x 2
    assert repeated._has_known_launcher() == (getattr(driver, "_BASE_ARGS_FORMAT", None) == expected)


class Descriptor:
    """As Triton's TensorDescriptor."""

    def __init__(self, base, block_shape=(1, 1, 128, 64)):
        self.base, self.block_shape, self.padding = base, list(block_shape), "zero"
        self.shape, self.strides = list(base.shape), list(base.stride())


class Map:
    """What the driver makes of a descriptor."""

    def __init__(self, *said):
        self.said = said


def make_tensordesc_arg(arg, metadata):
    """Triton's, as of 3.5 and 3.6."""
    made = Map(arg.base.data_ptr(), arg.base.dtype, tuple(arg.shape), tuple(arg.strides), metadata["box"])
    return [made, *arg.shape, *arg.strides]


def wrap_handle_tensordesc(launcher, tensordesc_indices, tensordesc_meta):
    """Triton's, as of 3.5 and 3.6."""

    def inner(*args):
        final_args, metas = list(args[:13]), iter(tensordesc_meta)
        for i, arg in enumerate(args[13:]):
            if i in tensordesc_indices:
                final_args.extend(make_tensordesc_arg(arg, next(metas)))
            else:
                final_args.append(arg)
        return launcher(*final_args)

    return inner


class TestMaps:
    """A kernel with two descriptors, an address and a number between them: `(described, address, 7, described)`."""

    @pytest.fixture(autouse=True)
    def known(self, monkeypatch):
        monkeypatch.setattr(repeated, "_has_known_launcher", lambda: True)
        monkeypatch.setattr(repeated, "_maps", {})

    def build(self, first, second, metas=({"box": (1, 64)}, {"box": (1, 128)})):
        """(the wrapper's way, the repeated launch, what Triton's C function got)."""
        run = CudaLauncher()
        caught = run.caught
        run.launch = wrap_handle_tensordesc(lambda *arguments: caught.append(arguments), {0, 3}, metas)
        compiled = types.SimpleNamespace(run=run, function="function", packed_metadata="metadata")
        operands = [
            Operand(0, Descriptor(first)),
            Operand(1),
            Operand(None, argument=7),
            Operand(1, Descriptor(second)),
        ]
        again = repeated.repeated(compiled, (5, 1, 1), operands, (0.5, True))

        def long_way(tensors, stream):
            one, two = tensors
            parameters = Descriptor(one), two.data_ptr(), 7, Descriptor(two), 0.5, True
            run(5, 1, 1, stream, "function", "metadata", None, None, None, *parameters)

        return long_way, again, caught

    def tensors(self, shape=(2, 3, 128, 64), dtype=torch.float16):
        return [torch.zeros(shape, dtype=dtype) for _ in "ab"]

    @staticmethod
    def said(arguments):
        return [each.said if isinstance(each, Map) else each for each in arguments]

    def test_what_tritons_c_function_gets(self):
        first = self.tensors()
        long_way, again, caught = self.build(*first)
        for tensors in (first, self.tensors(), first):
            long_way(tensors, 77), again(tensors, 77)
            wrapped, repeated_ = caught[-2:]
            assert self.said(wrapped) == self.said(repeated_)
            assert isinstance(repeated_[13], Map) and repeated_[3] == 77

    def test_a_map_is_made_once_an_address(self):
        first, second = self.tensors(), self.tensors()
        _, again, caught = self.build(*first)
        for tensors in (first, second, first, second):
            again(tensors, 0)
        maps = [arguments[13] for arguments in caught]
        assert maps[0] is maps[2] and maps[1] is maps[3] and maps[0] is not maps[1]
        assert len(repeated._maps) == 4, "two descriptors at two addresses"

    def test_the_same_memory_in_another_shape_or_dtype(self):
        """A map is never that of another kind of call, although its address is the same."""
        memory = torch.zeros(1 << 18, dtype=torch.uint8)
        for shape, dtype in (((2, 3, 128, 64), torch.float16), ((2, 3, 64, 128), torch.float16),
                             ((2, 3, 128, 64), torch.bfloat16), ((1, 3, 128, 64), torch.float16)):  # fmt: skip
            size = 2 * torch.Size(shape).numel()
            view = memory[:size].view(dtype).view(shape)
            for tensor in (view, view.transpose(0, 1).contiguous().transpose(0, 1)):
                tensor = torch.as_strided(view, shape, tensor.stride())
                long_way, again, caught = self.build(tensor, tensor)
                for _ in "ab":
                    long_way((tensor, tensor), 0), again((tensor, tensor), 0)
                    assert self.said(caught[-1]) == self.said(caught[-2])
                    assert caught[-1][13].said[:4] == (view.data_ptr(), dtype, shape, tensor.stride())

    def test_memory_is_bounded(self, monkeypatch):
        monkeypatch.setattr(repeated, "MOST_MAPS", 6)
        tensors = [self.tensors((1, 1, 8, 8)) for _ in range(20)]
        _, again, caught = self.build(*tensors[0])
        for each in tensors:
            again(each, 0)
            assert len(repeated._maps) <= 6
            assert caught[-1][13].said[0] == each[0].data_ptr()

    def test_no_tensor_is_kept(self):
        tensor = torch.zeros(2, 3, 128, 64)
        _, again, caught = self.build(tensor, tensor)
        again((tensor, tensor), 0)
        fields = [cell.cell_contents for cell in again.__closure__]
        assert not any(isinstance(each, torch.Tensor) for each in fields)
        for make, _ in repeated._maps:
            like = dict(zip(make.__code__.co_freevars, (cell.cell_contents for cell in make.__closure__)))["like"]
            assert like.args[1]["base"] is None

    def test_threads(self):
        """Each gets maps of its own tensors, also while another empties what is kept."""
        repeated_, failed = self.build(*self.tensors())[1:], []

        def work(seed):
            _, again, caught = self.build(*self.tensors())
            for number in range(200):
                mine = self.tensors((1, 1, 8, 8)) if number % 2 else self.tensors()
                again(mine, seed)
                if caught[-1][13].said[0] != mine[0].data_ptr() or caught[-1][3] != seed:
                    failed.append(number)
                if number % 20 == 0:
                    repeated._maps.clear()

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        assert not failed and repeated_

    def test_a_wrapper_that_is_not_known_gets_descriptors(self):
        first, second = self.tensors()
        caught = []

        def another(*arguments):
            caught.append(arguments)

        run = CudaLauncher()
        run.launch = another
        compiled = types.SimpleNamespace(run=run, function="function", packed_metadata="metadata")
        again = repeated.repeated(compiled, (5, 1, 1), [Operand(0, Descriptor(first)), Operand(1)], ())
        again((first, second), 0), again((second, first), 0)
        assert [arguments[13].base is tensor for arguments, tensor in zip(caught, (first, second))] == [True] * 2
        assert caught[0][13] is not caught[1][13] and not repeated._maps

    def test_a_descriptor_that_was_compiled_as_an_address(self):
        """Triton then passes more than a map: nothing that is known here."""
        *_, again, caught = self.build(*self.tensors(), metas=(None, None))
        with pytest.raises(TypeError, match="NoneType"):  # this file's stand-in, which was called with a descriptor
            again(self.tensors(), 0)
        assert not repeated._maps

    def test_another_answer_of_tritons_is_an_error(self):
        encoded = repeated._encoded
        tensor = self.tensors()[0]
        with pytest.raises(RuntimeError, match="beside a map"):
            encoded(lambda descriptor, meta: [Map(), 1, 2, 3], {}, Descriptor(tensor))
        made = Map()
        numbers = [*tensor.shape, *tensor.stride()]
        assert encoded(lambda descriptor, meta: [made, *numbers], {}, Descriptor(tensor)) is made, "negative control"


def test_tritons_own_wrapper_is_known():
    """Where 3.5 or 3.6 is installed: the wrapper has the parts that are looked for."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    if not repeated._has_known_launcher():
        pytest.skip("a newer Triton's launcher encodes descriptors itself")
    signature = {"a": "tensordesc<fp16[1,1,64,64]>", "b": "i32"}
    wrapped = driver.wrap_handle_tensordesc("the C function", signature, [{"swizzle": 3}])
    call, prefix, encoders = repeated._past_descriptors(wrapped, ("prefix",))
    assert (call, prefix) == ("the C function", ("prefix",)) and len(encoders) == 1
    assert encoders[0].args == (driver.make_tensordesc_arg, {"swizzle": 3})
    assert repeated._past_descriptors(print, ("prefix",)) == (print, ("prefix",), None), "a kernel without descriptors"
