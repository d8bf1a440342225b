"""From Python to a launch: a cache of compiled kernels, because Triton's own lookup costs more than a decode layer may.

`kernel[grid](...)` binds and hashes every argument, 18 us with 26 of them on Triton 3.6; calling the compiled kernel
that it returns costs 5. So the compiled kernel is kept under a key made of what Triton specialises on.
"""

import functools
import threading
from collections import defaultdict
from collections.abc import Callable

import torch

from ..plan import Plan
from ..problem import Problem

_compiled: dict[tuple, object] = {}
# Held while a kernel is compiled: another thread that wants the same one waits for it. See `ahead`.
_compiling: defaultdict[tuple, threading.Lock] = defaultdict(threading.Lock)
LOG2_E = 1.4426950408889634


def score_factors(problem: Problem) -> tuple[float, float, float]:
    """(score_scale, cap_scale, one) for blocks.attend_block: factors that leave the scores in units of log2."""
    if problem.softcap:
        return problem.scale / problem.softcap, problem.softcap * LOG2_E, 1.0
    return problem.scale * LOG2_E, 0.0, 1.0


def mask_argument(problem: Problem, mask: torch.Tensor | None) -> tuple[torch.Tensor | None, tuple[int, ...]]:
    """The dense mask as the kernels read it (bytes where bool), and its strides over `[B, H, Q, K]`."""
    if mask is None:
        return None, (0, 0, 0, 0)
    if problem.mask_kind == "bool":
        mask = mask.view(torch.uint8)
    return mask, tuple(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride()))


def _specialization(argument) -> object:
    """What Triton compiles a variant for: dtype and alignment of a pointer, divisibility and width of an int."""
    if argument is None:
        return None
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if not isinstance(argument, int):  # a tensor descriptor; the constants say the shape of its tiles
        return argument.base.dtype
    return argument == 1, argument % 16 == 0, argument > 0x7FFFFFFF


def _key(kernel, arguments: tuple, constants: tuple, plan: Plan) -> tuple:
    device = getattr(arguments[0], "base", arguments[0]).device
    index = torch.cuda.current_device() if device.type == "meta" else device.index
    return kernel, index, plan.num_warps, plan.num_stages, constants, *map(_specialization, arguments)


def compiled_kernel(kernel, arguments: tuple, constants: tuple, plan: Plan):
    """The compiled kernel that a `launch` with such arguments made before, or None."""
    return _compiled.get(_key(kernel, arguments, constants, plan))


def launcher(compiled) -> tuple[Callable, tuple]:
    """(call, prefix): `call(*grid, stream, *prefix, *parameters)` launches a compiled kernel.

    Triton's own way looks for scratch memory at every launch, in Python. Where the kernel needs none, the versions
    whose C function has the arguments that are known here go to it directly.
    """
    run, rest = compiled.run, (compiled.packed_metadata, None, None, None)
    scratch = [getattr(run, f"{kind}_scratch_size", None) for kind in ("global", "profile")]
    if _has_known_launcher() and type(run).__name__ == "CudaLauncher" and scratch == [0, 0]:
        return run.launch, (compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None, *rest)
    return run, (compiled.function, *rest)


@functools.cache
def _has_known_launcher() -> bool:
    import triton

    return triton.__version__.startswith(("3.5.", "3.6."))


def launch(
    kernel, programs: int | tuple[int, int], arguments: tuple, scalars: tuple, constants: tuple, plan: Plan, **options
) -> None:
    """Run `kernel` on the device and stream that are current; on meta tensors only compile it for that device.

    Args:
        kernel: a `triton.jit` function whose parameters are `arguments`, `scalars` and `constants`, in this order.
        programs: size of the grid, of one dimension or two.
        arguments: tensors, tensor descriptors (or None), and ints that Triton specialises on.
        scalars: floats, and ints under `do_not_specialize`.
        constants: the constexpr parameters.
        plan: gives num_warps and num_stages.
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
    key = _key(kernel, arguments, constants, plan)
    compiled = _compiled.get(key)
    if compiled is None:
        with _compiling[key]:
            compiled = _compiled.get(key)
            if compiled is None:
                options |= {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
                if device.type == "meta":
                    compiled = kernel.warmup(*parameters, grid=grid, **options)
                    compiled.run  # noqa: B018 - loads it, and has its launcher compiled
                    _compiled[key] = compiled
                else:
                    _compiled[key] = kernel[grid](*parameters, **options)
                return
    if device.type == "cuda":
        # All parameters, constexprs too: Triton before 3.7 raises without them, 3.8 aborts the process.
        compiled[grid](*parameters)
