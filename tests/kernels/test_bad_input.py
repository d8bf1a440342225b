"""What does not fit is a ValueError before any launch: it names the argument, what it was, and what is accepted."""

import math

import pytest
import torch
from flashcore_kernels import attention, make_key_range, make_row_ranges, naive_attention, path_counts


def tensors(**changed):
    shapes = {"query": (2, 4, 3, 16), "key": (2, 2, 7, 16), "value": (2, 2, 7, 16)}
    dtypes = {"query": torch.float16, "key": torch.float16, "value": torch.float16}
    for name, what in changed.items():
        (shapes if isinstance(what, tuple) else dtypes)[name] = what
    return [torch.zeros(shapes[name], dtype=dtypes[name]) for name in shapes]


def refused(match, *arguments, **options):
    path_counts.clear()
    for function in (attention, naive_attention):
        with pytest.raises(ValueError, match=match):
            function(*arguments, **options)
    assert not path_counts, "something was launched"


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"query": (2, 3, 3, 16)}, r"heads of query and key: got \[3, 2\].*multiple of the number of KV heads"),
        ({"query": (2, 1, 3, 16)}, r"heads of query and key: got \[1, 2\]"),
        ({"key": (2, 3, 7, 16)}, r"\[heads, seq\] of key and value: got \[\[3, 7\], \[2, 7\]\]"),
        ({"value": (2, 2, 8, 16)}, r"\[heads, seq\] of key and value.*equal"),
        ({"key": (3, 2, 7, 16)}, r"batch size of query, key, value: got \[2, 3, 2\]"),
        ({"value": (1, 2, 7, 16)}, r"batch size of query, key, value: got \[2, 2, 1\]"),
        ({"key": (2, 2, 7, 8)}, r"head_dim of query and key: got \[16, 8\].*only value's may differ"),
        ({"query": (2, 4, 16)}, r"query shape: got \[2, 4, 16\]; four dimensions"),
        ({"key": (2, 7, 16)}, r"key shape: got \[2, 7, 16\]"),
        ({"value": (2, 2, 7, 16, 1)}, r"value shape: got"),
    ],
    ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_shapes(changed, match):
    refused(match, *tensors(**changed))


@pytest.mark.parametrize("place", range(4), ids=["batch", "heads", "seq", "head_dim"])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_empty(name, place):
    shape = [2, 2, 7, 16]
    shape[place] = 0
    refused(rf"{name} shape: got .*0.*at least 1", *tensors(**{name: tuple(shape)}))


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_mismatched_dtypes(name):
    refused("dtype of query, key, value: got .*bfloat16.*the same", *tensors(**{name: torch.bfloat16}))


def test_integer_dtype():
    refused(
        "query dtype: got torch.int32; a floating-point",
        *tensors(query=torch.int32, key=torch.int32, value=torch.int32),
    )


@pytest.mark.parametrize("name", ["query", "key", "value", "mask", "sinks", "key_range"])
def test_mismatched_devices(name):
    query, key, value = tensors()
    named = {"query": query, "key": key, "value": value}
    extra = {
        "mask": torch.zeros(3, 7, dtype=torch.bool)[None, None],
        "sinks": torch.zeros(4),
        "key_range": make_key_range(2, 7),
    }
    if name in named:
        named[name] = named[name].to("meta")
        refused("device of query, key, value: got .*meta", *named.values())
    else:
        refused(f"{name} device: got meta; .*query's device, cpu", query, key, value, **{name: extra[name].to("meta")})


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_scale_that_is_not_finite(scale):
    refused("scale: got .*a finite number, or None", *tensors(), scale=scale)


@pytest.mark.parametrize("softcap", [math.nan, math.inf, -1.0])
def test_softcap(softcap):
    refused("softcap: got .*a finite number > 0", *tensors(), softcap=softcap)


@pytest.mark.parametrize("window", [0, -1, -7, (-2, 0), (0, -2), (1,), (1, 2, 3), "7", 2.5, True, [1, 2]], ids=str)
@pytest.mark.parametrize("is_causal", [True, False])
def test_window(window, is_causal):
    refused("window: got", *tensors(), window=window, is_causal=is_causal)


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(3, 7, dtype=torch.bool),
        torch.zeros(2, 1, 3, 6, dtype=torch.bool),
        torch.zeros(2, 1, 2, 7, dtype=torch.bool),
        torch.zeros(2, 2, 3, 7, dtype=torch.bool),
        torch.zeros(3, 1, 3, 7, dtype=torch.float16),
        torch.zeros(1, 1, 1, 3, 7, dtype=torch.float16),
    ],
    ids=lambda tensor: "x".join(map(str, tensor.shape)),
)
def test_mask_of_a_wrong_shape(mask):
    refused(r"mask shape: got .*must broadcast to \[B, H, Q, K\] = \[2, 4, 3, 7\]", *tensors(), mask=mask)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_mask_of_a_wrong_dtype(dtype):
    refused("mask dtype: got .*bool", *tensors(), mask=torch.zeros(1, 1, 3, 7, dtype=dtype))


@pytest.mark.parametrize(
    "sinks", [torch.zeros(3), torch.zeros(2), torch.zeros(1, 4), torch.zeros(4, dtype=torch.int64)], ids=str
)
def test_sinks(sinks):
    refused(r"sinks: got .*one floating-point logit a head, \[4\]", *tensors(), sinks=sinks)


@pytest.mark.parametrize("sinks", [torch.zeros(4, 2)[:, 0], torch.zeros(()).expand(4)], ids=["column", "expanded"])
def test_sinks_apart(sinks):
    """Kernels read one number after the other: these were others', and nobody said so."""
    refused(r"stride of sinks: got .*call .contiguous\(\)", *tensors(), sinks=sinks)


@pytest.mark.parametrize("option", [{"is_causal": True}, {"window": 3}], ids=str)
def test_key_range_says_causal_and_window_itself(option):
    refused("key_range with is_causal or window", *tensors(), key_range=make_key_range(2, 7), **option)


def test_key_range_of_another_problem():
    refused("made for 320 keys.*has 7", *tensors(), key_range=make_key_range(2, 8 * 40))
    refused("7 keys.*made for 5 keys", *tensors(), key_range=make_key_range(2, 5))
    refused("taken for a KeyRange", *tensors(), key_range=make_key_range(3, 7))
    refused("must be int32", *tensors(), key_range=make_key_range(2, 7).float())


@pytest.mark.parametrize("lines", [make_key_range(2, 7), make_row_ranges(*torch.zeros(2, 2, 3, dtype=torch.int64), 7)])
def test_key_range_whose_words_lie_apart(lines):
    """Kernels read one word after the other: these were others', and nobody said so."""
    apart = lines.transpose(2, 3).contiguous().transpose(2, 3)
    apart = torch.stack((apart, apart), -1)[..., 0]  # where a dimension has one element its stride says nothing
    refused("stride of key_range's words: got .*call .contiguous", *tensors(), key_range=apart)


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_numbers_in_tensors(name):
    """They are read in each call, whatever was remembered of one before; and have no gradient."""
    query, key, value = map(torch.randn_like, tensors())
    number = torch.tensor(0.25)
    first = attention(query, key, value, **{name: number})
    assert torch.equal(first, attention(query, key, value, **{name: 0.25}))
    number.mul_(2)
    again = attention(query, key, value, **{name: number})
    assert torch.equal(again, attention(query, key, value, **{name: 0.5})) and not torch.equal(again, first)
    refused(
        f"{name}: got a tensor that requires a gradient", *tensors(), **{name: torch.tensor(0.5, requires_grad=True)}
    )


def test_the_operator_checks_as_well():
    """torch.ops.flashcore.attention is public too: torch.compile puts it into graphs of other people."""
    query, key, value = tensors(query=(2, 3, 3, 16))
    with pytest.raises(ValueError, match="heads of query and key"):
        torch.ops.flashcore.attention(query, key, value, None, None, None, -1, -1, 0.25, 0.0, False)
