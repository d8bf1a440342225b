"""What is known of the machine that a call runs on, and whether its tensors may go past torch's dispatcher."""

import functools
from typing import NamedTuple

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad


class Device(NamedTuple):
    """What `choose` needs to know of a device.

    Attributes:
        kind: "cuda", "interpreter" (Triton's, on any tensor) or "torch" (no kernel can run).
        arch: compute capability as major * 10 + minor; 0 where it means nothing.
        reason: for kind "torch", why no kernel can run.
        triton: version of Triton as (major, minor).
        processors: streaming multiprocessors; H100 SXM and H200 have 132, other parts of compute capability 9.0 fewer.
    """

    kind: str
    arch: int = 0
    reason: str = ""
    triton: tuple[int, int] = (0, 0)
    processors: int = 132


@functools.cache
def device_of(device: torch.device) -> Device:
    """What `choose` needs to know of `device`."""
    try:
        import triton
    except ImportError as error:
        return Device("torch", reason=f"Triton cannot be imported ({error})")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if interprets():
        import numpy

        if version < (3, 7) and tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= (2, 4):
            # It takes arrays of one element for ints.
            found = f"Triton {triton.__version__} and NumPy {numpy.__version__}"
            return Device("torch", reason=f"Triton's interpreter before 3.7 needs NumPy before 2.4; here are {found}")
        return Device("interpreter")
    if device.type != "cuda" or torch.version.hip:
        return Device("torch", reason=f"the kernels run on NVIDIA GPUs, and the tensors are on '{device.type}'")
    properties = torch.cuda.get_device_properties(device)
    if properties.major < 8:
        found = f"{properties.major}.{properties.minor}"
        return Device("torch", reason=f"the kernels need compute capability 8.0 or newer, this GPU has {found}")
    arch = properties.major * 10 + properties.minor
    return Device("cuda", arch, triton=version, processors=properties.multi_processor_count)


def interprets() -> bool:
    """Whether `triton.jit` makes functions for its interpreter: asked by making one, which compiles nothing."""
    import triton

    @triton.jit
    def nothing():
        pass

    return not isinstance(nothing, triton.JITFunction)


def goes_past_dispatcher(tensor: torch.Tensor) -> bool:
    """Whether a kernel may be launched on this tensor without asking torch's dispatcher.

    It is a plain one on the current GPU, and nobody listens.
    """
    return tensor.is_cuda and nobody_listens(tensor) and tensor.get_device() == _C._cuda_getDevice()


def nobody_listens(*tensors: torch.Tensor) -> bool:
    """Whether these are plain tensors that hold numbers: no mode, function transform, tracer or tangent is about."""
    for tensor in tensors:  # quicker than all() of a generator
        if type(tensor) is not Tensor:
            return False
    return (
        not _C._len_torch_dispatch_stack()
        and _C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and _C._get_tracing_state() is None
    )
