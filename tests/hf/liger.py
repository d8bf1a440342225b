"""Liger's kernels under a model of ours, as the README says to put them there; and what stands in for them on a CPU."""

import importlib
import inspect

import pytest
import torch

# model_type -> what Liger calls it.
FAMILIES = {
    "llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
    "gemma3_text": "gemma3_text", "gpt_oss": "gpt_oss",
}  # fmt: skip
# The loss alone: generate() has none, and a forward of Liger's own does not know what 5.24 calls a cache.
WITHOUT_LOSS = {"fused_linear_cross_entropy": False}


def apply(model, monkeypatch, **options) -> None:
    """`apply_liger_kernel_to_...(model=model, fused_linear_cross_entropy=False)`, until the test is over.

    It puts functions and classes of its own into the model's module, so models of this family that are compared have
    to have run before.
    """
    liger = pytest.importorskip("liger_kernel.transformers")
    module = importlib.import_module(type(model).__module__)
    for name, value in list(vars(module).items()):
        if name == "apply_rotary_pos_emb" or name.endswith(("RMSNorm", "MLP")):
            monkeypatch.setattr(module, name, value)  # so that it is put back
    function = getattr(liger, f"apply_liger_kernel_to_{FAMILIES[model.config.model_type]}")
    takes = inspect.signature(function).parameters
    function(model=model, **{name: value for name, value in {**WITHOUT_LOSS, **options}.items() if name in takes})


class Counted:
    """The place of a torch.autograd.Function: calls are counted by its name."""

    def __init__(self, name: str, call, counts):
        self.name, self.call, self.counts = name, call, counts

    def apply(self, *args):
        self.counts[self.name] += 1
        return self.call(*args)


def stand_in(monkeypatch, counts) -> None:
    """PyTorch in place of Liger's kernels, which Triton's interpreter cannot run; their calls are counted."""
    pytest.importorskip("liger_kernel.transformers")

    def rms_norm(x, weight, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        states = x.float()
        return (states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps) * (weight + offset)).to(x.dtype)

    def silu_mul(a, b, gate=1.0, down=1.0):
        return torch.nn.functional.silu(a * gate) * b * down

    def gelu_mul(a, b, *rest):
        return torch.nn.functional.gelu(a, approximate="tanh") * b

    def rotate(name, q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        counts["rope"] += 1
        if rotary_dim is not None:
            cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

        def half(x):
            first, second = x.chunk(2, dim=-1)
            return torch.cat([-second, first], dim=-1)

        return q * cos + half(q) * sin, k * cos + half(k) * sin

    root = "liger_kernel.transformers"
    monkeypatch.setattr(f"{root}.rms_norm.LigerRMSNormFunction", Counted("rms_norm", rms_norm, counts))
    monkeypatch.setattr(f"{root}.swiglu.LigerSiLUMulFunction", Counted("mlp", silu_mul, counts))
    monkeypatch.setattr(f"{root}.geglu.LigerGELUMulFunction", Counted("mlp", gelu_mul, counts))
    monkeypatch.setattr(f"{root}.rope.dispatch", rotate)
