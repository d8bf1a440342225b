"""What of a model a recording has taken for granted: where its weights lie, and which of PEFT's adapters are on.

A CUDA graph reads weights at the addresses that they had, and goes the way through the modules that Python went then.
Adapters are switched, scaled and merged by attributes of PEFT's layers, and merging gives a weight another address.
"""

import torch


class ModelState:
    """Numbers the states that a model has been in.

    Args:
        model: with PEFT's layers in it or without; they may come and go.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.numbers: dict[tuple, int] = {}
        self.look()

    def look(self) -> None:
        """Look at all of the model: once for each prompt, which takes far longer."""
        # Every layer of PEFT's has this, whatever its kind, and whatever stands in for a module that is saved whole.
        self.adapters = [module for module in self.model.modules() if hasattr(module, "_disable_adapters")]
        self.switches = self._switches()
        weights = (*self.model.parameters(), *self.model.buffers())
        state = tuple(map(_address, weights)), tuple(self.switches)
        self.number = self.numbers.setdefault(state, len(self.numbers))

    def current(self) -> int:
        """The number of the state that the model is in; for a step, so it looks only at what switches adapters."""
        if self.adapters and self._switches() != self.switches:
            self.look()
        return self.number

    def _switches(self) -> list[tuple]:
        return [
            (
                module._disable_adapters,
                _as_key(module._active_adapter),
                _as_key(getattr(module, "merged_adapters", ())),
                _as_key(getattr(module, "scaling", ())),
            )
            for module in self.adapters
        ]


def _as_key(value):
    """A copy that can be compared later, and hashed: names are a str or a list, scales a dict."""
    if isinstance(value, dict):
        return tuple(value.items())
    return value if isinstance(value, str) else tuple(value)


def _address(tensor: torch.Tensor) -> tuple:
    try:
        return id(tensor), tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own, as quantised weights are
        return id(tensor), None
