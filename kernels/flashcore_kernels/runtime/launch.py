"""From Python to a launch: a cache of compiled kernels, because Triton's own lookup costs more than a decode layer may.

`kernel[grid](...)` binds and hashes every argument, 18 us with 26 of them on Triton 3.6; calling the compiled kernel
that it returns costs 5. So the compiled kernel is kept under a key made of what Triton specialises on.
"""

import functools
import operator
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from ..problem import Inputs
from .recording import watcher
from .repeated import Operand, descriptor_on
from .workspace import forget, workspace

_compiled: dict[tuple, object] = {}
# Held while a kernel is compiled: another thread that wants the same one waits for it. See `precompile`.
_compiling: defaultdict[tuple, threading.Lock] = defaultdict(threading.Lock)
# The launches on meta tensors that are planned, where they are: key of the compiled kernel -> what compiles it.
_planned: ContextVar[dict[Hashable, Callable[[], None]] | None] = ContextVar("flashcore_planned", default=None)

# The tensors that a kernel of attention may take, by name. "absent" stands for a parameter that this variant lacks.
OPERANDS = (*Inputs._fields, "output", "lse", "partials", "counters", "absent", "mask_lines", "mask_bits")
_POSITION = {name: position for position, name in enumerate(OPERANDS)}


class Tile(NamedTuple):
    """A tensor descriptor of an operand, without the tensor, which would otherwise be kept alive.

    Attributes:
        operand: whose tensor it describes, one of OPERANDS.
        kind: the descriptor's class.
        fields: everything that a descriptor says but its tensor.
    """

    operand: str
    kind: type
    fields: dict

    @classmethod
    def of(cls, operand: str, descriptor) -> "Tile":
        """What a validated descriptor says."""
        return cls(operand, type(descriptor), {**vars(descriptor), "base": None})

    def on(self, tensor: torch.Tensor | None):
        """The descriptor on another tensor of the same shape, strides, dtype and alignment."""
        return descriptor_on(self.kind, self.fields, tensor)


class Launch(NamedTuple):
    """Everything about the launch of a kernel of attention but its tensors.

    Attributes:
        kernel: a jitted function. Its parameters are `operands`, `integers`, `scalars` and `constants`, in this order.
        grid: number of programs, (x, y).
        operands: what each of the first parameters is: a name out of OPERANDS, or a Tile.
        integers: ints that Triton specialises on.
        scalars: floats, and ints under `do_not_specialize`.
        constants: the constexpr parameters.
        num_warps, num_stages: of a program.
        partials, counters: what it needs of `workspace`.
        options: more of the compiler's, always the same ones with the same constants.
        map_words: int32 words of `mask_lines` and of `mask_bits`.
        before: a launch on the same tensors that comes before this one.
    """

    kernel: object
    grid: tuple[int, int]
    operands: tuple[str | Tile, ...]
    integers: tuple[int, ...]
    scalars: tuple
    constants: tuple
    num_warps: int
    num_stages: int
    partials: int = 0
    counters: int = 0
    options: dict = {}
    map_words: tuple[int, int] = (0, 0)
    before: "Launch | None" = None

    @property
    def tiles(self) -> tuple[Tile | None, ...]:
        """The Tile of each operand, None for those that are passed as they are."""
        return tuple(part if isinstance(part, Tile) else None for part in self.operands)

    @property
    def repeated_operands(self) -> tuple[Operand, ...]:
        """The operands as `repeated` takes them: with their positions among the tensors of OPERANDS."""
        return tuple(
            Operand(_POSITION[part.operand], part.on(None)) if isinstance(part, Tile) else Operand(_POSITION[part])
            for part in self.operands
        )

    @property
    def pick(self) -> Callable[[tuple], tuple]:
        """From the tensors of OPERANDS to those of this kernel's parameters."""
        return _pick(tuple(part.operand if isinstance(part, Tile) else part for part in self.operands))

    def arguments(self, tensors: tuple[torch.Tensor | None, ...]) -> tuple:
        """What Triton specialises on: tensors and descriptors from those of OPERANDS, and the integers."""
        picked = zip(self.tiles, self.pick(tensors))
        return (*(tensor if tile is None else tile.on(tensor) for tile, tensor in picked), *self.integers)


@functools.cache
def _pick(names: tuple[str, ...]) -> Callable[[tuple], tuple]:
    return operator.itemgetter(*(_POSITION[name] for name in names))


def run(launch_: Launch, inputs: Inputs, output: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Launch on the current stream, with what it needs of the workspace."""
    device = inputs.query.device
    try:
        maps = [torch.empty(words, dtype=torch.int32, device=device) for words in launch_.map_words if words]
        tensors = (*inputs, output, lse, *workspace(launch_.partials, launch_.counters, device), None, *maps)
        for each in (launch_.before, launch_):
            if each is not None:
                launch(
                    each.kernel, each.grid, each.arguments(tensors), each.scalars, each.constants,
                    num_warps=each.num_warps, num_stages=each.num_stages, **each.options,
                )  # fmt: skip
    except BaseException:
        forget(device)
        raise


def _specialization(argument) -> object:
    """What Triton compiles a variant for: dtype and alignment of a pointer, divisibility and width of an int."""
    if argument is None:
        return None
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if not isinstance(argument, int):  # a tensor descriptor; the constants say the shape of its tiles
        return argument.base.dtype
    return argument == 1, argument % 16 == 0, argument > 0x7FFFFFFF


def _key(kernel, arguments: tuple, constants: tuple, num_warps: int, num_stages: int) -> tuple:
    device = getattr(arguments[0], "base", arguments[0]).device
    index = torch.cuda.current_device() if device.type == "meta" else device.index
    return kernel, index, num_warps, num_stages, constants, *map(_specialization, arguments)


@contextmanager
def planned_launches():
    """Launches on meta tensors within compile nothing yet: yields a dict of what they need and is not there.

    A kernel's key leads to a function that compiles it for the device that is current where it is called.
    """
    plan: dict[Hashable, Callable[[], None]] = {}
    token = _planned.set(plan)
    try:
        yield plan
    finally:
        _planned.reset(token)


def is_planning() -> bool:
    """Whether launches on meta tensors are planned."""
    return _planned.get() is not None


def is_compiled(key: Hashable) -> bool:
    """Whether the kernel of a key that `planned_launches` gave is there."""
    return key in _compiled


def compiled_kernel(launch: Launch, tensors: tuple[torch.Tensor | None, ...]):
    """The compiled kernel that a `run` with such tensors of OPERANDS made before, or None."""
    arguments = launch.arguments(tensors)
    return _compiled.get(_key(launch.kernel, arguments, launch.constants, launch.num_warps, launch.num_stages))


def launch(
    kernel,
    programs: int | tuple[int, int],
    arguments: tuple,
    scalars: tuple,
    constants: tuple,
    *,
    num_warps: int = 4,
    num_stages: int = 1,
    **options,
) -> None:
    """Run `kernel` on the device and stream that are current; on meta tensors only compile it for that device.

    Args:
        kernel: a `triton.jit` function whose parameters are `arguments`, `scalars` and `constants`, in this order.
        programs: size of the grid, of one dimension or two.
        arguments: tensors, tensor descriptors (or None), and ints that Triton specialises on.
        scalars: floats, and ints under `do_not_specialize`.
        constants: the constexpr parameters.
        num_warps, num_stages: of a program.
        options: more of Triton's, always the same ones with the same constants.
    """
    grid = (*programs, 1) if isinstance(programs, tuple) else (programs, 1, 1)
    for most, size in zip((0x7FFFFFFF, 0xFFFF), grid):
        if size > most:
            raise ValueError(f"batch * heads * tiles = {size} programs are more than a grid holds ({most})")
    device = getattr(arguments[0], "base", arguments[0]).device
    parameters = (*arguments, *scalars, *constants)
    if device.type not in ("cuda", "meta"):  # Triton's interpreter
        kernel[grid](*parameters)
        return
    key = _key(kernel, arguments, constants, num_warps, num_stages)
    compiled = _compiled.get(key)
    if compiled is None:
        plan = _planned.get() if device.type == "meta" else None
        if plan is not None:
            plan[key] = functools.partial(
                launch, kernel, programs, arguments, scalars, constants, num_warps=num_warps, num_stages=num_stages,
                **options,
            )  # fmt: skip
            return
        with _compiling[key]:
            compiled = _compiled.get(key)
            if compiled is None:
                options |= {"num_warps": num_warps, "num_stages": num_stages}
                if device.type == "meta":
                    compiled = kernel.warmup(*parameters, grid=grid, **options)
                    compiled.run  # noqa: B018 - loads it, and has its launcher compiled
                    _compiled[key] = compiled
                else:
                    _compiled[key] = compiled = kernel[grid](*parameters, **options)
                    _tell_watcher(compiled, grid, arguments, (*scalars, *constants))
                return
    if device.type == "cuda":
        # All parameters, constexprs too: Triton before 3.7 raises without them, 3.8 aborts the process.
        compiled[grid](*parameters)
        _tell_watcher(compiled, grid, arguments, (*scalars, *constants))


def _tell_watcher(compiled, grid: tuple[int, int, int], arguments: tuple, rest: tuple) -> None:
    watched = watcher()
    if watched is not None:
        watched.add_launch(compiled, grid, arguments, rest)
