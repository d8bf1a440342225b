"""attention_with_kv_cache: the cache-level call, for those without Transformers."""

import copy

import torch

from ..key_range import make_key_range
from ..op import attention
from ..problem import Problem, Window, check_problem, split_arguments

_FIRST_CAPACITY = 256


class KVCache:
    """Keys and values of past tokens in preallocated buffers, with a length for each sequence.

    Attributes:
        key, value: buffers `[B, Hkv, capacity, D]` and `[B, Hkv, capacity, Dv]`; slots from a sequence's length on are
            unfilled, and may hold anything.
        lengths: int32 `[B]` on the device: tokens that each sequence holds.
        longest: upper bound of `lengths`, kept on the host so that no check needs a synchronisation.
        max_length: slots at most; None lets the buffers double when they are full.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        """Allocate an empty cache. With `max_length` all of its slots at once, else a first few.

        Raises:
            ValueError: a size is below 1.
        """
        value_dim = head_dim if value_dim is None else value_dim
        sizes = {"batch_size": batch_size, "num_kv_heads": num_kv_heads, "head_dim": head_dim, "value_dim": value_dim}
        for name, size in {**sizes, "max_length": max_length}.items():
            if size is not None and size < 1:
                raise ValueError(f"{name}: got {size}; at least 1 is needed")
        capacity = _FIRST_CAPACITY if max_length is None else max_length
        self.max_length = max_length
        self.key = torch.zeros(batch_size, num_kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.value = torch.zeros(batch_size, num_kv_heads, capacity, value_dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self.longest = 0
        self._equal = True  # all sequences hold `longest` tokens, known without reading `lengths`

    @property
    def capacity(self) -> int:
        """Slots that are allocated now."""
        return self.key.shape[2]

    def reset(self) -> None:
        """Forget every token; the buffers stay."""
        self.lengths.zero_()
        self.longest = 0
        self._equal = True

    def _check(self, key: torch.Tensor, value: torch.Tensor) -> None:
        for name, new, held in (("key", key, self.key), ("value", value, self.value)):
            if new.dim() != 4 or (new.shape[0], new.shape[1], new.shape[3]) != (
                held.shape[0], held.shape[1], held.shape[3],
            ):  # fmt: skip
                raise ValueError(
                    f"{name} shape: got {list(new.shape)}; this cache holds [batch, heads, any length, dim] = "
                    f"{[held.shape[0], held.shape[1], 'n', held.shape[3]]} (a cache of another model?)"
                )
            if new.dtype != held.dtype or new.device != held.device:
                raise ValueError(
                    f"{name}: got {new.dtype} on {new.device}; this cache holds {held.dtype} on {held.device}"
                )

    def _reserve(self, count: int) -> None:
        """Make room for `count` more tokens in every sequence, or raise before anything has changed."""
        needed = self.longest + count
        if needed <= self.capacity:
            return
        if self.max_length is not None:
            raise ValueError(
                f"the KV cache would overflow: it holds up to {self.longest} tokens a sequence and has "
                f"max_length={self.max_length}, and {count} more were given. Nothing was written. Make the cache "
                "larger, give fewer tokens, or reset() it"
            )
        capacity = max(needed, 2 * self.capacity)
        self.key, self.value = (_grown(buffer, self.longest, capacity) for buffer in (self.key, self.value))

    def _with_room(self, count: int) -> "KVCache":
        """This cache where it has room for `count` more tokens, else a larger copy of it."""
        if self.longest + count <= self.capacity:
            return self
        larger = copy.copy(self)
        larger.max_length = None
        return larger

    def _write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Put the new tokens into each sequence's next slots, without changing its length."""
        count = key.shape[2]
        if self._equal:
            slots = slice(self.longest, self.longest + count)
            self.key[:, :, slots] = key
            self.value[:, :, slots] = value
            return
        slots = self.lengths[:, None] + torch.arange(count, device=key.device)  # [B, S]
        slots = slots.to(torch.int64)[:, None, :, None]
        self.key.scatter_(2, slots.expand_as(key), key)
        self.value.scatter_(2, slots.expand_as(value), value)

    def _advance(self, count: int, new_lengths: torch.Tensor | None) -> None:
        if new_lengths is None:
            self.lengths += count
        else:
            self.lengths += new_lengths
            self._equal = False
        self.longest += count


def _grown(buffer: torch.Tensor, filled: int, capacity: int) -> torch.Tensor:
    larger = torch.zeros(*buffer.shape[:2], capacity, buffer.shape[3], dtype=buffer.dtype, device=buffer.device)
    larger[:, :, :filled] = buffer[:, :, :filled]
    return larger


def attention_with_kv_cache(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    past_key_value: KVCache | None = None,
    *,
    is_causal: bool = True,
    update_cache: bool = True,
    new_lengths: torch.Tensor | None = None,
    max_length: int | None = None,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor | tuple[torch.Tensor, torch.Tensor], KVCache | None]:
    """Append new keys and values to a cache, and attend to all that it then holds.

    The queries are the new tokens: query i of sequence b stands at slot lengths[b] + i (lengths before the call).

    Args:
        query: `[B, H, S, D]`.
        key, value: `[B, Hkv, S, D]` and `[B, Hkv, S, Dv]`, already rotated; or both None, to attend to the cache alone
            (the queries then are its last tokens).
        past_key_value: the cache; None makes one at the first call.
        is_causal: each query sees keys up to its own slot; False: every key that the sequence holds.
        update_cache: False leaves the cache as it was: the new tokens are seen by this call alone.
        new_lengths: int `[B]` on query's device: how many of the S new tokens of each sequence are real, the rest being
            right padding. Outputs at padding queries mean nothing.
        max_length: for the cache made at the first call: its slots at most. None: it grows by doubling.
        window, scale, softcap, sinks, return_lse: as in `attention`.

    Returns:
        (output `[B, H, S, Dv]`, cache), or ((output, lse `[B, H, S]`), cache) with return_lse. The cache is the same
        object as was given; None where there was none and update_cache is False.

    Raises:
        ValueError: an argument does not fit the others or the cache; or the cache would overflow. Both before anything
            is written: the cache stays usable as it was.
    """
    if (key is None) != (value is None):
        raise ValueError("key and value: one is None; give both, or neither to attend to the cache alone")
    if new_lengths is not None and tuple(new_lengths.shape) != (query.shape[0],):
        raise ValueError(f"new_lengths shape: got {list(new_lengths.shape)}; one count a sequence, [{query.shape[0]}]")
    options = {"is_causal": is_causal, "window": window, "scale": scale, "softcap": softcap, "sinks": sinks}
    cache = past_key_value
    if key is None:
        if cache is None or cache.longest == 0:
            raise ValueError("key and value are None and the cache holds nothing: there is nothing to attend to")
        return _attend(query, cache, 0, None, options, return_lse), cache

    problem = _checked(query, key, value, options)  # before anything is made or written
    if problem.num_queries != problem.num_keys:
        raise ValueError(
            f"length of query and key: got {[problem.num_queries, problem.num_keys]}; the queries are the new tokens, "
            "so both must be equal"
        )
    if cache is None:
        cache = KVCache(
            problem.batch_size, problem.num_kv_heads, problem.head_dim, value_dim=problem.value_dim,
            max_length=max_length if update_cache else problem.num_keys, dtype=key.dtype, device=key.device,
        )  # fmt: skip
    cache._check(key, value)
    target = cache if update_cache else cache._with_room(problem.num_keys)
    target._reserve(problem.num_keys)
    target._write(key, value)
    output = _attend(query, target, problem.num_keys, new_lengths, options, return_lse)
    if update_cache:
        cache._advance(problem.num_keys, new_lengths)
    return output, (cache if update_cache else past_key_value)


def _checked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: dict) -> Problem:
    inputs, options = split_arguments(query, key, value, **options)
    return check_problem(inputs, **options)


def _attend(
    query: torch.Tensor, cache: KVCache, new: int, new_lengths: torch.Tensor | None, options: dict, return_lse: bool
):
    """Attention of `query` to the cache's tokens and to `new` more that stand behind them."""
    total = cache.longest + new
    key, value = cache.key[:, :, :total], cache.value[:, :, :total]
    if cache._equal and new_lengths is None:
        return attention(query, key, value, return_lse=return_lse, **options)
    # Read before the lengths advance: a KeyRange never aliases them.
    end = cache.lengths + (new if new_lengths is None else new_lengths)
    problem = _checked(query, key, value, options)
    key_range = make_key_range(
        query.shape[0], total, end=end, query_start=cache.lengths if new else end - query.shape[2],
        left=problem.left, right=problem.right,
    )  # fmt: skip
    options = {name: option for name, option in options.items() if name not in ("is_causal", "window")}
    return attention(query, key, value, key_range=key_range, return_lse=return_lse, **options)
