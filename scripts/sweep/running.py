"""Models of the sweep: built small, run the same way each time, their outputs compared."""

import copy
import math
from collections.abc import Iterator

import torch
from torch.utils._pytree import tree_map
from transformers import GenerationConfig

from flashcore_hf.compat import CACHE_NAMES

from .inputs import parameters_of, recipes


def is_refusal(error: BaseException) -> bool:
    """Whether it is flashcore that raised, with a sentence of its own."""
    return isinstance(error, (ValueError, NotImplementedError)) and "flashcore" in str(error)


def short(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def build(model_class: type, config, implementation: str):
    """The model with random weights, in eval mode; the config is copied, or both would use the last implementation."""
    model = model_class._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()
    if hasattr(model, "generation_config"):
        start = getattr(config, "decoder_start_token_id", None)
        model.generation_config = GenerationConfig(
            pad_token_id=0, bos_token_id=1, decoder_start_token_id=1 if start is None else start
        )
    return model


@torch.no_grad()
def switch_on(model: torch.nn.Module) -> None:
    """Gates that start at zero, and projections that start tiny, would hide what attention does."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.numel() and not name.endswith("bias") and parameter.abs().max() < 1e-3:
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator) if parameter.dim() > 1 else 0.5)
    for name, buffer in model.named_buffers():  # code books that only training fills
        if "embed" in name and buffer.dim() > 1 and buffer.is_floating_point() and not buffer.any():
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight.numel() > 1:
            scale = module.in_features**-0.5
            if 0 < (std := module.weight.std()) < scale / 2:
                module.weight.mul_(scale / std)


def accepted_inputs(eager, config, refused: list[str] | None = None) -> Iterator[tuple[str, dict]]:
    """(kind, inputs) of each recipe that eager takes; why it does not take the others goes to `refused`."""
    refused = [] if refused is None else refused
    for kind, inputs in recipes(eager, config):
        takes = parameters_of(eager)
        inputs = {name: value for name, value in inputs.items() if name in takes}
        try:
            outputs = tensors(run(eager, inputs))
        except Exception as error:  # noqa: BLE001 - the next recipe may do
            refused.append(short(error))
            continue
        if outputs and all(output.isfinite().all() for output in outputs):
            yield kind, inputs
        else:
            refused.append("eager's own outputs are not finite" if outputs else "there is no floating-point output")


@torch.no_grad()
def run(model, inputs: dict, **more):
    """One forward; what it draws at random is the same each time."""
    torch.manual_seed(0)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return model(**{**converted(inputs, dtype), **more})


def converted(inputs: dict, to: torch.dtype | str) -> dict:
    """Inputs, and tensors in lists of theirs, on a device; or in a dtype, where they are floating-point."""

    def move(value):
        keep = isinstance(to, torch.dtype) and not (isinstance(value, torch.Tensor) and value.is_floating_point())
        return value if keep or not isinstance(value, torch.Tensor) else value.to(to)

    return tree_map(move, inputs)


def tensors(output) -> list[torch.Tensor]:
    """Floating-point tensors of an output in order, without caches and the weights that some eager models give."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() and output.numel() > 1 else []
    if hasattr(output, "items"):
        left_out = (*CACHE_NAMES, "attentions")
        return [t for name, value in output.items() if not name.endswith(left_out) for t in tensors(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in tensors(value)]
    return []


def masked(outputs: list[torch.Tensor], mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Outputs with zeros at tokens that do not exist."""
    if mask is None:
        return outputs
    batch, length = mask.shape
    kept = []
    for output in outputs:
        # Some models answer for the last tokens alone, and one adds a token of its own behind them.
        if output.dim() > 2 and output.shape[:2] == (batch, length + 1):
            mask, length = torch.cat([mask, mask.new_ones(batch, 1)], dim=1), length + 1
        if output.dim() > 2 and output.shape[0] == batch and length - 2 <= output.shape[1] <= length:
            exists = mask[:, length - output.shape[1] :].bool()
            output = output.masked_fill(~exists.reshape(*exists.shape, *[1] * (output.dim() - 2)), 0.0)
        kept.append(output)
    return kept


def largest_error(expected: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """Largest difference relative to the largest value, over all outputs; infinite where shapes or NaN differ."""
    if [t.shape for t in expected] != [t.shape for t in got]:
        return math.inf
    worst = 0.0
    for a, b in zip(expected, got):
        a, b = a.float(), b.float()
        # Scores that a model itself sets to -inf or the lowest number are equal or wrong.
        huge = ~(a.abs() < 1e30)
        if not torch.equal(huge, ~(b.abs() < 1e30)):
            return math.inf
        a, b = a.masked_fill(huge, 0.0), b.masked_fill(huge, 0.0)
        worst = max(worst, ((a - b).abs().max() / a.abs().max().clamp(min=1e-6)).item())
    return worst


def rms_error(exact: torch.Tensor, got: torch.Tensor) -> float:
    """Root mean square of the difference relative to that of the exact values."""
    exact, got = exact.float(), got.float()
    huge = ~(exact.abs() < 1e30)
    exact, got = exact.masked_fill(huge, 0.0), got.masked_fill(huge, 0.0)
    return ((exact - got).square().mean().sqrt() / exact.square().mean().sqrt().clamp(min=1e-6)).item()


def to_half(model, dtype: torch.dtype):
    """Parameters in dtype; buffers such as rotary frequencies stay as a checkpoint's would."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model
