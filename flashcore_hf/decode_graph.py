"""One decode step of a model, recorded into a CUDA graph on the buffers of one cache, and its replay."""

import weakref
from collections.abc import Callable
from contextlib import nullcontext

import torch
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from .cache.layer import DevicePosition
from .step import Step


def record(step: Callable[[], object], device: torch.device, graphs: dict) -> tuple[Callable[[], None], object]:
    """Run `step` once, then record it into a CUDA graph.

    Args:
        graphs: of the cache; keeps the stream that its graphs are recorded on. cuBLAS has one workspace for each
            stream, also within graphs, so two caches that are replayed at once must not share it.

    Returns:
        what replays the graph on the current stream, and what `step` returned while it was recorded: a replay writes
        into the same tensors.

    Raises:
        RuntimeError: `step` does what cannot be recorded, such as reading a value on the host.
    """
    with torch.cuda.device(device):
        # Once outside: kernels are compiled and libraries initialised by their first call.
        stream = graphs.setdefault("stream", torch.cuda.Stream())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the GPU meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            output = step()
    return graph.replay, output


class DecodeGraph:
    """One recorded decode step on the buffers of one cache.

    Args:
        forward: the model's own forward.
        step: the call; its cache's buffers are read and written by every replay.
        pads_source: an encoder-decoder finds by its 2-D mask which positions of the source exist, and reads nothing
            else of it once keys and values are there. The graph then serves sources of every length.

    Raises:
        RuntimeError, or whatever `forward` raises: it cannot be recorded.
    """

    def __init__(self, forward: Callable, step: Step, pads_source: bool):
        self.buffers = _buffers(step)
        self.pads_source = pads_source
        self.masks = {step.names.mask, "attention_mask"} if pads_source else {step.names.mask}
        tokens, cache = step.inputs[step.names.tokens], step.cache
        # Not inference tensors, even under inference_mode: later calls may write to them outside of it.
        with torch.inference_mode(False):
            self.inputs = {name: torch.zeros_like(tensor) for name, tensor in step.inputs.items()}
            self._make_masks(step)
            self.states = self._states(step)
            self.length = torch.zeros((), dtype=torch.int64, device=tokens.device)
            self.positions = {layer.sliding_window: DevicePosition(self.length) for layer in cache.layers}
        self.host_length = -1
        self.host_states = None  # the encoder's, as they were copied last
        self.host_bases: dict[int | None, int] = dict.fromkeys(self.positions, 0)
        encoder = {} if self.states is None else {"encoder_outputs": BaseModelOutput(last_hidden_state=self.states)}
        constants = {**step.constants, **encoder, step.cache_name: step.whole_cache}

        def run():
            for position in self.positions.values():
                torch.sub(self.length, position.base, out=position.slot[0])
            with cache.on_device(self.positions), step.source.showing_all() if pads_source else nullcontext():
                output = forward(**self.inputs, **constants)
            self.length += 1
            return output

        self._set(step)
        self.replay, output = record(run, tokens.device, cache.graphs)
        if not isinstance(output, ModelOutput):
            raise RuntimeError(f"forward returned a {type(output).__name__}, not a ModelOutput")
        self.output_type = type(output)
        self.outputs, self.holds_cache = {}, []
        for name, part in output.items():
            if part is step.whole_cache:
                self.holds_cache.append(name)
            elif not (name.startswith("encoder_") and step.encoder is not None):
                self.outputs[name] = part
        self.host_length = -1  # recording has run the step

    def _make_masks(self, step: Step) -> None:
        """Masks with room for what comes: `[B, slots]`."""
        tokens = step.inputs[step.names.tokens]

        def new(fill, width):
            return fill(tokens.shape[0], width, dtype=torch.bool, device=tokens.device)

        self.mask_widths = dict.fromkeys(self.masks, 0)
        slots, mask = max(layer.capacity for layer in step.cache.filled_layers), step.names.mask
        if mask in self.inputs:
            self.inputs[mask] = new(torch.zeros, max(2 * step.inputs[mask].shape[1], slots))
        elif step.encoder is not None:
            # Some decoders would make one, of a length that they read on the host.
            self.inputs[mask] = new(torch.ones, slots)
        if self.pads_source:
            self.inputs["attention_mask"] = new(torch.zeros, step.source.filled_layers[0].capacity)

    def _states(self, step: Step) -> torch.Tensor | None:
        """What stands for the encoder's states `[B, source, D]`."""
        if step.encoder is None:
            return None
        states = step.encoder.last_hidden_state
        if not self.pads_source:
            return torch.empty_like(states, memory_format=torch.contiguous_format)
        # Nobody reads it, and whoever did would say NaN.
        shape = states.shape[0], step.source.filled_layers[0].capacity, states.shape[2]
        return states.new_full((1, 1, 1), torch.nan).expand(shape)

    def current(self, step: Step) -> bool:
        """Whether the caches' buffers are still those of the recording."""
        buffers = _buffers(step)
        return len(buffers) == len(self.buffers) and all(a is b for a, b in zip(buffers, self.buffers))

    def holds(self, step: Step) -> bool:
        """Whether the masks fit; a model of sliding layers alone goes on when its buffers no longer grow."""
        return all(step.inputs[name].shape[1] <= self.inputs[name].shape[1] for name in self.masks & step.inputs.keys())

    def run(self, step: Step) -> ModelOutput:
        """One token: copy the inputs, replay, and answer in tensors that no later step overwrites."""
        self._set(step)
        self.replay()
        self.host_length += 1
        for layer in step.cache.filled_layers:
            layer.length += 1
        parts = {name: _copy(part) for name, part in self.outputs.items()}
        if step.encoder is not None:
            parts |= {f"encoder_{name}": part for name, part in step.encoder.items() if name in _OF_THE_ENCODER}
        return self.output_type(**parts, **dict.fromkeys(self.holds_cache, step.whole_cache))

    def _set(self, step: Step) -> None:
        for name, tensor in step.inputs.items():
            target = self.inputs[name]
            if name in self.masks:
                width = tensor.shape[1]
                if width < self.mask_widths[name]:
                    target[:, width:].zero_()
                self.mask_widths[name] = width
                target = target[:, :width]
            target.copy_(tensor)
        if step.encoder is not None and not self.pads_source:
            states = step.encoder.last_hidden_state
            version = None if states.is_inference() else states._version  # inference tensors have none
            if self.host_states is None or self.host_states[0]() is not states or self.host_states[1] != version:
                self.states.copy_(states)
                self.host_states = weakref.ref(states), version
        # The device counts along by itself; only what the host did in between has to be told.
        layers = step.cache.filled_layers
        if layers[0].length != self.host_length:
            self.host_length = layers[0].length
            self.length.fill_(self.host_length)
        for layer in layers:
            if layer.base != self.host_bases[layer.sliding_window]:
                self.host_bases[layer.sliding_window] = layer.base
                self.positions[layer.sliding_window].base.fill_(layer.base)


_OF_THE_ENCODER = ("last_hidden_state", "hidden_states", "attentions")


def _buffers(step: Step) -> list[torch.Tensor]:
    """The key buffers that a graph reads: values' lie beside them."""
    layers = step.cache.filled_layers + ([] if step.source is None else step.source.filled_layers)
    return [layer.key_buffer for layer in layers]


def _copy(part):
    """Tensors of a model's output, cloned, in whatever tuples they are."""
    if isinstance(part, torch.Tensor):
        return part.clone()
    if isinstance(part, (tuple, list)):
        return type(part)(_copy(each) for each in part)
    return part
