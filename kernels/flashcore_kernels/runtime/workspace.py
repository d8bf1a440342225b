"""Memory for what programs of one launch hand to each other, which outlives calls, streams and graphs."""

import ctypes
import functools
import threading
from contextlib import contextmanager
from contextvars import ContextVar

import torch

# fp32 elements that a stream keeps for partial sums, 4 MiB: decodes of a few sequences, which wait for the host, need
# less. An allocation takes a tenth of such a call.
KEPT = 1 << 20
# Words that captures get for good, 512 MiB: each decode of a long or large batch takes some MiB.
LENT = 1 << 27
# In mailboxes: bits of a NaN that no kernel writes as a partial sum. Whoever reads other bits reads a partial sum.
UNWRITTEN = -1
_in_order: ContextVar[bool] = ContextVar("flashcore_graphs_in_order", default=False)


@contextmanager
def replayed_in_order():
    """A promise: graphs that are recorded meanwhile replay on the stream they are recorded on, and nowhere else.

    Then they never run beside that stream's own launches and may use its buffer, so that any number of them takes no
    memory for good.
    """
    token = _in_order.set(True)
    try:
        yield
    finally:
        _in_order.reset(token)


class Words:
    """Buffers of int32 words that all have one value when a launch begins, and again when it ends.

    Who has a buffer of its own: each stream, and each stream within a CUDA graph.
    - Launches on one stream follow each other, so they use its buffer over and over.
    - Launches that one stream puts into one graph keep their order there, so they share a buffer, too.
    - Two streams must not share one. No graph may use that of another graph or of a stream: it replays whenever its
      owner likes, unless he has promised an order (`replayed_in_order`).
    - A launch that fails may leave other values behind, so its buffer is forgotten.

    Where buffers come from: they are slices of a pool, each handed out once. The first call outside of a capture makes
    the pool, because a capture cannot. A capture that finds too little left gets words of its own, which are filled
    again at each replay; the next call outside of a capture then makes another pool.

    What does not come back: nothing says when a graph is gone, so what its capture got stays taken. A process may
    capture again and again, so there is a limit to what all captures get. From then on each has words of its own,
    whose filling costs a microsecond or two a launch.

    Args:
        value: of all words.
        pool: words of a pool on a GPU.
        least, most: words of a buffer. A launch that needs more than `most` has its own, filled for it alone.
        lent: words that all captures together get out of pools.
    """

    def __init__(self, value: int, pool: int, least: int, most: int, lent: int = LENT):
        self._value, self._pool, self._least, self._most, self._lent = value, pool, least, most, lent
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._pools: dict[tuple, tuple] = {}  # device -> words, and how many of them are handed out
        self._kept: list[torch.Tensor] = []  # all pools: kernels may still run on those that were used up
        self._short = 0  # words that the next capture might not find
        self._lock = threading.Lock()

    def get(self, count: int, device: torch.device) -> torch.Tensor:
        """At least `count` words for one launch on the current stream; their bytes begin at a multiple of 16."""
        place = _place(device)
        buffer = self._buffers.get(place)
        if buffer is None or buffer.numel() < count:
            with self._lock:
                return self._take(count, device, place)
        if self._short and not place[-1]:
            with self._lock:
                if self._short:
                    self._make_pool(self._short, device)
        return buffer

    def forget(self, device: torch.device) -> None:
        """Drop the current stream's buffer after a launch that failed."""
        with self._lock:
            self._buffers.pop(_place(device), None)

    def _take(self, count: int, device: torch.device, place: tuple) -> torch.Tensor:
        captured = bool(place[-1])
        if captured and _in_order.get():
            buffer = self._buffers.get((*place[:-1], 0))
            if buffer is not None and buffer.numel() >= count:
                return buffer
        key, size = (device.type, device.index), max(self._least, 1 << (count - 1).bit_length())
        if not captured and count <= self._most and self._left(key) < size:
            self._make_pool(size, device)
        may_have = count <= self._most and (not captured or size <= self._lent)
        if not may_have or self._left(key) < size:
            self._short = size if may_have else self._short
            return torch.full((count,), self._value, dtype=torch.int32, device=device)
        pool, used = self._pools[key]
        self._pools[key] = pool, used + size
        if captured:
            self._lent -= size
            if self._left(key) < size <= self._lent:
                self._short = size
        buffer = self._buffers[place] = pool[used : used + size]
        return buffer

    def _left(self, key: tuple) -> int:
        pool, used = self._pools.get(key, ((), 0))
        return len(pool) - used

    def _make_pool(self, size: int, device: torch.device) -> None:
        pool = _lasting(self._value, max(self._pool if device.type == "cuda" else 0, size), device)
        self._kept.append(pool)
        self._pools[device.type, device.index] = pool, 0
        self._short = 0


_counters = Words(0, pool=1 << 20, least=1 << 12, most=1 << 31)
_mailboxes = Words(UNWRITTEN, pool=1 << 22, least=1 << 17, most=1 << 24)
_partials: dict[tuple, torch.Tensor] = {}  # a buffer for each stream


def workspace(partials: int, counters: int, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What programs of one launch hand to each other, on the current stream.

    Args:
        partials: words for partial sums, 0: there are none.
        counters: counters of programs that are done, or of tiles that are drawn. 0 with partial sums: they go into
            mailboxes, see `UNWRITTEN`.

    Returns:
        (partial sums, counters), each None where none are wanted. With counters, the room for partial sums is fp32 of
        any value; without, it is mailboxes, int32 words that are `UNWRITTEN` and that the launch leaves so. Counters
        are int32 zeros, and the launch leaves them at zero.
    """
    if device.type == "meta":  # nothing will be launched
        sums = torch.empty(partials, dtype=torch.float32 if counters else torch.int32, device=device)
        return sums if partials else None, torch.zeros(counters, dtype=torch.int32, device=device) if counters else None
    if not counters:
        return _mailboxes.get(partials, device) if partials else None, None
    count = _counters.get(counters, device)
    return (_room(partials, device) if partials else None), count


def _room(partials: int, device: torch.device) -> torch.Tensor:
    """fp32 for partial sums, which nobody has to set to anything."""
    place = _place(device)
    if partials > KEPT or place[-1]:
        return torch.empty(partials, dtype=torch.float32, device=device)
    if place not in _partials:
        _partials[place] = _lasting(0, KEPT, device).view(torch.float32)
    return _partials[place]


def forget(device: torch.device) -> None:
    """A launch on the current stream failed: what it worked with may not be as it was."""
    _counters.forget(device)
    _mailboxes.forget(device)


def _place(device: torch.device) -> tuple:
    """(device, stream, capture) that a launch belongs to; 0: it is not being captured."""
    index = device.index
    if index is None:  # a CPU: only tensors on GPUs name which one
        return None, threading.get_ident(), 0
    stream = torch._C._cuda_getCurrentRawStream(index)  # what Triton launches on
    return index, stream, _capture(stream) if torch.cuda.is_current_stream_capturing() else 0


def _capture(stream: int) -> int:
    """The number that CUDA has given to the capture of a stream, of which no other in this process has the same."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    error = _driver().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None, None
    )
    if error or status.value != 1:
        raise RuntimeError(f"CUDA says nothing about the capture of stream {stream}: error {error}, status {status}")
    return number.value


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _lasting(value: int, count: int, device: torch.device) -> torch.Tensor:
    """int32 words from the device's common memory, ready for use on every stream.

    They outlive the call, so they must not come out of a graph's private memory pool. torch.compile warms its graphs up
    inside of one, without capturing; but pools catch the allocations of a thread or a stream, never another's.
    """
    if device.type != "cuda":
        return torch.full((count,), value, dtype=torch.int32, device=device)
    made = []

    def make() -> None:
        with torch.cuda.device(device):  # on the default stream of a thread of its own
            made.append(torch.full((count,), value, dtype=torch.int32, device=device))
            torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]
