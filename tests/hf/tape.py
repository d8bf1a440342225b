"""A CUDA graph's stand-in on the CPU: it records operators and tensors, and replays exactly those.

Python runs once, while recording; what it decided from ints on the host is frozen, as in a real graph, and reading a
value on the host fails, as in a real graph.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_ON_HOST = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item")


class Tape(TorchDispatchMode):
    """Records every operator that is called while it is active."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in READS_ON_HOST:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        output = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, output))
        return output

    def replay(self) -> None:
        """Call the operators again, on the same tensors, and put what they return where it was put then."""
        with torch.inference_mode():
            for function, args, kwargs, output in self.calls:
                given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
                kept = _tensors(output)
                if kept and not function._schema.is_mutable and all(_storage(t) in given for t in kept):
                    continue  # a view of what it was given
                for old, new in zip(kept, _tensors(function(*args, **kwargs))):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def record(step, device: torch.device, graphs: dict):
    """In place of `flashcore_hf.decode_graph.record`."""
    step()
    tape = Tape()
    with tape:
        output = step()
    return tape.replay, output
