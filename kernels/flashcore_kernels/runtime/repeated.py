"""A launch like one before: nothing in it is new but the addresses of its tensors.

Triton's launcher does more at each launch than such a one needs. It looks for scratch memory, and for each tensor
descriptor it has the driver encode a map of the tensor for the copy engine: with six of them 40 us, three times the
rest of a call. A map says nothing but address, shape, strides, dtype, tile and swizzle. All but the address is the same
in each launch of a kind, and PyTorch's allocator hands out the same few addresses over and over. So a map is kept for
each address.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

# Maps that are kept, some hundred bytes each. What a model's steps have in turn is a few per layer.
MOST_MAPS = 1 << 14
_maps: dict[tuple[Callable, int], object] = {}


class Operand(NamedTuple):
    """One of the first parameters of a launch.

    Attributes:
        position: of its tensor among those of a call; None: it is no tensor.
        descriptor: a tensor descriptor, whose own tensor is never looked at; None: the address is passed.
        argument: what is passed where there is no tensor.
    """

    position: int | None
    descriptor: object = None
    argument: object = None


class Launcher(NamedTuple):
    """How a compiled kernel is launched: `call(*grid, stream, *prefix, *parameters)`.

    Attributes:
        call, prefix: see above.
        encoders: for each tensor descriptor among the parameters a function that answers its map. The parameters then
            are the map, the shape and the strides in the descriptor's place. None: `call` takes descriptors.
    """

    call: Callable
    prefix: tuple
    encoders: tuple[Callable, ...] | None


def repeated(
    compiled, grid: tuple[int, int, int], operands: Sequence[Operand], rest: tuple
) -> Callable[[Sequence[torch.Tensor | None], int], None]:
    """The function that launches `compiled` on the tensors of a call and on a stream.

    The tensors of each call have the shapes, strides, dtypes and alignments for which the kernel was compiled and the
    descriptors made. This is not checked.

    Args:
        operands, rest: all parameters of the kernel.
    """
    call, prefix, encoders = launcher(compiled)
    descriptors = [operand.descriptor for operand in operands if operand.descriptor is not None]
    if encoders is not None and len(encoders) != len(descriptors):
        raise ValueError(f"the kernel was compiled for {len(encoders)} tensor descriptors, and has {len(descriptors)}")
    makers = map(_maker, descriptors, itertools.repeat(None) if encoders is None else encoders)
    fixed: list = [*grid, None, *prefix]
    addresses, described = [], []
    for position, descriptor, argument in operands:
        if position is None:
            fixed.append(argument)
        elif descriptor is None:
            addresses.append((len(fixed), position))
            fixed.append(None)
        else:
            described.append((len(fixed), position, next(makers)))
            fixed += [None] if encoders is None else [None, *descriptor.shape, *descriptor.strides]
    fixed += rest
    stream_place, maps = len(grid), _maps

    def launch(tensors: Sequence[torch.Tensor | None], stream: int) -> None:
        parameters = fixed.copy()
        parameters[stream_place] = stream
        for place, position in addresses:
            tensor = tensors[position]
            if tensor is not None:
                parameters[place] = tensor.data_ptr()
        for place, position, make in described:
            tensor = tensors[position]
            parameters[place] = maps.get((make, tensor.data_ptr())) or make(tensor)
        call(*parameters)

    return launch


def _maker(descriptor, encode: Callable | None) -> Callable[[torch.Tensor], object]:
    """From another tensor of the same shape, strides, dtype and alignment to what is passed for it.

    Each is a key of `_maps`, where no other finds what it left: its maps never stand for a tensor of another kind.
    """
    like = functools.partial(descriptor_on, type(descriptor), {**vars(descriptor), "base": None})
    if encode is None:
        return like

    def make(tensor: torch.Tensor):
        made = encode(like(tensor))
        if len(_maps) >= MOST_MAPS:
            # Another thread may hold one of these, and its launch keeps it alive.
            _maps.clear()
        _maps[make, tensor.data_ptr()] = made
        return made

    return make


def descriptor_on(kind: type, fields: dict, tensor: torch.Tensor):
    """A descriptor on another tensor of the same shape, strides, dtype and alignment.

    It was validated when it was made, which costs more than all the rest of a launch. Always a new object: another
    thread may be launching with its own.

    Args:
        fields: everything that a descriptor says but its tensor.
    """
    descriptor = object.__new__(kind)
    descriptor.__dict__ = {**fields, "base": tensor}
    return descriptor


def launcher(compiled) -> Launcher:
    """How to launch a compiled kernel.

    Triton's own way looks for scratch memory at every launch, in Python, and encodes each descriptor. Where the kernel
    needs no scratch memory, the versions whose C function has the arguments that are known here go to it directly.
    """
    run, rest = compiled.run, (compiled.packed_metadata, None, None, None)
    scratch = [getattr(run, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
    if _has_known_launcher() and type(run).__name__ == "CudaLauncher" and scratch == [0, 0]:
        prefix = (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, *rest)
        return Launcher(*_past_descriptors(run.launch, prefix))
    return Launcher(run, (compiled.function, *rest), None)


def _past_descriptors(launch: Callable, prefix: tuple) -> tuple[Callable, tuple, tuple[Callable, ...] | None]:
    """The fields of a Launcher: past the function by which Triton encodes descriptors, where that is a known one."""
    names = getattr(getattr(launch, "__code__", None), "co_freevars", ())
    if set(names) != {"launcher", "tensordesc_indices", "tensordesc_meta"}:
        return launch, prefix, None
    inner = {name: cell.cell_contents for name, cell in zip(names, launch.__closure__)}
    make = launch.__globals__.get("make_tensordesc_arg")
    if make is None or None in inner["tensordesc_meta"]:
        return launch, prefix, None
    encoders = tuple(functools.partial(_encoded, make, meta) for meta in inner["tensordesc_meta"])
    return inner["launcher"], prefix, encoders


def _encoded(make: Callable, meta: dict, descriptor):
    """The map of a tensor descriptor, as Triton makes it."""
    made, *numbers = make(descriptor, meta)
    if numbers != [*descriptor.shape, *descriptor.strides]:
        raise RuntimeError(f"Triton passes {numbers} beside a map; shape and strides are known here")
    return made


@functools.cache
def _has_known_launcher() -> bool:
    import triton

    return triton.__version__.startswith(("3.5.", "3.6."))
