"""KeyRange: the small int32 tensor that says which keys each query sees.

A `[Q, K]` mask costs memory and a pass over it in every layer. Almost everything that models ask for can be said in a
few numbers per sequence instead, and the kernels read those numbers from device memory, so that nothing on the host
depends on lengths (one CUDA graph serves every length).

Two layouts, both 4-D, so that Transformers hands them through untouched where it expects a mask:

`sequence`, `[B, 1, 2 + unused, 6 + ceil(K / 32)]`, one line of words for each sequence:

    FIRST         first key slot that exists (left padding ends here)
    END           one past the last key slot that exists (right padding or unfilled slots begin here)
    QUERY_START   key slot at which the first query stands; query i stands at QUERY_START + i
    LEFT          a query at slot p sees no key before p - LEFT; -1: no such limit
    RIGHT         ... and no key after p + RIGHT; -1: no such limit. Causal attention is RIGHT = 0
    HOLES         0, or 1 where [FIRST, END) has holes; only then is the bitmap read
    bitmap        bit k % 32 of word k / 32 is 1 where key k exists

`rows`, `[B, 1, Q + K, 2]`, a pair (first, end) for each query: query i sees keys [first, end). Packed sequences,
chunked attention and blocks of image tokens are of this form. The K lines behind the queries' hold nothing.

The shape says for how many keys a KeyRange was made, so that a layer with another number refuses it: nothing is read
from the device for that, and no copy loses it. In the `sequence` layout `unused` counts the bits of the bitmap that
stand for no key, K = 32 * (width - 6) - unused, and the third dimension repeats the one line with stride 0. It is never
1, so that torch.compile does not look at numbers of keys that are multiples of 32 apart from others.

A mask that a user made could be int32 and 4-D too. The width is chosen so that it can be neither 1 nor K (one word of
slack is added where it would be K), so no KeyRange has the shape of a mask that broadcasts to `[B, H, Q, K]`.
"""

import torch

FIRST, END, QUERY_START, LEFT, RIGHT, HOLES, HEADER_WORDS = range(7)
ROW_WORDS = 2
UNLIMITED = -1
# Further than any two keys are apart. Larger distances mean the same, and would overflow an int32 when added to a slot.
FARTHEST = 1 << 29


def sequence_width(num_keys: int) -> int:
    """Words in a line of the `sequence` layout for `num_keys` key slots."""
    width = HEADER_WORDS + (num_keys + 31) // 32
    return width + _one_if_equal(width, num_keys)


def sequence_shape(batch_size: int, num_keys: int) -> tuple[int, int, int, int]:
    """Shape of a KeyRange of the `sequence` layout."""
    words = HEADER_WORDS + (num_keys + 31) // 32
    slack = _one_if_equal(words, num_keys)
    # The bits behind the last key's in its word, which are -K modulo 32, and those of the word of slack: a sum without
    # a minus, in which a compiler sees at once that no size is negative.
    unused = 31 * num_keys % 32 + 32 * slack
    return batch_size, 1, 2 + unused, words + slack


def as_key_range(words: torch.Tensor, num_keys: int) -> torch.Tensor:
    """A view of the lines of words `[B, sequence_width(K)]` that has the shape of a KeyRange."""
    return words[:, None, None].expand(sequence_shape(words.shape[0], num_keys))


def rows_width(num_keys: int) -> int:
    """Words in a line of the `rows` layout for `num_keys` key slots."""
    return ROW_WORDS + _one_if_equal(ROW_WORDS, num_keys)


def _one_if_equal(a: int, b: int) -> int:
    """1 or 0; traced not by a comparison, which would tie an exported graph to lengths with the same answer."""
    if torch.compiler.is_compiling():
        return torch.sym_max(0, 1 - (a - b) * (a - b))
    return int(a == b)


def rows_shape(batch_size: int, num_queries: int, num_keys: int) -> tuple[int, int, int, int]:
    """Shape of a KeyRange of the `rows` layout."""
    return batch_size, 1, num_queries + num_keys, rows_width(num_keys)


def make_key_range(
    batch_size: int,
    num_keys: int,
    *,
    first: int | torch.Tensor = 0,
    end: int | torch.Tensor | None = None,
    query_start: int | torch.Tensor = 0,
    left: int = UNLIMITED,
    right: int = UNLIMITED,
    key_mask: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Build a KeyRange of the `sequence` layout, on the device, without a synchronisation.

    Args:
        batch_size: B, the number of sequences.
        num_keys: K, the number of key slots that the key tensor has.
        first, end: keys [first, end) exist: an int, or an int tensor of shape `[]`, `[1]` or `[B]`; `end=None` is K.
        query_start: key slot at which the first query stands, like `first`.
        left, right: how far a query sees to each side of where it stands, in keys; -1 is without limit.
        key_mask: bool `[B, K]`, True where a key exists. Intersected with [first, end); may have holes.
        device: where to build; by default that of the first tensor argument, else CPU.

    Returns:
        int32 of shape `sequence_shape(B, K)`, freshly allocated: it never aliases an argument. A CUDA graph's is
        overwritten in its first line, `key_range[:, :, :1]`, which the others of the third dimension repeat.

    Raises:
        ValueError: `key_mask` has another shape, or `left`/`right` is below -1.
    """
    if left < UNLIMITED or right < UNLIMITED:
        raise ValueError(f"left and right count keys from 0, or are -1 for no limit; got left={left}, right={right}")
    if key_mask is not None and tuple(key_mask.shape) != (batch_size, num_keys):
        raise ValueError(f"key_mask must be [B, K] = {[batch_size, num_keys]}, got {list(key_mask.shape)}")
    if device is None:
        tensors = [t for t in (key_mask, first, end, query_start) if isinstance(t, torch.Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")

    words = torch.zeros(batch_size, sequence_width(num_keys), dtype=torch.int32, device=device)
    words[:, FIRST] = first
    words[:, END] = num_keys if end is None else end
    words[:, QUERY_START] = query_start
    words[:, LEFT] = min(left, FARTHEST)
    words[:, RIGHT] = min(right, FARTHEST)
    if key_mask is not None:
        _write_key_mask(words, key_mask.to(device=device, dtype=torch.bool))
    return as_key_range(words, num_keys)


def _write_key_mask(words: torch.Tensor, key_mask: torch.Tensor) -> None:
    """Narrow [FIRST, END) to the keys of `key_mask` (bool `[B, K]`), and write the bitmap and the HOLES flag."""
    num_keys = key_mask.shape[1]
    slot = torch.arange(num_keys, dtype=torch.int32, device=words.device)
    exists = key_mask & (slot >= words[:, FIRST, None]) & (slot < words[:, END, None])  # [B, K]
    count = exists.sum(-1, dtype=torch.int32)
    # With no key at all, first = K and end = 0 say so by themselves.
    first = torch.where(exists, slot, num_keys).amin(-1)
    end = torch.where(exists, slot + 1, 0).amax(-1)
    words[:, FIRST] = first
    words[:, END] = end
    words[:, HOLES] = ((count > 0) & (count != end - first)).to(torch.int32)

    # Of every word of a line, the header's too, the keys that its bits stand for: taken like this, and not cut into
    # words, no size is compared with another, and an exported graph holds for every number of keys.
    bit = torch.arange(32, device=words.device)
    key = (torch.arange(words.shape[1], device=words.device) - HEADER_WORDS)[:, None] * 32 + bit  # [W, 32]
    bits = exists[:, key.clamp(0, num_keys - 1)] & (key >= 0) & (key < num_keys)  # [B, W, 32]
    # Each bit occurs once, so an int32 sum is an OR; bit 31 is the sign.
    words += torch.bitwise_left_shift(bits.to(torch.int32), bit.to(torch.int32)).sum(-1, dtype=torch.int32)


def make_row_ranges(first: torch.Tensor, end: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Build a KeyRange of the `rows` layout: query i of sequence b sees keys [first[b, i], end[b, i]).

    Args:
        first, end: int tensors `[B, Q]` on one device.
        num_keys: K.

    Returns:
        int32 of shape `rows_shape(B, Q, K)`.
    """
    if first.shape != end.shape or first.dim() != 2:
        raise ValueError(f"first and end must both be [B, Q], got {list(first.shape)} and {list(end.shape)}")
    batch_size, num_queries = first.shape
    rows = torch.zeros(rows_shape(batch_size, num_queries, num_keys), dtype=torch.int32, device=first.device)
    rows[:, 0, :num_queries, 0] = first
    rows[:, 0, :num_queries, 1] = end
    return rows


def layout_of(key_range: torch.Tensor, batch_size: int, num_queries: int, num_keys: int) -> str:
    """Tell by its shape which layout `key_range` has for a `[B, H, Q, K]` problem: "sequence" or "rows".

    Raises:
        ValueError: it was made for another number of keys, or is no KeyRange for such a problem, for instance a mask
            that is int32.
    """
    shape = tuple(key_range.shape)
    sequence = sequence_shape(batch_size, num_keys)
    rows = rows_shape(batch_size, num_queries, num_keys)
    if key_range.dtype != torch.int32:
        raise ValueError(f"key_range must be int32, got {key_range.dtype}")
    if shape == sequence:
        return "sequence"
    if shape == rows:
        return "rows"
    made_for = _made_for(shape, batch_size, num_queries)
    if made_for is not None and shape[3] != num_keys:
        raise ValueError(
            f"this KeyRange was made for {made_for} keys, and the layer that got it has {num_keys}. Make one for each "
            "number of keys. In a model whose cache keeps more tokens in some layers than in others (one that evicts "
            "tokens), no one mask fits all layers: call the model one token at a time and without attention_mask, "
            "which needs a batch without padding and Transformers 5.4; then every layer sees all of its keys."
        )
    raise ValueError(
        f"an int32 mask is taken for a KeyRange, and for {batch_size} sequences, {num_queries} queries and {num_keys} "
        f"keys its shape is {list(sequence)} (a line a sequence) or {list(rows)} (a line a query), got {list(shape)}"
        f"{'' if made_for is None else f' (that of one made for {made_for} keys)'}. "
        "For a mask of your own use bool (True: may attend) or an additive float tensor."
    )


def _made_for(shape: tuple[int, ...], batch_size: int, num_queries: int) -> int | None:
    """For how many keys a KeyRange of this shape was made; None where it is none for such sequences and queries."""
    if len(shape) != 4:
        return None
    for num_keys in (32 * (shape[3] - HEADER_WORDS) - (shape[2] - 2), shape[2] - num_queries):
        if num_keys >= 1 and shape in (
            sequence_shape(batch_size, num_keys),
            rows_shape(batch_size, num_queries, num_keys),
        ):
            return num_keys
    return None


def visible(key_range: torch.Tensor, num_queries: int, num_keys: int) -> torch.Tensor:
    """The dense mask that a KeyRange stands for: bool `[B, 1, Q, K]`, True where the query sees the key.

    This is the definition that the kernels are tested against; it costs what they avoid.
    """
    layout = layout_of(key_range, key_range.shape[0], num_queries, num_keys)
    slot = torch.arange(num_keys, dtype=torch.int32, device=key_range.device)  # [K]
    if layout == "rows":
        lines = key_range[:, :, :num_queries]
        return (slot >= lines[..., 0, None]) & (slot < lines[..., 1, None])  # [B, 1, Q, K]

    words = key_range[:, 0, 0]  # [B, W]
    query = words[:, QUERY_START, None] + torch.arange(num_queries, dtype=torch.int32, device=key_range.device)
    exists = (slot >= words[:, FIRST, None]) & (slot < words[:, END, None])  # [B, K]
    # ONNX takes int64 indices, and knows a shift by this name, not as >>.
    word = words[:, HEADER_WORDS + torch.div(slot, 32, rounding_mode="floor").to(torch.int64)]
    bits = torch.bitwise_right_shift(word, slot % 32)
    exists = exists & ((words[:, HOLES, None] == 0) | ((bits & 1) == 1))
    left, right = words[:, LEFT, None, None], words[:, RIGHT, None, None]
    distance = slot[None, None, :] - query[:, :, None]  # [B, Q, K]
    near = ((left < 0) | (distance >= -left)) & ((right < 0) | (distance <= right))
    return (near & exists[:, None, :])[:, None]
