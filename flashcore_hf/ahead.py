"""What a batch processor is going to ask of attention, said ahead, so that its kernels are compiled meanwhile.

Kernels depend on how many sequences a batch of single tokens has. The first answer waits for those of two batches: a
mixed one, and single tokens of as many requests as a batch may have.
"""

import functools
from collections.abc import Callable, Hashable

import torch
from flashcore_kernels import Ahead, Pages

from .pages import PagedCall, attend_pages

MIXED = "mixed"


def begin_compiling_batches(model, layers: dict, io, most_tokens: int) -> Ahead:
    """Compile in the background what the batches of a batch processor launch.

    Args:
        layers: layer -> (its group's number, K pages, V pages, layer type, ring).
        io: the tensors of a batch, with their block tables.
        most_tokens: of a batch.

    Returns:
        An Ahead with the names MIXED and, for batches of single tokens, how many sequences these have.
    """
    kinds = {(group, key.shape, key.stride(), ring): layer for layer, (group, key, _, _, ring) in layers.items()}
    chosen = [(_attention_of(model, layer), layers[layer]) for layer in kinds.values()]
    most = io.max_requests_per_batch
    first: dict[Hashable, Callable] = {
        name: functools.partial(_attend_on_meta, chosen, io, tokens, single)
        for name, tokens, single in ((most, most, True), (MIXED, most_tokens, False))
    }
    later = {size: functools.partial(_attend_on_meta, chosen, io, size, True) for size in sizes_below(most)}
    return Ahead(next(iter(layers.values()))[1].device, first, later)


def sizes_below(most: int) -> list[int]:
    """Numbers of sequences that batches of single tokens are padded to, the largest first, but for `most` itself."""
    return [1 << power for power in reversed(range((most - 1).bit_length()))]


def _attention_of(model, layer: int):
    """The attention of a decoder's layer; None where it does not look as usual."""
    for module in model.modules():
        if getattr(module, "layer_idx", None) == layer and getattr(module, "is_causal", False):
            return module
    return None


def _attend_on_meta(chosen: list[tuple], io, tokens: int, single: bool) -> None:
    """Attention of a layer of each kind, in a batch of so many tokens, on meta tensors."""
    sequences = min(tokens, io.max_requests_per_batch)
    for module, (group, key_pages, value_pages, _, ring) in chosen:
        config = module.config
        groups = config.num_attention_heads // config.num_key_value_heads
        kv_heads = key_pages.shape[2]  # of this GPU's share

        def token(heads: int, like: torch.Tensor) -> torch.Tensor:  # as layers make it: heads inside of the sequence
            return like.new_empty(1, tokens, heads, like.shape[3], device="meta").transpose(1, 2)

        table, lengths = io.block_table[group][:sequences], io.cumulative_seqlens_q[: sequences + 1]
        pages = Pages(*map(_on_meta, (key_pages, value_pages, table, lengths, lengths)), ring)
        sinks = getattr(module, "sinks", None)
        attend_pages(
            token(kv_heads * groups, key_pages), token(kv_heads, key_pages), token(kv_heads, value_pages),
            PagedCall(pages, single), causal=True,
            sliding_window=getattr(module, "sliding_window", None) or ring or None,
            scaling=getattr(module, "scaling", None), softcap=getattr(module, "attn_logit_softcapping", None),
            sinks=None if sinks is None else _on_meta(sinks),
        )  # fmt: skip


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
