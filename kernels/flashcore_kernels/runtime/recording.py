"""The launches of one call, kept so that a call like it can make them again on its own tensors, and do nothing else.

A backward has two to four launches, whose arguments depend on shapes, strides and options alone. Computing them takes
several times as long as launching; so the first call of a kind is watched, and those after it repeat what it did.
"""

import threading
from collections.abc import Callable
from contextlib import contextmanager

import torch

from .repeated import Operand, repeated
from .workspace import forget, workspace

_watching = threading.local()


class Recording:
    """What a call that was watched did.

    Args:
        given: the call's tensors, in the order in which another call will give its own.
    """

    def __init__(self, given: tuple[torch.Tensor | None, ...]):
        self._given = {id(tensor): position for position, tensor in enumerate(given) if tensor is not None}
        self._kept = given  # an id is that of a tensor only while that lives
        self._fresh: list[torch.Tensor] = []
        self._views: list[torch.Tensor] = []
        self._launches: list[tuple] = []
        # One tensor in two places does not tell which of the two a launch took.
        self.complete = len(self._given) == sum(tensor is not None for tensor in given)

    def add_fresh(self, tensor: torch.Tensor) -> None:
        """`tensor` was allocated by the call, which overwrites all of it that is ever read."""
        self._given[id(tensor)] = len(self._kept) + len(self._fresh)
        self._fresh.append(tensor)

    def add_view(self, view: torch.Tensor, tensor: torch.Tensor) -> None:
        """`view` begins where `tensor` does, and stands for it in launches."""
        if (position := self._given.get(id(tensor))) is not None:
            self._given[id(view)] = position
            self._views.append(view)

    def add_launch(self, compiled, grid: tuple[int, int, int], arguments: tuple, rest: tuple) -> None:
        """`compiled` was launched on `grid` with `arguments`, tensors and descriptors among them."""
        operands = []
        for argument in arguments:
            tensor = getattr(argument, "base", argument)
            if not isinstance(tensor, torch.Tensor):
                operands.append(Operand(None, argument=argument))
            elif (position := self._position(tensor)) is None:
                self.complete = False
                return
            else:
                operands.append(Operand(position, None if tensor is argument else argument))
        self._launches.append((compiled, grid, tuple(operands), rest))

    def _position(self, tensor: torch.Tensor) -> int | None:
        """Where a call's tensor will be found: -1 for the workspace's counters; None: this is somebody else's."""
        position = self._given.get(id(tensor))
        if position is None and tensor.data_ptr() == workspace(0, 1, tensor.device)[1].data_ptr():
            return -1
        return position

    def repeat(self) -> Callable[[tuple], list[torch.Tensor]]:
        """The function that does it again: from a call's tensors to those that it allocates, in their order.

        Raises:
            ValueError: something was launched on tensors that were neither given nor fresh.
        """
        if not self.complete:
            raise ValueError("a launch took tensors that were neither given nor allocated by the call")
        fresh = [(t.shape, t.stride(), t.dtype, t.device) for t in self._fresh]
        launches = [repeated(*launch) for launch in self._launches]
        device = self._fresh[0].device
        counted = any(operand.position == -1 for _, _, operands, _ in self._launches for operand in operands)
        raw_stream, empty, index = torch._C._cuda_getCurrentRawStream, torch.empty_strided, device.index

        def call(given):
            made = [empty(shape, stride, dtype=dtype, device=device) for shape, stride, dtype, device in fresh]
            # The counters come last, so that -1 finds them.
            tensors = (*given, *made, workspace(0, 1, device)[1] if counted else None)
            stream = raw_stream(index)
            try:
                for launch in launches:
                    launch(tensors, stream)
            except BaseException:
                forget(device)
                raise
            return made

        return call


@contextmanager
def recording(given: tuple[torch.Tensor | None, ...]):
    """Watch the launches of this thread: a Recording."""
    _watching.by = watched = Recording(given)
    try:
        yield watched
    finally:
        _watching.by = None


def watcher() -> Recording | None:
    """Who watches this thread's launches."""
    return getattr(_watching, "by", None)


def fresh(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, which a call has just allocated and will overwrite."""
    if (watched := watcher()) is not None:
        watched.add_fresh(tensor)
    return tensor


def seen_as(view: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`view`, which is what launches take of `tensor`: the same memory from its beginning."""
    if (watched := watcher()) is not None:
        watched.add_view(view, tensor)
    return view
