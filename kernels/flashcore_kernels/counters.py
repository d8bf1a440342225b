"""Zeroed counters and room for the partial sums of a decode's merge, which outlive calls, streams and graphs."""

import threading

import torch

POOL = 1 << 20
# fp32 elements that a stream keeps for partial sums, 4 MiB: decodes of a few sequences, which wait for the host, need
# less. An allocation takes a tenth of such a call.
KEPT = 1 << 20


class Counters:
    """int32 zeros, a buffer for each stream and one for each launch in a CUDA graph.

    A kernel leaves its counters at zero, and launches on one stream follow each other, so a stream can use one buffer
    over and over. Two streams must not share one; neither may two launches in a graph, which may run side by side and
    replay whenever the graph's owner likes. A launch that fails may leave counts behind, so its buffer is forgotten.

    Buffers are slices of a pool of zeros, handed out once: 4 MiB a device, made by the first call that is not being
    captured. A capture that finds none left has its own zeros, cleared again at each replay.
    """

    def __init__(self):
        self._buffers: dict[tuple, torch.Tensor] = {}
        self._partials: dict[tuple, torch.Tensor] = {}  # room for partial sums, a buffer for each stream
        self._pools: dict[tuple, list] = {}  # device -> [zeros, how many are handed out]
        self._lock = threading.Lock()

    def get(self, count: int, device: torch.device) -> torch.Tensor:
        """int32 zeros, at least `count` of them, for one launch on the current stream."""
        if device.index is not None and torch.cuda.is_current_stream_capturing():
            with self._lock:
                return self._take(count, device, may_grow=False)
        key = _stream_of(device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < count:
            with self._lock:
                buffer = self._buffers[key] = self._take(max(count, 4096), device, may_grow=True)
        return buffer

    def workspace(self, count: int, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`get`'s zeros, and at least `length` fp32 elements for partial sums, for one launch on the current stream."""
        if device.type == "meta":  # nothing will be launched
            return torch.zeros(count, dtype=torch.int32, device=device), torch.zeros(length, device=device)
        if length > KEPT or (device.index is not None and torch.cuda.is_current_stream_capturing()):
            return self.get(count, device), torch.empty(length, dtype=torch.float32, device=device)
        key = _stream_of(device)
        counts, partial = self._buffers.get(key), self._partials.get(key)
        if counts is None or counts.numel() < count:
            counts = self.get(count, device)
        if partial is None:
            with self._lock:
                partial = self._partials[key] = _lasting_zeros(KEPT, device).view(torch.float32)
        return counts, partial

    def forget(self, device: torch.device) -> None:
        """Drop the current stream's buffer after a launch that failed."""
        with self._lock:
            self._buffers.pop(_stream_of(device), None)

    def _take(self, count: int, device: torch.device, may_grow: bool) -> torch.Tensor:
        key = device.type, device.index
        pool, used = self._pools.get(key, (None, 0))
        if pool is None or used + count > pool.numel():
            if not may_grow:
                return torch.zeros(count, dtype=torch.int32, device=device)
            pool, used = _lasting_zeros(max(POOL if device.type == "cuda" else 0, count), device), 0
        # Each begins at a multiple of 16 bytes, as compiled kernels expect.
        self._pools[key] = [pool, used + (count + 3) // 4 * 4]
        return pool[used : used + count]


def _stream_of(device: torch.device) -> tuple:
    index = device.index
    if index is None:  # a CPU: only tensors on GPUs name which one
        return None, threading.get_ident()
    return index, torch._C._cuda_getCurrentRawStream(index)  # what Triton launches on


def _lasting_zeros(count: int, device: torch.device) -> torch.Tensor:
    """int32 zeros from the device's common memory, ready for use on every stream.

    They outlive the call, so they must not come out of a graph's private memory pool. torch.compile warms its graphs up
    inside of one, without capturing; but pools catch the allocations of a thread or a stream, never another's.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    made = []

    def make() -> None:
        with torch.cuda.device(device):  # on the default stream of a thread of its own
            made.append(torch.zeros(count, dtype=torch.int32, device=device))
            torch.cuda.current_stream().synchronize()

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


counters = Counters()
