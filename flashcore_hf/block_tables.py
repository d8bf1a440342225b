"""Block tables of continuous batching's batches: always filled, and a line only where its pages are others.

Transformers asks for a tensor of each request's line, and writes all of its entries in every step. For 192 requests
that took 4 of the 10 ms that the host was busy between two steps, and a list of all tokens that a batch may have 1.5.
"""

import functools
from collections import Counter

import torch


class LinesOf:
    """What a group of layers writes into a line of its table.

    Args:
        group: that allocates pages for a group of layers.
        number: of its table.
    """

    def __init__(self, group, number: int):
        self.group, self.number = group, getattr(group, "index", number)
        # A block of 5.23 and later holds a page for each layer of the group; layers' own pages are that far apart.
        physical = hasattr(group, "block_physical_stride")
        self.step = group.block_physical_stride // group.tokens_per_page if physical else 1


class _Numbers:
    """Stands for the tables while a batch is laid out: what Transformers takes of them for a request is its number."""

    def __init__(self, io, tables: torch.Tensor):
        self.io, self.tables = io, tables
        self.arrays = tables.numpy() if tables.device.type == "cpu" else None

    def numel(self) -> int:
        return self.tables.numel()

    def __getitem__(self, index: tuple[slice, int]) -> tuple["_Numbers", int]:
        return self, index[1]


def fill_lines(
    groups: list[LinesOf], request_id: str, past_length: int, query_length: int, block_table: tuple[_Numbers, int]
) -> None:
    """A request's line of each group's table; in place of the cache's fill_block_table.

    Raises:
        ValueError: the request has more tokens than a line has room for.
    """
    numbers, line = block_table
    for group in groups:
        blocks, kept = group.group.block_table[request_id], numbers.io.flashcore_lines[group.number]
        if kept[line] == blocks:
            continue
        if len(blocks) > numbers.tables.shape[2]:
            raise ValueError(
                f"request {request_id} has {past_length + query_length} tokens, more than four times the model's "
                "max_position_embeddings"
            )
        entries = [block * group.step for block in blocks]
        if numbers.arrays is not None:
            numbers.arrays[group.number, line, : len(entries)] = entries  # a third of the time that a tensor takes
        else:
            numbers.tables[group.number, line, : len(entries)] = torch.tensor(entries, dtype=torch.int32)
        kept[line] = list(blocks)


class _Tables:
    """Mixed into the class that prepares a batch's tensors: it always fills block tables.

    Attributes:
        flashcore_single: every request in the batch has one new token.
        flashcore_lines: a list for each group of layers: the pages that each line of its table has.
        flashcore_mixed: how often there was a mixed batch of a number of tokens.
    """

    flashcore_single = False
    flashcore_lines: list[list[list[int]]]
    flashcore_mixed: Counter

    def prepare_batch_tensors(
        self, requests_in_batch, logits_processors, use_decode_fast_path, num_q_tokens, max_kv_read, use_padding
    ):
        self.flashcore_single = use_decode_fast_path
        table, self.block_table = self.block_table, _Numbers(self, self.block_table)
        try:
            return super().prepare_batch_tensors(
                requests_in_batch, logits_processors, True, num_q_tokens, max_kv_read, use_padding
            )
        finally:
            self.block_table = table

    def _reset_static_tensors(self, full_reset=False):
        # What is left of an earlier batch lies past the lengths of this one, where nobody reads.
        table, self.block_table = self.block_table, torch.empty(0, 0, 0, dtype=torch.int32)
        try:
            super()._reset_static_tensors(full_reset)
        finally:
            self.block_table = table

    def get_model_kwargs(self, use_padding=False):
        kwargs = super().get_model_kwargs(use_padding=use_padding)
        if not self.flashcore_single:
            name = "max_length_q" if "max_length_q" in kwargs else "max_seqlen_q"
            kwargs[name] = max(self.num_q_tokens, 2)
        return kwargs

    def _transfer_inputs(self, other, stream, non_blocking=False):
        other.flashcore_single = self.flashcore_single
        # Of the tables, the lines that this batch has; they are long.
        tables, others = self.block_table, other.block_table
        lines = min(self.num_q_tokens, self.max_requests_per_batch)
        self.block_table, other.block_table = tables[:0], others[:0]
        try:
            super()._transfer_inputs(other, stream, non_blocking)
        finally:
            self.block_table, other.block_table = tables, others
        with torch.cuda.stream(stream):
            for here, there in zip(tables, others):
                there[:lines].copy_(here[:lines], non_blocking=non_blocking)

    def _get_graph_key(self):
        return (self.flashcore_single, *super()._get_graph_key())


@functools.cache
def _with_tables(kind: type) -> type:
    return type(f"Flashcore{kind.__name__}", (_Tables, kind), {})


def take_over_io(io, num_groups: int, width: int) -> None:
    """Let the tensors of a batch have tables of `width` pages a line for each group of layers."""
    io.__class__ = _with_tables(type(io))
    lines, like = io.max_requests_per_batch, io.block_table
    pinned = like.device.type == "cpu" and io._bulk_input_tensor.is_pinned()
    io.block_table = torch.full(
        (num_groups, lines, width), -1, dtype=torch.int32, device=like.device, pin_memory=pinned
    )
    io.flashcore_mixed = Counter()
    io.flashcore_lines = [[[] for _ in range(lines)] for _ in range(num_groups)]


class _Pairs:
    """Mixed into the class of asynchronous batching."""

    def infer_carry_over_ids(self) -> torch.Tensor:
        """The same, without an int in Python for each token that a batch may have."""
        now, before = (
            self.io_pairs[pair].host_io.req_id_to_new_token_position
            for pair in (self.current_pair, 1 - self.current_pair)
        )
        carried = [(now[name], number) for number, name in enumerate(before) if name in now]
        ids = torch.full((self.max_batch_tokens,), -1, dtype=torch.int32)
        if carried:
            positions, numbers = zip(*carried)
            ids.numpy()[list(positions)] = numbers
        return ids


def take_over_pairs(inputs_and_outputs) -> None:
    """Change what prepares asynchronous batches."""
    kind = type(inputs_and_outputs)
    inputs_and_outputs.__class__ = _with_pairs(kind)


@functools.cache
def _with_pairs(kind: type) -> type:
    return type(f"Flashcore{kind.__name__}", (_Pairs, kind), {})
