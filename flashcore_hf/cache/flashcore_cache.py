"""FlashCoreCache: keys and values in preallocated buffers that double when they are full, and are never concatenated.

A `DynamicCache` copies the whole cache twice in every layer at every token. Here a token is written once, into the next
slot, and attention gets a view of the filled slots. Buffers keep their addresses until they grow, which is what CUDA
graphs need (see `graphs`).
"""

from contextlib import contextmanager
from functools import partial

import torch

from ..compat import initialize_cache_layer
from .layer import DevicePosition, FlashCoreLayer  # first: it says so where Transformers is too old

# isort: split
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


class FlashCoreCache(Cache):
    """A key-value cache for `generate()` and forward: preallocated, doubling, the default DynamicCache's tokens.

    ```python
    cache = FlashCoreCache(model.config)
    model.generate(**inputs, cache=cache)  # before Transformers 5.24: past_key_values=cache
    ```

    Layers follow the model's config: full, or sliding ones that hold about two windows. Layers of other kinds (linear
    attention) are those of a DynamicCache. Under "flashcore" attention the views cost nothing; other backends may copy
    them. For inference: gradients are refused.

    Args:
        config: the model's configuration; of a composite model, its text decoder's is used.
        max_length: tokens at most, allocated at once; more raise a ValueError before anything is written. None: no
            limit, the buffers double.
        dtype: None: the model's. `torch.float8_e4m3fn`: half of bf16's memory; each sequence's heads get a scale from
            their first tokens, and only "flashcore" attention can read it.

    Raises:
        ImportError: Transformers before 4.57 (when the module is imported).
        ValueError: another dtype, or a max_length below 1.
    """

    def __init__(self, config, *, max_length: int | None = None, dtype: torch.dtype | None = None):
        self._take(DynamicCache(config=config.get_text_config(decoder=True)), max_length, dtype)

    def _take(self, dynamic: DynamicCache, max_length: int | None, dtype: torch.dtype | None) -> None:
        """Become like `dynamic`, without its tokens."""
        if dtype not in (None, torch.float8_e4m3fn):
            raise ValueError(f"dtype: got {dtype}; None (the model's) or torch.float8_e4m3fn are supported")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: got {max_length}; at least 1 is needed, or None for no limit")
        options = {"max_length": max_length, "dtype": dtype}
        layers = [_like(layer, options) for layer in dynamic.layers]
        if layers:
            super().__init__(layers=layers)
        else:
            super().__init__(layer_class_to_replicate=partial(FlashCoreLayer, **options))
        self.graphs = {}  # of `graphs`: what was recorded on these buffers

    @classmethod
    def like(
        cls, dynamic: DynamicCache, *, max_length: int | None = None, dtype: torch.dtype | None = None
    ) -> "FlashCoreCache":
        """An empty cache with the layers of `dynamic`."""
        cache = cls.__new__(cls)
        cache._take(dynamic, max_length, dtype)
        return cache

    @classmethod
    def from_dynamic(
        cls, dynamic: DynamicCache, *, max_length: int | None = None, dtype: torch.dtype | None = None
    ) -> "FlashCoreCache":
        """A copy of `dynamic` with its tokens, in buffers of its own.

        Raises:
            ValueError: it holds more than max_length tokens, or its layers are of a kind that cannot be copied.
        """
        cache = cls.like(dynamic, max_length=max_length, dtype=dtype)
        for layer, source in zip(cache.layers, dynamic.layers):
            if layer is source:
                raise ValueError(f"a {type(source).__name__} cannot be copied; begin with FlashCoreCache(config)")
            if source.get_seq_length() > 0:
                layer.load(source.keys, source.values, source.get_seq_length())
        return cache

    def to_dynamic(self) -> DynamicCache:
        """A DynamicCache with copies of the tokens, in the model's dtype.

        Raises:
            ValueError: a layer is of a kind that cannot be copied.
        """
        dynamic = DynamicCache()
        for layer in self.layers:
            if not isinstance(layer, FlashCoreLayer):
                raise ValueError(f"a {type(layer).__name__} cannot be copied")
            other = DynamicSlidingWindowLayer(layer.sliding_window) if layer.is_sliding else DynamicLayer()
            if layer.length > 0:
                keys, values = layer.copied()
                initialize_cache_layer(other, keys, values)
                other.keys, other.values = keys, values
            if layer.is_sliding:
                other.cumulative_length = layer.length
            dynamic.layers.append(other)
        dynamic.layer_class_to_replicate = None if self.layers else DynamicLayer
        return dynamic

    @property
    def ours(self) -> bool:
        """Whether every layer is a FlashCoreLayer."""
        return all(isinstance(layer, FlashCoreLayer) for layer in self.layers)

    @property
    def filled_layers(self) -> list[FlashCoreLayer]:
        """The layers that have buffers: a cache may have more than its model uses, as distil-whisper's has."""
        return [layer for layer in self.layers if layer.is_initialized]

    @property
    def unused(self) -> bool:
        """Whether a FlashCoreLayer should have got tokens by now, and none has."""
        lengths = [layer.length for layer in self.layers if isinstance(layer, FlashCoreLayer)]
        return not any(lengths) and (bool(lengths) or not self.layers)

    def __getstate__(self) -> dict:
        """Without graphs, which belong to these very buffers."""
        return {**vars(self), "graphs": {}}

    @contextmanager
    def on_device(self, positions: dict[int | None, DevicePosition]):
        """While this holds, layers read where the next token goes from `positions`, window -> DevicePosition."""
        try:
            for layer in self.layers:
                layer.device_position = positions[layer.sliding_window]
            yield
        finally:
            for layer in self.layers:
                layer.device_position = None

    @contextmanager
    def showing_all(self):
        """While this holds, layers show every slot, filled or not: whoever reads them has a mask that knows."""
        layers = self.filled_layers
        lengths = [layer.length for layer in layers]
        try:
            for layer in layers:
                layer.length = layer.capacity
            yield
        finally:
            for layer, length in zip(layers, lengths):
                layer.length = length


def _like(layer: CacheLayerMixin, options: dict) -> CacheLayerMixin:
    """Our layer for one of a DynamicCache's; kinds that are not plain attention stay what they are."""
    if type(layer) is DynamicLayer:
        return FlashCoreLayer(**options)
    if type(layer) is DynamicSlidingWindowLayer:
        ours = FlashCoreLayer(layer.sliding_window, **options)
        ours.record_past = getattr(layer, "record_past", False)
        return ours
    return layer
