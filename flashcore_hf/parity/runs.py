"""Load a checkpoint under one backend and generate from it: the runs that `parity` compares."""

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from flashcore_kernels import path_counts
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .. import compat
from ..legacy.helper import replace_attention_with_flashcore


class Cell(NamedTuple):
    """One way to generate.

    Attributes:
        cache: "dynamic" or "static".
        prompts: B lists of token ids; shorter ones are padded on the left.
        max_new_tokens: T; generation never ends earlier.
        pad_token_id: what pads.
    """

    cache: str
    prompts: list[list[int]]
    max_new_tokens: int
    pad_token_id: int

    @property
    def name(self) -> str:
        """Like "static, B=4 left-padded"."""
        padded = len({len(prompt) for prompt in self.prompts}) > 1
        return f"{self.cache}, B={len(self.prompts)} {'left-padded' if padded else 'unpadded'}"


class Run(NamedTuple):
    """What one backend generated in one cell.

    Attributes:
        tokens: int64 `[B, T]`, on the CPU: what was generated; where tokens were forced, the argmax of each step.
        logits: `[B, T, V]`, on the CPU, as the model gave them, in its dtype.
        milliseconds: wall time for each step, prefill included.
        paths: attention calls that each path of flashcore served, by kernel name; empty for another backend.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    milliseconds: float
    paths: Counter[str]


class _Steps(LogitsProcessor):
    """Tells after how many tokens generate() is, and changes nothing."""

    def __init__(self, prompt_length: int, on_step: Callable[[int], None]):
        self.prompt_length = prompt_length
        self.on_step = on_step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.on_step(input_ids.shape[1] - self.prompt_length + 1)
        return scores


class _ForceTokens(LogitsProcessor):
    """Makes generate() continue with given tokens whatever the logits say: teacher forcing along generate's own path.

    Args:
        tokens: int64 `[B, T]`.
        excusable: bool `[B, T]`, or None. Where given, the step of the first disagreement that is not excusable is kept
            in `caught` (from 0), for `_StopWhenCaught`.
    """

    def __init__(self, tokens: torch.Tensor, prompt_length: int, excusable: torch.Tensor | None = None):
        self.tokens = tokens
        self.prompt_length = prompt_length
        self.excusable = excusable
        self.caught: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        wanted = self.tokens[:, step]  # [B]
        if self.excusable is not None and self.caught is None:
            if ((scores.argmax(-1) != wanted) & ~self.excusable[:, step]).any():
                self.caught = step
        return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)


class _StopWhenCaught(StoppingCriteria):
    def __init__(self, watch: _ForceTokens):
        self.watch = watch

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.watch.caught is not None, device=input_ids.device)


def load(path: str, backend: str, dtype: torch.dtype, device: str):
    """The checkpoint at `path` (or its Hub id) through from_pretrained(attn_implementation=backend).

    Where Transformers is too old to be asked for flashcore, through the helper for older versions.

    Args:
        device: "cpu", or a device_map: "cuda", "cuda:1", "auto".
    """
    # The argument was renamed in 4.56.
    options = {"dtype" if compat.VERSION >= (4, 56) else "torch_dtype": dtype}
    if device != "cpu":
        options["device_map"] = device
    helped = backend == "flashcore" and not compat.HAS_INTERFACE
    options["attn_implementation"] = "sdpa" if helped else backend
    model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    if helped:
        replace_attention_with_flashcore(model)
    # A checkpoint's own settings (sampling, penalties, end tokens) would end or bend greedy decoding.
    model.generation_config = GenerationConfig()
    return model


def has_static_cache(config) -> bool:
    """Whether generate() of this Transformers has a static cache for models with this configuration."""
    if compat.HAS_INTERFACE:
        return True
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    # In 4.40 a method says it, and in what follows a class attribute.
    return hasattr(model_class, "_setup_cache") or getattr(model_class, "_supports_static_cache", False)


def unload() -> None:
    """Give back the memory of a model that nobody holds any more."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def left_padded(prompts: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, int64 `[B, longest]`, of prompts aligned at their ends."""
    longest = max(map(len, prompts))
    ids = [[pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def generate(
    model,
    cell: Cell,
    forced: torch.Tensor | None = None,
    warm_up: bool = False,
    on_step: Callable[[int], None] = lambda step: None,
) -> Run:
    """Decode greedily in `cell`.

    Args:
        forced: int64 `[B, T]`: continue with these tokens instead of the likeliest ones.
        warm_up: generate once more before, so that compiling is not in the time.
        on_step: called at each step with its number, from 1.
    """
    input_ids, options = _inputs(model, cell)
    processors = [_Steps(input_ids.shape[1], on_step)]
    if forced is not None:
        processors.append(_ForceTokens(forced.to(input_ids.device), input_ids.shape[1]))
    options["logits_processor"] = LogitsProcessorList(processors)
    with torch.inference_mode():
        if warm_up:
            # A static cache has the size of the whole text, and another size would be compiled for anew.
            few = {} if cell.cache == "static" else {"max_new_tokens": min(cell.max_new_tokens, 8)}
            model.generate(input_ids, **{**options, "logits_processor": LogitsProcessorList(processors[1:]), **few})
        path_counts.clear()
        began = time.perf_counter()
        answer = model.generate(input_ids, output_logits=True, return_dict_in_generate=True, **options)
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        milliseconds = (time.perf_counter() - began) / cell.max_new_tokens * 1e3
    # generate() hands out float32 copies of what the model computed in its own dtype: narrowing loses nothing.
    logits = torch.stack([step.to("cpu", model.dtype) for step in answer.logits], dim=1)  # [B, T, V]
    tokens = answer.sequences[:, input_ids.shape[1] :].cpu() if forced is None else logits.argmax(-1)
    return Run(tokens, logits, milliseconds, Counter(path_counts))


def caught_at(model, cell: Cell, reference: torch.Tensor, excusable: torch.Tensor) -> int | None:
    """The first step (from 0) at which `model` disagrees with the tokens of `reference` and is not excused.

    Args:
        reference: int64 `[B, T]`: what the reference generated; forced upon `model`, so that prefixes stay the same.
        excusable: bool `[B, T]`: where a disagreement counts for nothing.

    Returns:
        the step; generation stops there. None where all T steps pass.
    """
    input_ids, options = _inputs(model, cell)
    device = input_ids.device
    watch = _ForceTokens(reference.to(device), input_ids.shape[1], excusable.to(device))
    with torch.inference_mode():
        model.generate(
            input_ids,
            logits_processor=LogitsProcessorList([watch]),
            stopping_criteria=StoppingCriteriaList([_StopWhenCaught(watch)]),
            **options,
        )
    return watch.caught


def _inputs(model, cell: Cell) -> tuple[torch.Tensor, dict]:
    """input_ids `[B, longest]` and the other arguments of generate() for `cell`."""
    device = model.get_input_embeddings().weight.device
    input_ids, attention_mask = (tensor.to(device) for tensor in left_padded(cell.prompts, cell.pad_token_id))
    options = dict(
        attention_mask=attention_mask,
        do_sample=False,
        max_new_tokens=cell.max_new_tokens,
        pad_token_id=cell.pad_token_id,
    )
    if cell.cache == "static":
        options["cache_implementation"] = "static"
    return input_ids, options


@contextmanager
def wrong_scale(model, factor: float = 1.5) -> Iterator[None]:
    """Multiply the softmax scale of every attention module by `factor`: the defect that parity must notice.

    Raises:
        ValueError: no module of the model has a `scaling` of its own.
    """
    modules = [module for module in model.modules() if isinstance(getattr(module, "scaling", None), float)]
    if not modules:
        raise ValueError(
            f"the negative control multiplies the `scaling` of each attention module, and {type(model).__name__} has "
            "none; parity can be shown for models whose attention modules have it, as LLaMA's and Mistral's do"
        )
    originals = [module.scaling for module in modules]
    try:
        for module in modules:
            module.scaling *= factor
        yield
    finally:
        for module, original in zip(modules, originals):
            module.scaling = original
