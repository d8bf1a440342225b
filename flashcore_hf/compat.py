"""Everything that differs between Transformers versions, in this one room."""

import inspect
from typing import NamedTuple

import torch
import transformers
from transformers import PreTrainedModel, modeling_utils

try:
    from transformers import masking_utils
except ImportError:
    masking_utils = None

__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "CHANGES_ENCODER_DECODERS",
    "FORWARD_MAKES_CACHE",
    "HAS_INTERFACE",
    "VERSION",
    "MaskCall",
    "PreTrainedModel",
    "attention_registry",
    "batching_module",
    "continuous_batching",
    "crop_takes_length",
    "initialize_cache_layer",
    "mask_call",
    "mask_registry",
    "masking_utils",
    "require_cache_layers",
]

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# Whether a backend can register both its attention and its mask function (4.53 and newer). Before, models are changed
# one by one: see legacy.py.
HAS_INTERFACE = masking_utils is not None

# What a model's forward, generate() and a model's output call the cache: `cache` from 5.24 on.
_renamed = HAS_INTERFACE and "cache" in inspect.signature(masking_utils.create_causal_mask).parameters
CACHE_NAME = "cache" if _renamed else "past_key_values"
# And what it was called before: 5.24 still takes the old names, and so do models with code of their own.
CACHE_NAMES = tuple(dict.fromkeys((CACHE_NAME, "past_key_values", "cache_params")))
# Whether generate() leaves it to the first forward to make a DynamicCache: 5.0 does, 5.4 no longer.
FORWARD_MAKES_CACHE = (5, 0) <= VERSION < (5, 4)
# Whether an encoder-decoder can be given another cache: older ones read its length on the host, or make it in forward.
CHANGES_ENCODER_DECODERS = VERSION >= (5, 17)

if VERSION < (4, 40):
    raise ImportError(f"flashcore needs Transformers 4.40 or newer, and this is {transformers.__version__}")

# The newest version that the tests and the sweep over all architectures have run on.
NEWEST_TESTED = "5.24.0"


def untested_version() -> str | None:
    """The version of Transformers, where it is of a newer minor release than any that was tested; else None."""
    installed, tested = (tuple(map(int, v.split(".")[:2])) for v in (transformers.__version__, NEWEST_TESTED))
    return transformers.__version__ if installed > tested else None


def attention_registry() -> dict | None:
    """The class-level mapping from name to attention function, which every model's own view reads through.

    A plain dict before 4.51; None before 4.48, where models have attention classes instead.
    """
    if hasattr(modeling_utils, "AttentionInterface"):
        return modeling_utils.AttentionInterface._global_mapping
    return getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", None)


def mask_registry() -> dict | None:
    """The class-level mapping from name to mask function; None before 4.53."""
    return masking_utils.AttentionMaskInterface._global_mapping if HAS_INTERFACE else None


def continuous_batching() -> tuple[type, type] | None:
    """The mixin that gives models `init_continuous_batching`, through which every other way in leads, and the class of
    the managers that it makes; None before 4.53."""
    try:
        from transformers.generation import continuous_batching as module
    except ImportError:
        return None
    from transformers.generation.utils import GenerationMixin

    mixins = [base for base in GenerationMixin.__mro__ if "init_continuous_batching" in vars(base)]
    return (mixins[0], module.ContinuousBatchingManager) if mixins else None


def batching_module():
    """Transformers' package for continuous batching (5.17 and newer), its modules imported."""
    from transformers.generation import continuous_batching as package
    from transformers.generation.continuous_batching import input_outputs, model_runner  # noqa: F401

    return package


class MaskCall(NamedTuple):
    """What a mask function is asked, in one form for all versions.

    Attributes:
        batch_size, num_queries, num_keys: B, Q, K.
        query_start: key slot at which the first query stands: an int, or a 0-d int tensor where the cache keeps its
            length on the device. It may alias the cache's own counter, which this very forward advances.
        key_offset: position of key slot 0 (sliding caches drop old keys): an int or a 0-d tensor.
        key_mask: bool `[B, K]`, True where a key exists, or None.
        device: of the masks.
    """

    batch_size: int
    num_queries: int
    num_keys: int
    query_start: int | torch.Tensor
    key_offset: int | torch.Tensor
    key_mask: torch.Tensor | None
    device: torch.device


def mask_call(kwargs: dict) -> MaskCall:
    """Normalise the keywords of a mask function.

    Up to 5.0 a `cache_position` tensor `[Q]` says where the queries stand, from 5.4 on `q_length` and `q_offset`.
    """
    kv_length, kv_offset = kwargs["kv_length"], kwargs.get("kv_offset", 0)
    padding = kwargs.get("attention_mask")
    if "cache_position" in kwargs:
        positions = kwargs["cache_position"]
        num_queries, query_position, device = positions.shape[0], positions[0], positions.device
    else:
        num_queries, query_position = kwargs["q_length"], kwargs.get("q_offset", 0)
        device = kwargs.get("device") or (padding.device if padding is not None else torch.device("cpu"))
    return MaskCall(
        kwargs["batch_size"],
        num_queries,
        kv_length,
        query_position - kv_offset,
        kv_offset,
        None if padding is None else _key_mask(padding, kv_length, kv_offset, device),
        device,
    )


def _key_mask(padding: torch.Tensor, kv_length: int, kv_offset: int | torch.Tensor, device) -> torch.Tensor:
    """The part of a 2-D padding mask `[B, positions]` that belongs to the K key slots; slots beyond it do not exist."""
    padding = padding.to(device=device, dtype=torch.bool)
    if isinstance(kv_offset, torch.Tensor):
        slots = torch.arange(kv_length, device=device) + kv_offset.to(device)
        padding = torch.nn.functional.pad(padding, (0, kv_length))  # at least as long as any slot asks
        return padding[:, slots.clamp(max=padding.shape[1] - 1)]
    missing = kv_length + kv_offset - padding.shape[1]
    if missing > 0:
        padding = torch.nn.functional.pad(padding, (0, missing))
    return padding[:, kv_offset : kv_offset + kv_length]


def require_cache_layers() -> None:
    """Raise where a cache is not a list of layers that one can supply."""
    if VERSION < (4, 57):
        raise ImportError(
            f"FlashCoreCache needs Transformers 4.57 or newer, and this is {transformers.__version__}; "
            "its own caches work with flashcore as they are"
        )


def crop_takes_length() -> bool:
    """Whether a cache's `crop` is given the tokens that stay (up to 5.4), or a negative number of those to remove."""
    return "tokens_to_remove" not in inspect.signature(transformers.DynamicCache.crop).parameters


def initialize_cache_layer(layer, keys: torch.Tensor, values: torch.Tensor) -> None:
    """`lazy_initialization` of a cache layer, which up to 4.57 takes the keys alone."""
    if len(inspect.signature(layer.lazy_initialization).parameters) == 1:
        layer.lazy_initialization(keys)
    else:
        layer.lazy_initialization(keys, values)
