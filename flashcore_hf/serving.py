"""Continuous batching without gathering keys: every batch is given block tables, and layers read pages.

Transformers gathers all past keys of a batch in every layer, and hands out block tables only where each request has one
new token, no layer has a window, and the backend is one that it knows. Here the objects that it makes for a model under
our name are changed, and they alone: a manager's batch processor is taken over when it has been made. Then

- whatever is in a batch, its tensors are prepared as for that fast path, see `block_tables`;
- key lengths count all keys, in layers with a window too, which keep the last keys of a request in a ring;
- the cache's `update` gathers and writes nothing: it says where a layer's pages are (`pages.PagedCall`);
- CUDA graphs are kept apart for batches of single tokens and for others; large batches and rare ones do without;
- kernels are compiled in the background from the beginning on, and the warm-up waits for none but the first answer's;
- a batch processor computes on the stream of one that is gone, where there is one.
"""

import contextlib
import functools
import gc
import inspect
import weakref
from contextvars import ContextVar

import torch
from flashcore_kernels import Pages, replayed_in_order

from . import compat
from .ahead import begin_compiling_batches
from .block_tables import LinesOf, fill_lines, take_over_io, take_over_pairs
from .models import NAME
from .pages import PagedCall, in_batch

SUPPORTED = "Transformers 5.17 to 5.24"
# Tokens of the largest mixed batch that is recorded as a CUDA graph. A larger one keeps the GPU busy (26 us a token for
# 8B parameters on an H200) for as long as Python takes to launch it (20 to 25 ms), and recording would only stop a
# server: three times that long for each new number of tokens, and again for the other set of tensors.
MOST_RECORDED = 1024
# How often a mixed batch of a number of tokens is launched before it is recorded. Prompts come in too many sizes to
# record each, and recording takes as long as launching three times.
BEFORE_RECORDING = 3
# Managers that were made while a generate_batch() of ours runs in this context.
_managers: ContextVar[list | None] = ContextVar("flashcore_managers", default=None)


def is_ours(model) -> bool:
    """Whether the model's text part, which alone has pages, has our name."""
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    name = getattr(text, "_attn_implementation", None)
    return isinstance(name, str) and name.rpartition("|")[2] == NAME


@functools.cache
def why_not() -> str | None:
    """Why this Transformers' continuous batching cannot be taken over, or None where it can."""
    if compat.VERSION < (5, 17):
        return f"it is supported for {SUPPORTED}"
    module = compat.batching_module()
    wanted = {
        (module.ContinuousBatchingManager, "_create_batch_processor"): ("self",),
        (module.input_outputs.ContinuousBatchingIOs, "prepare_batch_tensors"): (
            "self", "requests_in_batch", "logits_processors", "use_decode_fast_path", "num_q_tokens", "max_kv_read",
            "use_padding",
        ),
        (module.input_outputs.ContinuousBatchingIOs, "get_model_kwargs"): ("self", "use_padding"),
        (module.input_outputs.ContinuousBatchingIOs, "_transfer_inputs"): ("self", "other", "stream", "non_blocking"),
        (module.input_outputs.ContinuousBatchingIOs, "_get_graph_key"): ("self",),
        (module.input_outputs.ContinuousBatchingAsyncIOs, "infer_carry_over_ids"): ("self",),
        (module.model_runner.ModelRunner, "_get_forward_fn"): ("self", "use_block_table"),
        (module.model_runner.ModelRunner, "run_one_warmup"): ("self", "model", "num_q_tokens", "max_kv_read"),
        (module.PagedAttentionCache, "fill_block_table"): (
            "self", "request_id", "past_length", "query_length", "block_table",
        ),
    }  # fmt: skip
    for (owner, name), parameters in wanted.items():
        method = getattr(owner, name, None)
        if method is None or tuple(inspect.signature(method).parameters) != parameters:
            return f"{owner.__name__}.{name} is not what it was in {SUPPORTED}"
    return None


def check(model) -> None:
    """Raise, in the caller's thread, where continuous batching cannot work for a model of ours.

    Raises:
        NotImplementedError: says what was asked and what to do.
    """
    reason = why_not()
    if reason is not None:
        other = "sdpa_paged" if "sdpa_paged" in compat.attention_registry() else "sdpa"
        raise NotImplementedError(
            f"continuous batching (generate_batch) was asked of {type(model).__name__} with "
            f'attn_implementation="{NAME}" on Transformers {compat.transformers.__version__}: {reason}. Supported here '
            f'is model.generate(). For continuous batching call model.set_attn_implementation("{other}") first.'
        )


def made(manager) -> None:
    """Note a manager of one of our models, where a generate_batch() is `watched`."""
    if _managers.get() is not None:
        _managers.get().append(manager)


@contextlib.contextmanager
def watched():
    """The managers that are made meanwhile: a list."""
    managers: list = []
    token = _managers.set(managers)
    try:
        yield managers
    finally:
        _managers.reset(token)


def raise_what_failed(model, managers: list, answers: dict, num_prompts: int) -> None:
    """Raise in the caller's thread what the serving thread ran into; Transformers writes it to a log.

    Raises:
        RuntimeError: requests failed because the model's forward raised, or the pages were not used.
    """
    for manager in managers:
        outcome = getattr(manager, "_flashcore_outcome", None)
        error = manager.background_thread_status.fatal_error or (outcome and outcome.error)
        failed = len(answers) < num_prompts or any(answer.error is not None for answer in answers.values())
        if error is not None and failed:
            raise RuntimeError(f"continuous batching of {type(model).__name__} failed: {error}") from error
        if answers and not failed and (outcome is None or not outcome.calls):
            raise RuntimeError(
                f"continuous batching of {type(model).__name__} did not reach flashcore: no layer asked for its pages "
                f"on Transformers {compat.transformers.__version__}. Call model.set_attn_implementation('sdpa') first"
            )


class Outcome:
    """What came of a batch processor that was taken over. It outlives the pages, and so holds on to none of them.

    Attributes:
        calls: how often a layer asked for its pages.
        error: the first exception of the model's forward.
    """

    def __init__(self):
        self.calls = 0
        self.error: BaseException | None = None


class Served:
    """A batch processor that was taken over."""

    def __init__(self, processor, model):
        self.outcome = Outcome()
        cache = processor.cache
        self._groups, self._layers = _layers_of(cache)
        # Triton compiles kernels of their own for other strides, and for tables that begin within 16 bytes.
        width = -(-max(_most_pages(cache, group) for group in self._groups) // 16) * 16
        for group in self._groups:
            group.get_seqlen_k = _all_keys
        cache.get_seqlens_k = functools.partial(_all_keys_by_type, tuple(_types_of(cache)))
        lines = [LinesOf(group, number) for number, group in enumerate(self._groups)]
        cache.fill_block_table = functools.partial(fill_lines, lines)
        cache.flashcore_pages = self.pages
        cache.update = self.update
        cache.max_blocks_per_request = width
        cache.max_decode_fast_path_length = width * _page_size(self._groups[0])
        processor.scheduler.max_decode_fast_path_length = cache.max_decode_fast_path_length
        for io in _ios_of(processor.inputs_and_outputs):
            take_over_io(io, len(self._groups), width)
        if hasattr(processor.inputs_and_outputs, "io_pairs"):
            take_over_pairs(processor.inputs_and_outputs)
        self.ahead = begin_compiling_batches(model, self._layers, io, cache.max_batch_tokens)
        self._take_over_runner(processor.model_runner)
        _hand_on_stream(processor)

    @torch.compiler.disable  # as the cache's own update is
    def pages(self, layer_idx: int, kwargs: dict) -> PagedCall:
        """Where a layer's keys and values are, in the batch that `kwargs` describes."""
        self.outcome.calls += 1
        group, key, value, layer_type, ring = self._layers[layer_idx]
        lengths = kwargs["cu_seq_lens_k"]
        if isinstance(lengths, dict):
            lengths = lengths[layer_type]
        most = kwargs["max_length_q"] if "max_length_q" in kwargs else kwargs["max_seqlen_q"]
        return PagedCall(
            Pages(key, value, kwargs["block_table"][group], kwargs["cu_seq_lens_q"], lengths, ring), most == 1
        )

    @torch.compiler.disable
    def update(self, key_states, value_states, layer_idx, kwargs):
        """In place of the cache's own: nothing is gathered. Attention writes the new states, which come back as is."""
        kwargs["flashcore_pages"] = self.pages(layer_idx, kwargs)
        return key_states, value_states

    def _take_over_runner(self, runner) -> None:
        get_forward_fn, compute_batch = runner._get_forward_fn, runner.compute_batch
        warm_up, page_size = runner.run_one_warmup, _page_size(self._groups[0])
        sizes: list[int] = []  # of batches of single tokens that are to be warmed up

        def run_one_warmup(model, num_q_tokens: int, max_kv_read: int | None) -> float:
            if max_kv_read is not None:
                if num_q_tokens > MOST_RECORDED and runner._compiled_varlen is None:
                    return 0.0  # nothing is recorded, and the first batch takes as long
                _current(runner.inputs_and_outputs).flashcore_mixed[num_q_tokens] = BEFORE_RECORDING
                # A graph serves all lengths: there is no need to attend to a whole pool of keys, as 5.17 has it.
                return warm_up(model, num_q_tokens, min(max_kv_read, page_size))
            sizes.append(num_q_tokens)
            most = runner.cb_config.max_requests_per_batch
            if num_q_tokens < most:
                return 0.0
            # The largest first: its kernels come first, and the others find room in its memory. A batch whose kernels
            # are still being compiled is recorded when it comes.
            seconds = sum(
                warm_up(model, size, None) for size in reversed(sizes) if size == most or self.ahead.ready(size)
            )
            sizes.clear()
            return seconds

        def _get_forward_fn(use_block_table: bool):
            io = _current(runner.inputs_and_outputs)
            forward, recorded = get_forward_fn(use_block_table=io.flashcore_single)
            if recorded and not io.flashcore_single:
                recorded = io.num_q_tokens <= MOST_RECORDED and io.flashcore_mixed[io.num_q_tokens] >= BEFORE_RECORDING
                io.flashcore_mixed[io.num_q_tokens] += 1
            return forward, recorded

        def compute_and_note(*args, **kwargs):
            token = in_batch.set(True)
            try:
                with replayed_in_order():  # all of it on the compute stream
                    return compute_batch(*args, **kwargs)
            except Exception as error:
                self.outcome.error = self.outcome.error or error
                raise
            finally:
                in_batch.reset(token)

        runner._get_forward_fn, runner.compute_batch = _get_forward_fn, compute_and_note
        runner.run_one_warmup = run_one_warmup


# Compute streams of batch processors that are gone, by device.
_idle_streams: dict[torch.device, list] = {}


def _hand_on_stream(processor) -> None:
    """Let a batch processor compute on the stream of one that is gone; its stream will be handed on likewise.

    For each stream that is used PyTorch keeps 32 MiB for cuBLAS on Hopper, and this library 4 MiB for partial sums. A
    program that calls generate_batch() again and again would come by all 32 streams that PyTorch hands out.
    """
    ios, offloading = processor.inputs_and_outputs, processor.offloading_manager
    stream = ios.compute_stream
    if stream is None or getattr(offloading, "_compute_stream", None) is not stream:  # on a CPU; or others know it
        return
    idle = _idle_streams.setdefault(stream.device, [])
    with contextlib.suppress(IndexError):
        stream = ios.compute_stream = offloading._compute_stream = idle.pop()
    weakref.finalize(processor, idle.append, stream)


@contextlib.contextmanager
def stopped_at_once(manager, kept: bool):
    """For the stop() of a manager of ours: its thread is woken, which else looks every 0.1 s whether it is to stop.

    Transformers then has all garbage of the process collected, 0.3 s with its modules loaded, after each
    generate_batch(). That is for the memory of a manager that goes.

    Args:
        kept: the manager will go on, with all that it has, and nothing is collected.
    """
    status = manager.background_thread_status
    awake = getattr(manager, "_wake_up_loop", None) or getattr(manager, "_has_new_requests", None)
    request_stop = status.request_stop

    def request_and_wake(*args, **kwargs):
        request_stop(*args, **kwargs)
        if awake is not None:
            awake.set()

    kept = kept and not gc.get_freeze_count()  # else somebody froze what is to stay so
    status.request_stop = request_and_wake
    if kept:
        gc.freeze()
    try:
        yield
    finally:
        if kept:
            gc.unfreeze()
        del status.request_stop


def take_over(manager, processor):
    """Change the batch processor of a manager of ours, once."""
    if getattr(processor, "_flashcore_served", None) is None:
        processor._flashcore_served = Served(processor, manager.model)
    # A stopped manager lets go of its processor, and Transformers counts on the memory of its pages then.
    manager._flashcore_outcome = processor._flashcore_served.outcome
    return processor


def _layers_of(cache) -> tuple[list, dict]:
    """(groups of layers, layer -> (its group's number, K pages, V pages, layer type, ring))."""
    layers = {}
    if hasattr(cache, "cache_allocators"):  # from 5.23 on
        groups = list(cache.cache_allocators.values())
        for allocator in groups:
            ring = getattr(allocator, "sliding_window", 0)
            for layer, (key, value) in allocator._kv_page_views.items():
                layers[layer] = (allocator.index, key, value, allocator.layer_type, ring)
        return groups, layers
    shape = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
    groups = cache.group_cache_managers
    for layer, (group, place) in cache.layer_index_to_group_indices.items():
        ring = getattr(groups[group], "sliding_window", 0)
        key, value = (stored[place].view(shape) for stored in (cache.key_cache, cache.value_cache))
        layers[layer] = (group, key, value, "sliding_attention" if ring else "full_attention", ring)
    return groups, layers


def _page_size(group) -> int:
    return group.tokens_per_page if hasattr(group, "tokens_per_page") else group.block_size


def _most_pages(cache, group) -> int:
    """Most pages that a request may have of a group of layers."""
    ring = getattr(group, "sliding_window", 0)
    most = group.num_blocks if hasattr(group, "num_blocks") else cache.num_blocks
    if ring:
        return -(-ring // _page_size(group))
    # Texts longer than four times what the model was made for: such a table would take long to copy in every step.
    positions = getattr(cache.config, "max_position_embeddings", None)
    return most if positions is None else min(most, -(-4 * positions // _page_size(group)))


def _types_of(cache) -> list[str]:
    if hasattr(cache, "cache_allocators"):
        return list(cache.cache_allocators)
    full, sliding = cache.num_full_attention_groups, cache.num_sliding_attention_groups
    return ["full_attention"] * bool(full) + ["sliding_attention"] * bool(sliding)


def _all_keys(past_length: int, query_length: int) -> int:
    """In place of the allocators' own, which do not count keys that a window has passed."""
    return past_length + query_length


def _all_keys_by_type(types_: tuple[str, ...], past_length: int, query_length: int) -> dict[str, int]:
    return dict.fromkeys(types_, past_length + query_length)


def _ios_of(inputs_and_outputs) -> list:
    """The tensors of batches: one set, or for asynchronous batching two pairs of the host's and the device's."""
    if not hasattr(inputs_and_outputs, "io_pairs"):
        return [inputs_and_outputs]
    return [io for pair in inputs_and_outputs.io_pairs for io in (pair.host_io, pair.device_io)]


def _current(inputs_and_outputs):
    """The host's tensors of the batch at hand."""
    if not hasattr(inputs_and_outputs, "io_pairs"):
        return inputs_and_outputs
    return inputs_and_outputs.io_pairs[inputs_and_outputs.current_pair].host_io
