"""The error rule of the project, in one place, and the calls that tests make of it. Works on any device.

The rule: against a float64 reference, an output's largest error is at most 2x and its RMS error at most 1.5x that of a
peer, plus a floor of two roundings of the output. The peer is PyTorch's fused SDPA in the same dtype; where SDPA lacks
a feature it is `naive_attention` with fp32 scores and probabilities in that dtype. A log-sum-exp is within 1e-3.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from flashcore_kernels import attention, make_key_range, make_row_ranges, naive_attention
from flashcore_kernels.naive import hide_unseen, visible_mask
from flashcore_kernels.problem import Problem, check_problem, split_arguments

MAX_RATIO, RMS_RATIO, LSE_TOLERANCE = 2.0, 1.5, 1e-3


class Call(NamedTuple):
    """One attention call: `[B, H, Q, D]`, `[B, Hkv, K, D]`, `[B, Hkv, K, Dv]`, and the keyword arguments."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    arguments: dict

    def run(self, **changed):
        """What flashcore answers."""
        return attention(self.query, self.key, self.value, **{**self.arguments, **changed})


def problem_of(call: Call) -> Problem:
    """What the call asks, checked."""
    arguments = {name: a for name, a in call.arguments.items() if name != "return_lse"}
    inputs, options = split_arguments(call.query, call.key, call.value, **arguments)
    return check_problem(inputs, **options)


def expected(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """The float64 reference: output and lse."""
    arguments = {name: a for name, a in call.arguments.items() if name != "return_lse"}
    # In float64 from the start, or the reference's own output would be rounded.
    return naive_attention(call.query.double(), call.key.double(), call.value.double(), **arguments)


def peer(call: Call) -> torch.Tensor:
    """The output whose error is the yardstick."""
    arguments = {name: a for name, a in call.arguments.items() if name != "return_lse"}
    problem = problem_of(call)
    if problem.softcap or problem.has_sinks or problem.head_dim != problem.value_dim:
        dtype = call.query.dtype
        return naive_attention(call.query, call.key, call.value, probability_dtype=dtype, **arguments)[0]
    mask, key_range = arguments.get("mask"), arguments.get("key_range")
    seen = visible_mask(problem, call.query.device, key_range, mask)
    key, value = hide_unseen(problem, call.key, call.value, seen)
    empty = ~seen.any(dim=-1, keepdim=True)
    if problem.mask_kind == "float":
        attend = torch.where(seen | empty, mask.to(call.query.dtype), -torch.inf).masked_fill(empty, 0.0)
    else:
        attend = seen | empty
    output = F.scaled_dot_product_attention(
        call.query, key, value, attn_mask=attend, scale=problem.scale, enable_gqa=problem.group > 1
    )
    return output.masked_fill(empty, 0.0)


def assert_right(output: torch.Tensor, call: Call, lse: torch.Tensor | None = None) -> None:
    """Hold `output` (and `lse`) of `call` against the error rule.

    Raises:
        AssertionError: says which bound was broken, and by how much.
    """
    want, want_lse = expected(call)
    assert output.shape == want.shape, f"shape {list(output.shape)}, expected {list(want.shape)}"
    assert output.dtype == call.query.dtype
    assert torch.isfinite(output).all(), f"{(~torch.isfinite(output)).sum().item()} outputs are not finite"
    error, yardstick = (output.double() - want).abs(), (peer(call).double() - want).abs()
    rounding = torch.finfo(output.dtype).eps / 2
    for name, of, ratio in (("largest", _largest, MAX_RATIO), ("RMS", _rms, RMS_RATIO)):
        bound = ratio * of(yardstick) + 2 * rounding * of(want)
        assert of(error) <= bound, f"{name} error {of(error):.3g}, at most {bound:.3g} (peer: {of(yardstick):.3g})"
    if lse is not None:
        empty = want_lse == -torch.inf
        assert torch.equal(lse == -torch.inf, empty), "lse is -inf in the wrong rows"
        off = (lse.double() - want_lse).masked_fill(empty, 0.0).abs().max().item()
        assert off <= LSE_TOLERANCE, f"lse is off by {off:.3g}"


def check(call: Call) -> torch.Tensor:
    """Run `call` through flashcore and hold it against the error rule; returns the output."""
    answer = call.run()
    output, lse = answer if call.arguments.get("return_lse") else (answer, None)
    assert_right(output, call, lse)
    return output


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item()


def _rms(x: torch.Tensor) -> float:
    return x.pow(2).mean().sqrt().item()


# What build() knows; those that need a KeyRange combine into one, and none of them goes with "rows".
RANGES = ("left-padding", "right-padding", "holes", "unfilled")
FEATURES = (
    "causal", "window", "softcap", "sinks", *RANGES, "rows", "bool-mask", "float-mask", "value-dim", "gqa-7to1", "mqa",
    "lse", "strides",
)  # fmt: skip
WINDOW = 7
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def together(one: str, other: str) -> bool:
    """Whether two features can be asked for in one call."""
    exclusive = ({"rows", *RANGES}, {"bool-mask", "float-mask"}, {"gqa-7to1", "mqa"})
    if {one, other} <= set(RANGES):
        return True
    return not any({one, other} <= group for group in exclusive)


PAIRS = [pair for pair in itertools.combinations(FEATURES, 2) if together(*pair)]


def build(
    features: set[str] | tuple[str, ...] = (),
    num_queries: int = 17,
    num_keys: int = 17,
    *,
    batch_size: int = 2,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 32,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Call:
    """A call with these FEATURES together, on random tensors; keys that no query sees hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    features = set(features)
    num_heads, num_kv_heads = (7, 1) if "gqa-7to1" in features else (4, 1) if "mqa" in features else heads
    value_dim = head_dim // 2 + 4 if "value-dim" in features else head_dim

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    query = random(batch_size, num_heads, num_queries, head_dim)
    key = random(batch_size, num_kv_heads, num_keys, head_dim)
    value = random(batch_size, num_kv_heads, num_keys, value_dim)
    query, key, value = (tensor.to(dtype).to(device) for tensor in (query, key, value))
    arguments = {}
    if "softcap" in features:
        arguments["softcap"] = 1.5
    if "sinks" in features:
        arguments["sinks"] = random(num_heads).to(device)
    if "lse" in features:
        arguments["return_lse"] = True
    full = (batch_size, num_heads, num_queries, num_keys)
    if features & {"float-mask", "bool-mask"}:
        keep = torch.rand(full, generator=generator) < 0.7
        if "float-mask" in features:
            mask = random(*full).masked_fill(~keep, -torch.inf)
            arguments["mask"] = mask.to(dtype).to(device)
        else:
            arguments["mask"] = keep.to(device)
    left, right = (WINDOW - 1 if "window" in features else -1), (0 if "causal" in features else -1)
    if "rows" in features:
        arguments["key_range"] = _packed_rows(batch_size, num_queries, num_keys, left, right).to(device)
    elif features & set(RANGES):
        arguments["key_range"] = _key_range(features, batch_size, num_queries, num_keys, left, right).to(device)
    else:
        if "window" in features:
            arguments["window"] = WINDOW if "causal" in features else (WINDOW - 1, -1)
        arguments["is_causal"] = "causal" in features
    if "strides" in features:
        query, key, value = strided(query, "bshd"), strided(key, "slice"), strided(value, "permuted")
    return poison_unseen(Call(query, key, value, arguments))


def _key_range(features, batch_size, num_queries, num_keys, left, right) -> torch.Tensor:
    """Sequence 0 is whole, the others are padded by a third, unfilled by a quarter, or have holes."""
    of = torch.arange(batch_size)
    first = of * (num_keys // 3) // max(batch_size - 1, 1) if "left-padding" in features else torch.zeros_like(of)
    end = torch.full_like(of, num_keys)
    if "unfilled" in features:
        end -= (of + 1) * num_keys // 8
    query_start = end - num_queries
    if "right-padding" in features:
        end -= of * (num_keys // 3) // max(batch_size - 1, 1)
    key_mask = None
    if "holes" in features:
        key_mask = torch.rand(batch_size, num_keys, generator=torch.Generator().manual_seed(9)) < 0.6
    return make_key_range(
        batch_size, num_keys, first=first, end=end, query_start=query_start, left=left, right=right, key_mask=key_mask
    )


def _packed_rows(batch_size, num_queries, num_keys, left, right) -> torch.Tensor:
    """Segments of about a third of the keys; each query sees its own segment, and one query sees nothing."""
    slot = (num_keys - num_queries + torch.arange(num_queries)).expand(batch_size, -1)
    size = num_keys // 3 + 1 + torch.arange(batch_size)[:, None]
    first = slot // size * size
    end = (first + size).clamp(max=num_keys)
    if left >= 0:
        first = torch.maximum(first, slot - left)
    if right >= 0:
        end = torch.minimum(end, slot + right + 1)
    end = end.clone()
    end[-1, num_queries // 2] = 0
    return make_row_ranges(first, end, num_keys)


def strided(tensor: torch.Tensor, how: str) -> torch.Tensor:
    """The same values behind other strides: "bshd" (heads inside the sequence), "slice" (of a larger buffer full of
    NaN) or "permuted" (key and value interleaved along the last dimension, as in MLA).
    """
    batch_size, heads, length, dim = tensor.shape
    if how == "bshd":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "slice":
        buffer = tensor.new_full((batch_size + 1, heads + 2, length + 3, dim + 8), float("nan"))
        view = buffer[1:, 1:-1, 2:-1, 8:]
    elif how == "permuted":
        buffer = tensor.new_full((length, batch_size, heads, 2 * dim), float("nan"))
        view = buffer[..., dim:].permute(1, 2, 0, 3)
    else:
        raise ValueError(how)
    view.copy_(tensor)
    return view


def poison_unseen(call: Call) -> Call:
    """NaN in the keys and values that no query of the sequence and KV head sees: none may reach an output."""
    arguments = {name: a for name, a in call.arguments.items() if name != "return_lse"}
    problem = problem_of(call)
    seen = visible_mask(problem, call.query.device, arguments.get("key_range"), arguments.get("mask"))
    seen = seen.any(dim=2).expand(problem.batch_size, problem.num_heads, problem.num_keys)
    seen = seen.unflatten(1, (problem.num_kv_heads, problem.group)).any(dim=2)  # [B, Hkv, K]
    for tensor in (call.key, call.value):
        tensor.masked_fill_(~seen[..., None], float("nan"))
    return call
