"""Dense masks and biases in the Gluon kernel, against float64 by the error rule."""

import itertools
import random

import pytest
import torch
from flashcore_kernels import attention, make_key_range, make_row_ranges, path_counts

from ..kernels.reference import RANGES, assert_right, build, check, expected, poison_unseen, together

if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
    pytest.skip("the Gluon kernel is for compute capability 9.0", allow_module_level=True)

HEAD_DIMS = (64, 96, 128)
BESIDE = ((), ("causal",), ("window",), ("causal", "window"), *((name,) for name in RANGES), ("rows",))
LENGTHS = ((17, 129), (129, 129), (300, 700), (200, 1000))
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def on_hopper(call):
    """Check `call`, and that it was the Gluon kernel's."""
    path_counts.clear()
    out = check(call)
    assert set(path_counts) == {"flashcore_hopper"}, dict(path_counts)
    return out


def with_mask(call, mask):
    """The call under this mask, keys that nobody sees any more full of NaN."""
    call.arguments["mask"] = mask.to(call.query.device)
    return poison_unseen(call)


def masks(kind: str, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Random values; blocks that are shown or hidden whole, or in every third key; queries that see nothing."""
    keep = torch.rand(shape, generator=generator) < 0.7
    tiles = [-(-shape[2] // 64), -(-shape[3] // 64)]
    of_block = torch.randint(0, 4, (*shape[:2], *tiles), generator=generator)
    of_block = of_block.repeat_interleave(64, 2).repeat_interleave(64, 3)[:, :, : shape[2], : shape[3]]
    keep = ((of_block == 0) & keep) | (of_block == 1) | ((of_block == 2) & (torch.arange(shape[3]) % 3 == 0))
    if shape[2] > 5:
        keep[:, :, 5] = False
    if kind == "bool":
        return keep
    bias = torch.randn(shape, generator=generator)
    bias = torch.where(torch.arange(shape[3]) < 128, 0.0, bias)  # blocks without a bias
    return (bias if kind == "bias" else bias.masked_fill(~keep, -torch.inf)).to(dtype)


@pytest.mark.parametrize("kind", ["bool", "float", "bias"])
@pytest.mark.parametrize("beside", BESIDE, ids="+".join)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_beside(head_dim, beside, kind):
    """A mask narrows what causal attention, windows and key ranges leave; odd lengths; GQA."""
    for (num_queries, num_keys), more in itertools.product(LENGTHS, ((), ("softcap", "sinks", "lse"))):
        features = (*beside, *more)
        if all(together(*pair) for pair in itertools.combinations(features, 2)):
            call = build(
                features, num_queries, num_keys, heads=(6, 2), head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
            )
            generator = torch.Generator().manual_seed(num_queries + num_keys)
            shape = (2, 6, num_queries, num_keys)
            on_hopper(with_mask(call, masks(kind, shape, generator, torch.bfloat16)))


@pytest.mark.parametrize("broadcast", list(itertools.product((False, True), repeat=4)), ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_broadcast(head_dim, kind, broadcast):
    for num_queries, num_keys in ((129, 257), (200, 328)):
        call = build((), num_queries, num_keys, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
        shape = tuple(1 if one else size for one, size in zip(broadcast, (2, 4, num_queries, num_keys)))
        mask = masks(kind, shape, torch.Generator().manual_seed(7), torch.bfloat16)
        on_hopper(with_mask(call, mask))
        on_hopper(with_mask(call, mask.to("cuda").expand(2, 4, num_queries, num_keys)))


@pytest.mark.parametrize("mask_dtype", [*DTYPES.values(), torch.float64], ids=str)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_dtypes(head_dim, dtype, mask_dtype):
    """Of queries and mask each its own; in fp32 a bias keeps digits that 16 bits would lose."""
    call = build((), 200, 328, head_dim=head_dim, dtype=DTYPES[dtype], device="cuda")
    for rows in (200, 1):
        bias = 300 + torch.rand(1, 4, rows, 328, generator=torch.Generator().manual_seed(1))
        bias = bias.to(mask_dtype).cuda()
        path_counts.clear()
        out = attention(call.query, call.key, call.value, mask=bias)
        assert set(path_counts) == {"flashcore_hopper"}
        want, _ = expected(call._replace(arguments={"mask": bias}))
        bound = 3 * torch.finfo(DTYPES[dtype]).eps * want.abs().max()
        assert (out.double() - want).abs().max() < bound
        rounded, _ = expected(call._replace(arguments={"mask": bias.to(torch.bfloat16)}))
        if mask_dtype == torch.float32:
            assert (out.double() - rounded).abs().max() > bound, "a bias in bf16 would have shown"


@pytest.mark.parametrize("layout", ["transposed", "sliced", "heads last"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_strides(kind, layout):
    call = build((), 130, 200, head_dim=64, dtype=torch.bfloat16, device="cuda")
    mask = masks(kind, (2, 4, 130, 200), torch.Generator().manual_seed(3), torch.bfloat16).cuda()
    if layout == "transposed":
        mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "sliced":
        mask = torch.cat([mask, mask], dim=3)[..., 11:211]
    else:
        mask = mask.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as an embedding leaves a position bias
    on_hopper(with_mask(call, mask))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("rows", [130, 1])
def test_finfo_min(head_dim, rows):
    """Hidden beside other keys; a row of nothing else is a softmax of equals, and of -inf alone zeros."""
    low = torch.finfo(torch.bfloat16).min
    call = build(("lse",), 130, 333, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    hidden = torch.rand(2, 1, rows, 333, generator=torch.Generator().manual_seed(1)) < 0.4
    mask = torch.zeros(hidden.shape, dtype=torch.bfloat16).masked_fill(hidden, low).cuda()
    call.arguments["mask"] = mask
    on_hopper(call)
    mask = mask.expand(2, 1, 130, 333).clone() if rows > 1 else mask.clone()
    mask[1, :, -1] = low
    out, lse = call.run(mask=mask)
    mean = call.value[1].double().mean(1).repeat_interleave(2, dim=0)
    assert (out[1, :, -1].double() - mean).abs().max() < 2 * torch.finfo(torch.bfloat16).eps
    assert torch.isfinite(out).all() and torch.isfinite(lse).all()
    mask[1, :, -1] = -torch.inf
    out, lse = call.run(mask=mask)
    assert not out[1, :, -1].any() and (lse[1, :, -1] == -torch.inf).all() and torch.isfinite(lse[0]).all()


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_bool_masks_of_all_head_dims(head_dim):
    for dims in ((), ("value-dim",)):
        call = build(("lse", *dims), 200, 700, head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
        if call.value.shape[3] % 8:
            call = call._replace(value=call.value[..., : call.value.shape[3] // 8 * 8])
        on_hopper(with_mask(call, masks("bool", (2, 1, 200, 700), torch.Generator().manual_seed(0), torch.bool)))


def test_value_dim():
    for kind, value_dim in itertools.product(("bool", "float"), (32, 64, 128)):
        call = build((), 200, 300, head_dim=128, dtype=torch.bfloat16, device="cuda")
        call = call._replace(value=call.value[..., :value_dim].contiguous())
        on_hopper(with_mask(call, masks(kind, (1, 4, 200, 300), torch.Generator().manual_seed(0), torch.bfloat16)))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_whole_tiles_that_see_nothing(kind):
    """Also next to tiles that see all, and where a key range leaves nothing of what the mask shows."""
    call = build(("lse",), 400, 700, head_dim=64, dtype=torch.bfloat16, device="cuda")
    keep = torch.zeros(2, 1, 400, 700, dtype=torch.bool)
    keep[0, :, 256:] = True
    keep[1, :, :, 500:] = True
    mask = keep if kind == "bool" else torch.zeros(keep.shape, dtype=torch.bfloat16).masked_fill(~keep, -torch.inf)
    out = on_hopper(with_mask(call, mask))
    assert not out[0, :, :256].any()
    call.arguments["key_range"] = make_key_range(2, 700, end=450, device="cuda")
    out = on_hopper(poison_unseen(call))
    assert not out[1].any()


def test_keys_that_neither_hides_alone():
    """What the range leaves of a key to some queries the mask takes from those: nobody sees it, and it holds NaN."""
    call = build((), 256, 256, head_dim=64, dtype=torch.bfloat16, device="cuda")
    keep = torch.ones(1, 1, 256, 256, dtype=torch.bool)
    keep[..., 40:, 39] = False  # causal attention hides key 39 from those before
    keep[..., 39, 39] = False
    call.arguments["is_causal"] = True
    on_hopper(with_mask(call, keep))
    assert call.key[:, :, 39].isnan().all()
    lo = torch.arange(256).expand(2, -1)
    call = build((), 256, 256, head_dim=64, dtype=torch.bfloat16, device="cuda")
    call.arguments["key_range"] = make_row_ranges(lo - lo % 8, lo - lo % 8 + 8, 256).cuda()
    keep = torch.arange(256) % 8 < 5
    on_hopper(with_mask(call, keep.expand(1, 1, 256, 256).contiguous()))
    assert call.value[:, :, 7].isnan().all()


def test_masks_that_say_what_causal_attention_does():
    """And what windows do, against those themselves."""
    call = build((), 700, 700, heads=(8, 2), head_dim=128, dtype=torch.bfloat16, device="cuda")
    distance = torch.arange(700, device="cuda")[:, None] - torch.arange(700, device="cuda")
    for options, keep in (
        ({"is_causal": True}, distance >= 0),
        ({"is_causal": True, "window": 100}, (distance >= 0) & (distance < 100)),
    ):
        want = call.run(**options)
        for mask in (keep, torch.zeros(keep.shape, device="cuda").masked_fill(~keep, -torch.inf).bfloat16()):
            got = call.run(mask=mask[None, None])
            torch.testing.assert_close(got, want, atol=4e-3, rtol=2e-2)


def draw(seed: int):
    generator = random.Random(seed)
    head_dim = generator.choice((64, 96, 128, 56, 40, 88, 120))
    kind = generator.choice(("bool", "float", "bias"))
    features = list(generator.choice(BESIDE))
    for feature in generator.sample(("softcap", "sinks", "lse", "gqa-7to1", "mqa", "strides"), k=2):
        if all(together(feature, other) for other in features):
            features.append(feature)
    num_queries = generator.choice((17, 63, 65, 127, 128, 129, 193, 300, 500, 1000))
    num_keys = num_queries + generator.choice((0, 0, 1, 13, 64, 129, 1000))
    batch_size = generator.choice((1, 3, 9) if num_queries * num_keys < 300_000 else (1, 2))
    dtype = generator.choice((torch.float16, torch.bfloat16))
    call = build(
        features, num_queries, num_keys, batch_size=batch_size, heads=(4, 2), head_dim=head_dim, dtype=dtype,
        device="cuda", seed=seed,
    )  # fmt: skip
    full = (batch_size, call.query.shape[1], num_queries, num_keys)
    shape = tuple(1 if generator.random() < 0.4 else size for size in full)
    mask = masks(kind, shape, torch.Generator().manual_seed(seed), dtype)
    return features, kind, shape, with_mask(call, mask)


@pytest.mark.parametrize("block", range(20))
def test_random_calls(block, poisoned_empty):
    for seed in range(20 * block, 20 * block + 20):
        features, kind, shape, call = draw(seed)
        try:
            on_hopper(call)
        except AssertionError as error:
            raise AssertionError(
                f"seed {seed}, {features}, {kind} {shape}, {list(call.query.shape)}: {error}"
            ) from error


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_repeats(head_dim, kind):
    """Some thousand tiles, over and over: whoever misses a barrier waits for ever, or computes other bits."""
    call = build(
        ("causal",), 777, 1300, batch_size=4, heads=(16, 4), head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
    )
    mask = masks(kind, (1, 16, 777, 1300), torch.Generator().manual_seed(0), torch.bfloat16)
    first = on_hopper(with_mask(call, mask))
    for _ in range(300):
        assert torch.equal(call.run(), first)


def test_in_a_cuda_graph():
    """The map is made anew at each replay: a mask that was written to in between counts."""
    call = build((), 300, 300, head_dim=64, dtype=torch.bfloat16, device="cuda")
    mask = torch.ones(2, 1, 300, 300, dtype=torch.bool, device="cuda")
    call.run(mask=mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call.run(mask=mask)
    for seed in range(3):
        mask.copy_(masks("bool", mask.shape, torch.Generator().manual_seed(seed), torch.bool))
        graph.replay()
        assert_right(out, call._replace(arguments={"mask": mask}))


def test_negative_controls():
    call = build((), 200, 300, head_dim=64, dtype=torch.bfloat16, device="cuda")
    for kind in ("bool", "float"):
        mask = masks(kind, (2, 4, 200, 300), torch.Generator().manual_seed(5), torch.bfloat16).cuda()
        call.arguments["mask"] = mask
        on_hopper(call)
        for other in (mask.roll(1, 3), mask.roll(1, 2), mask.flip(1), mask.flip(0)):
            with pytest.raises(AssertionError):
                assert_right(call.run(mask=other), call)
