"""CUDA-graph replay of decode steps: `generate()` without the Python and the launches of a model's forward.

    model = flashcore_hf.graphed(model)

A decode step of an 8B model is several hundred kernels, which Python takes longer to launch than the GPU to run. Here
the second token of a text is recorded into a CUDA graph, and every further one replays it: no torch.compile, nothing to
warm up. One graph serves every length, because all that changes lies in device memory: tokens, positions and the 2-D
mask are copied to fixed addresses, lengths advance inside the graph, and the KeyRange that the kernels read is computed
from them there. The keys and values lie in a FlashCoreCache, whose buffers keep their addresses; when they double, the
next step is recorded anew.
"""

import os
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import partial, wraps

import torch
from flashcore_kernels import Prompt, begin_compiling, steps_follow
from transformers.utils import ModelOutput

from .cache.flashcore_cache import FlashCoreCache, _converted, on_new_cache
from .cache.layer import DevicePosition
from .models import NAME, takes_key_range

# Inputs that change from step to step. Other tensors of a call may change too, so such calls are not recorded.
CHANGING = ("input_ids", "attention_mask", "position_ids", "cache_position")
# Caches of finished texts that are kept with their graphs, each for one batch size.
MOST_KEPT = 4


class FlashcoreGraphWarning(UserWarning):
    """Decode steps of a graphed model run without a graph: the same answer, slower. Given once for each reason."""


def graphed(model, enabled: bool = True):
    """Let decode steps of `model` replay CUDA graphs: plain `generate()` and any loop of one-token forwards.

    `generate()` then makes a FlashCoreCache wherever it would have made a DynamicCache (a loop of your own passes one),
    greedily, sampling or with beams. The cache and its graph are used again for the next text of the same batch size;
    the memory stays taken until `graphed(model, False)`. On Hopper the prompt's kernel begins to be compiled here, in
    the background, where it is not on disk: call it early. Calls with several tokens (prefill, the candidates of
    assisted decoding) run as they always do. So does a one-token step that a graph cannot serve, and one
    FlashcoreGraphWarning says why (FLASHCORE_STRICT=1 makes it an error): weights of attention asked for, another
    cache, layers that are not plain attention, a model spread over devices, a CPU.

    Args:
        model: loaded with `attn_implementation="flashcore"`. Only this object is changed.
        enabled: False puts it back as it was, and gives the memory back.

    Returns:
        the model.

    Raises:
        ImportError: Transformers before 4.57.
        ValueError: the model is not under "flashcore", or is an encoder-decoder.
    """
    steps = getattr(vars(model).get("forward"), "graphed_steps", None)
    if not enabled:
        if steps is not None:
            steps.restore()
    elif steps is None:
        if model.config._attn_implementation != NAME or model.config.is_encoder_decoder:
            raise ValueError(
                f"graphed needs a decoder loaded with attn_implementation='{NAME}'; this {type(model).__name__} has "
                f"'{model.config._attn_implementation}'"
                + (", and is an encoder-decoder" if model.config.is_encoder_decoder else "")
            )
        GraphedSteps(model)
    return model


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


def unsupported_device(model) -> str | None:
    """Why no graph can be recorded where `model` is, or None."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "the model is spread over several devices"
    if next(iter(devices)).type != "cuda":
        return f"CUDA graphs need an NVIDIA GPU, and the model is on '{next(iter(devices)).type}'"
    return None


def prompt_of(model) -> Prompt | None:
    """What the kernel for a prompt depends on, as the first decoder layer tells.

    None where that is not enough: for a model without KeyRanges, and for DeepSeek's heads of two sizes, which some
    versions pad. A layer that is unlike the first compiles its own kernel when it is called, as ever.
    """
    if not takes_key_range(model.config.get_text_config(decoder=True)):
        return None
    for module in model.modules():
        if getattr(module, "is_causal", False) and hasattr(module, "head_dim") and not hasattr(module, "v_head_dim"):
            softcap = bool(getattr(module, "attn_logit_softcapping", None))
            sinks = getattr(getattr(module, "sinks", None), "dtype", None)
            return Prompt(module.head_dim, module.head_dim, model.dtype, softcap, sinks)
    return None


class DecodeGraph:
    """One recorded decode step on the buffers of one cache.

    Args:
        forward: the model's own forward.
        cache: its buffers are read and written by every replay.
        inputs: the changing inputs of a call, by name; `attention_mask` is `[B, about length + 1]`.
        constants: all other arguments.

    Raises:
        RuntimeError, or whatever `forward` raises: it cannot be recorded.
    """

    def __init__(self, forward: Callable, cache: FlashCoreCache, inputs: dict[str, torch.Tensor], constants: dict):
        self.buffers = [layer.key_buffer for layer in cache.layers]
        device = inputs["input_ids"].device
        # Not inference tensors, even under inference_mode: later calls may write to them outside of it.
        with torch.inference_mode(False):
            self.inputs = {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
            if "attention_mask" in inputs:
                batch_size, width = inputs["attention_mask"].shape
                width = max(2 * width, *(layer.capacity for layer in cache.layers))
                self.inputs["attention_mask"] = torch.zeros(batch_size, width, dtype=torch.bool, device=device)
            self.length = torch.zeros((), dtype=torch.int64, device=device)
            self.positions = {layer.sliding_window: DevicePosition(self.length) for layer in cache.layers}
        self.host_length, self.mask_width = -1, 0
        self.host_bases: dict[int | None, int] = dict.fromkeys(self.positions, 0)

        def step():
            for position in self.positions.values():
                torch.sub(self.length, position.base, out=position.slot[0])
            with cache.on_device(self.positions):
                output = forward(**self.inputs, **constants, past_key_values=cache)
            self.length += 1
            return output

        self._set(cache, inputs)
        self.replay, output = record(step, device, cache.graphs)
        if not isinstance(output, ModelOutput):
            raise RuntimeError(f"forward returned a {type(output).__name__}, not a ModelOutput")
        self.output_type = type(output)
        self.outputs = {name: part for name, part in output.items() if part is not cache}
        self.host_length = -1  # recording has run the step

    def current(self, cache: FlashCoreCache) -> bool:
        """Whether the cache's buffers are still those of the recording."""
        return all(layer.key_buffer is buffer for layer, buffer in zip(cache.layers, self.buffers))

    def holds(self, inputs: dict[str, torch.Tensor]) -> bool:
        """Whether the mask fits; a model of sliding layers alone goes on when its buffers no longer grow."""
        mask = inputs.get("attention_mask")
        return mask is None or mask.shape[1] <= self.inputs["attention_mask"].shape[1]

    def run(self, cache: FlashCoreCache, inputs: dict[str, torch.Tensor]) -> ModelOutput:
        """One token: copy the inputs, replay, and answer in tensors that no later step overwrites."""
        self._set(cache, inputs)
        self.replay()
        self.host_length += 1
        for layer in cache.layers:
            layer.length += 1
        return self.output_type(**{name: _copy(part) for name, part in self.outputs.items()}, past_key_values=cache)

    def _set(self, cache: FlashCoreCache, inputs: dict[str, torch.Tensor]) -> None:
        for name, tensor in inputs.items():
            target = self.inputs[name]
            if name == "attention_mask":
                width = tensor.shape[1]
                if width < self.mask_width:
                    target[:, width:].zero_()
                self.mask_width = width
                target = target[:, :width]
            target.copy_(tensor)
        # The device counts along by itself; only what the host did in between has to be told.
        length = cache.layers[0].length
        if length != self.host_length:
            self.host_length = length
            self.length.fill_(length)
        for layer in cache.layers:
            if layer.base != self.host_bases[layer.sliding_window]:
                self.host_bases[layer.sliding_window] = layer.base
                self.positions[layer.sliding_window].base.fill_(layer.base)


def _copy(part):
    """Tensors of a model's output, cloned, in whatever tuples they are."""
    if isinstance(part, torch.Tensor):
        return part.clone()
    if isinstance(part, (tuple, list)):
        return type(part)(_copy(each) for each in part)
    return part


class GraphedSteps:
    """What `graphed` puts on a model: a forward that replays decode steps, and a stock of caches with their graphs."""

    def __init__(self, model):
        self.model = model
        self.instance_forward = vars(model).get("forward")  # accelerate puts one there, for instance
        self.original = original = model.forward
        self.device_reason = unsupported_device(model)
        self.told: set[str] = set()
        self.stock: OrderedDict[tuple, tuple[list, dict]] = OrderedDict()
        self.lock = threading.Lock()

        @wraps(original)
        def forward(*args, **kwargs):
            if torch.compiler.is_compiling() or len(args) > 1 or kwargs.get("past_key_values") is None:
                return original(*args, **kwargs)
            return self.step({"input_ids": args[0], **kwargs} if args else kwargs)

        forward.graphed_steps = self
        model.forward = forward
        if self.device_reason is None:
            begin_compiling(next(model.parameters()).device, prompt_of(model))
        on_new_cache(model, "graphs", self.new_cache)

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "a graphed model cannot be copied or pickled, because its graphs belong to this very object; "
            "call flashcore_hf.graphed(model, False) before"
        )

    def restore(self) -> None:
        """Put the model back as it was."""
        model = self.model
        on_new_cache(model, "graphs", None)
        del model.forward
        if self.instance_forward is not None:
            model.forward = self.instance_forward
        self.stock.clear()
        self.model = None  # caches that are still out do not come back

    def step(self, kwargs: dict):
        """A forward with a cache: replayed where it is a decode step that a graph can serve."""
        tokens, cache = kwargs.get("input_ids"), kwargs["past_key_values"]
        if tokens is None or tokens.dim() != 2 or torch.is_grad_enabled():
            return self.original(**kwargs)
        if tokens.shape[1] != 1:
            if self.reason_against(cache, kwargs) is not None:
                return self.original(**kwargs)
            # Steps are what a prompt is for: their kernels are compiled while its own are.
            with steps_follow(fp8=any(layer.fp8 for layer in cache.layers)):
                return self.original(**kwargs)
        reason = self.reason_against(cache, kwargs)
        if reason is None:
            if cache.get_seq_length() == 0:  # a prompt of one token
                return self.original(**kwargs)
            inputs = {name: kwargs[name] for name in CHANGING if kwargs.get(name) is not None}
            constants = {name: value for name, value in kwargs.items() if name not in inputs}
            del constants["past_key_values"]
            graph = self.graph_for(cache, inputs, constants)
            if not isinstance(graph, str):
                return graph.run(cache, inputs)
            reason = graph
        self.tell(reason)
        return self.original(**kwargs)

    def reason_against(self, cache, kwargs: dict) -> str | None:
        """Why this decode step cannot be recorded, or None."""
        model = self.model
        if self.device_reason is not None:
            return self.device_reason
        if not isinstance(cache, FlashCoreCache):
            return f"past_key_values is a {type(cache).__name__}; graphs need a FlashCoreCache"
        if not cache.ours:
            return "the model has layers that are not plain attention"
        if model.training:
            return "the model is in training mode"
        if model.config._attn_implementation != NAME:
            return f"the model runs '{model.config._attn_implementation}', not '{NAME}'"
        if kwargs.get("output_attentions") or getattr(model.config, "output_attentions", False):
            return "output_attentions asks for weights, which PyTorch computes"
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            return "attention_mask is not a 2-D mask of the tokens so far"
        for name, value in kwargs.items():
            if name not in CHANGING and not isinstance(value, (bool, int, float, str, type(None), FlashCoreCache)):
                return f"the argument {name} is a {type(value).__name__}, which may change from step to step"
        return None

    def graph_for(self, cache: FlashCoreCache, inputs: dict, constants: dict) -> DecodeGraph | str:
        """The graph that serves this call, recorded if need be; or why there is none."""
        for layer in cache.layers:
            layer.reserve(1)
        shapes = tuple(
            (name, t.dtype, t.shape if name != "attention_mask" else t.shape[:1]) for name, t in inputs.items()
        )
        key = (shapes, tuple(constants.items()), _modes(inputs["input_ids"].device))
        graph = cache.graphs.get(key)
        if isinstance(graph, DecodeGraph) and not (graph.current(cache) and graph.holds(inputs)):
            # All that know the old buffers, and keep them: their memory is free before the next is recorded.
            graph = None
            for old in [old for old, each in cache.graphs.items() if isinstance(each, DecodeGraph)]:
                if old == key or not cache.graphs[old].current(cache):
                    del cache.graphs[old]
        if graph is None:
            try:
                graph = DecodeGraph(self.original, cache, inputs, constants)
            except Exception as error:  # noqa: BLE001 - whatever it is, the step runs without a graph
                graph = f"recording failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            cache.graphs[key] = graph
        return graph

    def tell(self, reason: str) -> None:
        """Say once that steps run without a graph, and why.

        Raises:
            NotImplementedError: with FLASHCORE_STRICT=1.
        """
        message = f"flashcore_hf.graphed: decode steps run without a CUDA graph: {reason}."
        if os.environ.get("FLASHCORE_STRICT", "0") not in ("", "0"):
            raise NotImplementedError(message + " FLASHCORE_STRICT=1 makes that an error; unset it to allow it.")
        if reason not in self.told:
            self.told.add(reason)
            warnings.warn(message + " FLASHCORE_STRICT=1 makes this an error.", FlashcoreGraphWarning, stacklevel=4)

    def new_cache(self, cache, batch_size: int):
        """generate()'s new cache: ours, on the buffers and graphs of an earlier text of this batch size if one is over.

        When the cache is garbage, and not before (a caller may keep it), its buffers go back into the stock.
        """
        cache = _converted(cache)
        if not isinstance(cache, FlashCoreCache) or not cache.layers or not cache.ours or self.device_reason:
            return cache
        kind = (batch_size, *((layer.sliding_window, layer.max_length, layer.fp8) for layer in cache.layers))
        with self.lock:
            kept = self.stock.pop(kind, None)
        if kept is not None:
            for old, new in zip(kept[0], cache.layers):
                old.reset()
                old.record_past = new.record_past
            cache.layers, cache.graphs = kept
        # A cache that lives on does not keep the model.
        weakref.finalize(cache, partial(_give_back, weakref.ref(self), kind, cache.layers, cache.graphs)).atexit = False
        return cache


def _give_back(steps: weakref.ref, kind: tuple, layers: list, graphs: dict) -> None:
    steps = steps()
    if steps is None or steps.model is None:
        return
    with steps.lock:
        steps.stock[kind] = (layers, graphs)
        while len(steps.stock) > MOST_KEPT:
            steps.stock.popitem(last=False)


def _modes(device: torch.device) -> tuple:
    """What changes the recorded operators besides arguments."""
    autocast = torch.is_autocast_enabled(device.type)
    return autocast, torch.get_autocast_dtype(device.type) if autocast else None
