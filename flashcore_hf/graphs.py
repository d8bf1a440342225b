"""CUDA-graph replay of decode steps: `generate()` without the Python and the launches of a model's forward.

    model = flashcore_hf.graphed(model)

A decode step of an 8B model is several hundred kernels, which Python takes longer to launch than the GPU to run. Here
the second token of a text is recorded into a CUDA graph, and every further one replays it: no torch.compile, nothing to
warm up. One graph serves every length, because all that changes lies in device memory: tokens, positions and the 2-D
mask are copied to fixed addresses, lengths advance inside the graph, and the KeyRange that the kernels read is computed
from them there. The keys and values lie in a FlashCoreCache, whose buffers keep their addresses; when they double, the
next step is recorded anew.

An encoder-decoder has two of them. Once keys and values of the source are there, its steps read nothing else of the
encoder; models that are known to mask the source (`models.MASKED_SOURCE_MODELS`) get a mask over whole buffers, so that
one graph serves sources of every length.
"""

import inspect
import os
import threading
import warnings
import weakref
from collections import OrderedDict
from functools import partial, wraps

import torch
from flashcore_kernels import Prompt, begin_compiling, steps_follow

from . import compat
from .cache.encoder_decoder import halves
from .cache.flashcore_cache import FlashCoreCache
from .cache.switch import converted
from .decode_graph import DecodeGraph
from .hooks import did_not_hold, on_new_cache, owner, reached
from .model_state import ModelState
from .models import NAME, masks_its_source, takes_key_range
from .step import DECODER, ENCODER_DECODER, Step, cache_name_in, read_step, unknown_cache_in

# Caches of finished texts that are kept with their graphs, each for one batch size.
MOST_KEPT = 4
# Tokens of a call that may be one step's candidates, of assisted or prompt-lookup decoding.
MOST_TOKENS = 32
# Calls of several tokens that run before their number is worth a graph.
BEFORE_RECORDING = 2
# Graphs of one cache. Only calls of other shapes need others: so many candidates, or in some encoder-decoders a source
# of another length.
MOST_GRAPHS = 24


class FlashcoreGraphWarning(UserWarning):
    """Decode steps of a graphed model run without a graph: the same answer, slower. Given once for each reason."""


def graphed(model, enabled: bool = True):
    """Let decode steps of `model` replay CUDA graphs: plain `generate()` and any loop of one-token forwards.

    `generate()` then makes a FlashCoreCache wherever it would have made a DynamicCache (a loop of your own passes one),
    greedily, sampling or with beams. The cache and its graph are used again for the next text of the same batch size;
    the memory stays taken until `graphed(model, False)`. Candidates of assisted and prompt-lookup decoding are replayed
    too, with a graph for each number of them that comes again. On Hopper the prompt's kernel begins to be compiled
    here, in the background, where it is not on disk: call it early. Prompts run as they always do. So does a one-token
    step that a graph cannot serve, and one FlashcoreGraphWarning says why (FLASHCORE_STRICT=1 makes it an error):
    weights of attention asked for, another cache, layers that are not plain attention, a model spread over devices, a
    CPU.

    Args:
        model: loaded with `attn_implementation="flashcore"`. Only this object is changed.
        enabled: False puts it back as it was, and gives the memory back.

    Returns:
        the model.

    Raises:
        ImportError: Transformers before 4.57.
        ValueError: the model is not under "flashcore"; or it is an encoder-decoder, in Transformers before 5.17.
        RuntimeError: Transformers has nothing of the name that this hooks into. `generate()` raises it where
            Transformers no longer comes by.
    """
    whole, model = model, owner(model)
    steps = getattr(vars(model).get("forward"), "graphed_steps", None)
    if not enabled:
        if steps is not None:
            steps.restore()
    elif steps is None:
        decoder = model.get_decoder() if model.config.is_encoder_decoder else None
        implementation = (decoder_config(model) if decoder is None else decoder.config)._attn_implementation
        if implementation != NAME:
            raise ValueError(
                f"graphed needs a model loaded with attn_implementation='{NAME}'; this {type(model).__name__} has "
                f"'{implementation}'"
            )
        if model.config.is_encoder_decoder and not compat.CHANGES_ENCODER_DECODERS:
            raise ValueError(
                f"graphed was asked for {type(model).__name__}, an encoder-decoder, in Transformers "
                f"{compat.transformers.__version__}. Supported are decoders there, and encoder-decoders from 5.17 on; "
                f"it runs with attn_implementation='{NAME}' and its own cache"
            )
        GraphedSteps(model)
    return whole


def unsupported_device(model) -> str | None:
    """Why no graph can be recorded where `model` is, or None."""
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "the model is spread over several devices"
    if next(iter(devices)).type != "cuda":
        return f"CUDA graphs need an NVIDIA GPU, and the model is on '{next(iter(devices)).type}'"
    return None


def unsupported_weights(model) -> str | None:
    """Why no graph can be recorded with the weights that `model` has, or None."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt" and module.state.threshold > 0:
            return (
                "bitsandbytes looks for outliers on the host in each of its 8-bit layers; without that, with "
                "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), graphs can be recorded, as with 4 bits"
            )
    return None


def decoder_config(model):
    """The config of the part of a model that generates."""
    return model.config.get_text_config(decoder=True) if getattr(model.config, "sub_configs", None) else model.config


def prompt_of(model) -> Prompt | None:
    """What the kernel for a prompt depends on, as the first decoder layer tells.

    None where that is not enough: for a model without KeyRanges, and for DeepSeek's heads of two sizes, which some
    versions pad. A layer that is unlike the first compiles its own kernel when it is called, as ever.
    """
    if not takes_key_range(decoder_config(model)):
        return None
    for module in model.modules():
        if getattr(module, "is_causal", False) and hasattr(module, "head_dim") and not hasattr(module, "v_head_dim"):
            softcap = bool(getattr(module, "attn_logit_softcapping", None))
            sinks = getattr(getattr(module, "sinks", None), "dtype", None)
            return Prompt(module.head_dim, module.head_dim, model.dtype, softcap, sinks)
    return None


class GraphedSteps:
    """What `graphed` puts on a model: a forward that replays decode steps, and a stock of caches with their graphs."""

    def __init__(self, model):
        self.model = model
        self.instance_forward = vars(model).get("forward")  # accelerate puts one there, for instance
        self.original = original = model.forward
        self.refusal = unsupported_device(model) or unsupported_weights(model)
        self.config = decoder_config(model)
        self.names = ENCODER_DECODER if model.config.is_encoder_decoder else DECODER
        self.pads_source = masks_its_source(model)
        self.state = ModelState(model)
        self.told: set[str] = set()
        self.stock: OrderedDict[tuple, tuple[list, dict]] = OrderedDict()
        self.lock = threading.Lock()

        names = list(inspect.signature(type(model).forward).parameters)[1:]  # without self

        @wraps(original)
        def forward(*args, **kwargs):
            if torch.compiler.is_compiling():
                return original(*args, **kwargs)
            reached(model, "forward")
            return self.step({**dict(zip(names, args)), **kwargs} if args else kwargs)

        forward.graphed_steps = self
        model.forward = forward
        if self.refusal is None:
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
        self.state = None
        self.model = None  # caches that are still out do not come back

    def step(self, kwargs: dict):
        """A forward: replayed where it is a decode step that a graph can serve.

        Raises:
            RuntimeError: it has a cache under a name that we do not know.
        """
        name = cache_name_in(kwargs)
        if name is None:
            unknown = unknown_cache_in(kwargs)
            if unknown:
                raise did_not_hold(
                    self.model, ["graphs"], f"forward() got a cache as {unknown!r}, not {compat.CACHE_NAME!r}"
                )
            return self.original(**kwargs)
        tokens, cache = kwargs.get(self.names.tokens), halves(kwargs[name])[0]
        if tokens is None or tokens.dim() != 2 or torch.is_grad_enabled():
            return self.original(**kwargs)
        count, ours = tokens.shape[1], isinstance(cache, FlashCoreCache) and cache.ours
        if ours and cache.get_seq_length() == 0 or count > MOST_TOKENS:
            return self.prompt(kwargs, cache if ours and count > 1 else None)
        if count > 1 and not (ours and self.often(cache, count)):
            return self.original(**kwargs)
        step = self.reason_against(kwargs) or read_step(kwargs, name, self.names, self.config.model_type)
        if isinstance(step, Step):
            graph = self.graph_for(step)
            if not isinstance(graph, str):
                return graph.run(step)
            step = graph
        if count == 1:
            self.tell(step)
        return self.original(**kwargs)

    def prompt(self, kwargs: dict, cache: FlashCoreCache | None):
        """A forward that begins a text, or reads a long part of one; `cache` is one whose steps follow."""
        self.state.look()
        if cache is None or self.reason_against(kwargs) is not None:
            return self.original(**kwargs)
        # Steps are what a prompt is for: their kernels are compiled while its own are.
        with steps_follow(fp8=any(layer.fp8 for layer in cache.layers)):
            return self.original(**kwargs)

    def often(self, cache: FlashCoreCache, count: int) -> bool:
        """Whether calls of `count` tokens come again and again, as candidates do and a chat's next turn does not."""
        name = f"calls of {count} tokens"
        cache.graphs[name] = 1 + cache.graphs.get(name, 0)
        return cache.graphs[name] > BEFORE_RECORDING

    def reason_against(self, kwargs: dict) -> str | None:
        """Why no decode step of this model can be recorded now, or None."""
        if self.refusal is not None:
            return self.refusal
        if self.model.training:
            return "the model is in training mode"
        if self.config._attn_implementation != NAME:
            return f"the model runs '{self.config._attn_implementation}', not '{NAME}'"
        if kwargs.get("output_attentions") or getattr(self.config, "output_attentions", False):
            return "output_attentions asks for weights, which PyTorch computes"
        return None

    def graph_for(self, step: Step) -> DecodeGraph | str:
        """The graph that serves this call, recorded if need be; or why there is none."""
        graphs = step.cache.graphs
        tokens = step.inputs[step.names.tokens]
        if self.pads_source and "attention_mask" not in step.inputs:
            whole = torch.ones(tokens.shape[0], step.source_length, dtype=torch.bool, device=tokens.device)
            step.inputs["attention_mask"] = whole
        masks = (step.names.mask, "attention_mask" if self.pads_source else None)
        shapes = tuple((name, t.dtype, t.shape[:1] if name in masks else t.shape) for name, t in step.inputs.items())
        source_length = 0 if self.pads_source else step.source_length
        key = (shapes, source_length, tuple(step.constants.items()), _modes(tokens.device), self.state.current())
        graph = graphs.get(key)
        if isinstance(graph, DecodeGraph) and graph.ready(step):
            return graph
        for layer in step.layers:
            layer.reserve(tokens.shape[1])
        if isinstance(graph, DecodeGraph) and not (graph.current(step) and graph.holds(step)):
            # All that know the old buffers, and keep them: their memory is free before the next is recorded.
            graph = None
            for old in [old for old, each in graphs.items() if isinstance(each, DecodeGraph)]:
                if old == key or not graphs[old].current(step):
                    del graphs[old]
        if graph is None:
            recorded = [old for old in graphs if isinstance(old, tuple)]
            for old in recorded[: len(recorded) + 1 - MOST_GRAPHS]:
                del graphs[old]  # the oldest
            try:
                graph = DecodeGraph(self.original, step, self.pads_source)
            except Exception as error:  # noqa: BLE001 - whatever it is, the step runs without a graph
                graph = f"recording failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            graphs[key] = graph
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
        cache = converted(cache)
        own, source = parts = halves(cache)
        if not isinstance(own, FlashCoreCache) or self.refusal:
            return cache
        parts = [part for part in parts if part is not None]
        if not all(part.layers and part.ours for part in parts):
            return cache
        kind = (batch_size, *((layer.sliding_window, layer.max_length, layer.fp8) for layer in own.layers))
        with self.lock:
            kept = self.stock.pop(kind, None)
        if kept is not None:
            for part, layers in zip(parts, kept[0]):
                for old, new in zip(layers, part.layers):
                    old.reset()
                    old.record_past = new.record_past
                part.layers = layers
            own.graphs = kept[1]
        layers = [part.layers for part in parts]
        if source is not None:
            source.kept_with = own  # whoever keeps that of the source alone
        # A cache that lives on does not keep the model.
        weakref.finalize(own, partial(_give_back, weakref.ref(self), kind, layers, own.graphs)).atexit = False
        return cache


def _give_back(steps: weakref.ref, kind: tuple, layers: list[list], graphs: dict) -> None:
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
