"""How two models are compared: logits where tokens exist, greedy tokens exactly."""

import torch

from flashcore_hf.compat import CACHE_NAME


def named(cache) -> dict:
    """A cache as an argument of forward() and generate(), under the name that this Transformers gives it."""
    return {CACHE_NAME: cache}


def cache_of(output):
    """The cache in a model's output."""
    return getattr(output, CACHE_NAME)


@torch.no_grad()
def logit_error(reference, other, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs) -> float:
    """Largest logit difference at real tokens, relative to the largest logit of the reference."""
    expected = reference(ids, attention_mask=mask, **kwargs).logits
    got = other(ids, attention_mask=mask, **kwargs).logits
    assert not got.isnan().any()
    difference = (expected - got).abs()
    if mask is not None and mask.dim() == 2:
        difference = difference * mask[..., None]
    return (difference.max() / expected.abs().max()).item()


@torch.no_grad()
def greedy(model, ids: torch.Tensor, mask: torch.Tensor | None, tokens: int, **kwargs) -> torch.Tensor:
    """`[B, L + tokens]`: greedy continuation (or what `kwargs` asks generate for)."""
    return model.generate(ids, attention_mask=mask, max_new_tokens=tokens, **{"do_sample": False, **kwargs})


# fp32 on both sides: what differs is the order of sums.
TOLERANCE = 2e-5
