"""Where PyTorch computes on a CPU: the calls that `sdpa` makes and no others, and still no NaN out of padding."""

import pytest
import torch
import transformers
from flashcore_kernels import op
from flashcore_kernels.device import Device

from flashcore_hf import as_sdpa, compat, masks
from flashcore_hf.attention import flashcore_attention

from .compare import TOLERANCE, greedy, logit_error
from .models import HIDDEN, SIZES, model_pair, prompts, skip_without_config
from .test_not_causal import triple


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch, through_torch):
    for module in (as_sdpa, masks, op):
        monkeypatch.setattr(module, "device_of", lambda device: Device("torch", reason="the test asks for it"))


@pytest.fixture
def calls(monkeypatch):
    """What torch's scaled_dot_product_attention is called with, a dict a call; tensors by shape, masks by value."""
    as_sdpa._gradients_of_nothing_are_zero(torch.float32)  # tries once, by a call of its own
    made, original = [], torch.nn.functional.scaled_dot_product_attention

    def recorded(query, key, value, **more):
        mask = more.pop("attn_mask", None)
        said = {"shapes": [tuple(t.shape) for t in (query, key, value)], **more}
        made.append({**said, "mask": None if mask is None else (mask.dtype, mask.tolist())})
        return original(query, key, value, attn_mask=mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    return made


def encoder(name: str):
    """A tiny BERT or ViT of the class."""
    config_class = getattr(transformers, f"{name}Config")
    skip_without_config(config_class)
    sizes = {
        key: SIZES[key] for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
    }
    config = config_class(**sizes, initializer_range=SIZES["initializer_range"], **(
        {"image_size": 32, "patch_size": 8} if name == "ViT" else {"vocab_size": SIZES["vocab_size"]}))  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{name}Model")._from_config(config, attn_implementation="sdpa").eval()


def both(model, calls: list, run) -> tuple:
    """(calls under sdpa, calls under flashcore, answers of each) of one run."""
    answers, made = [], []
    for name in ("sdpa", "flashcore"):
        model.set_attn_implementation(name)
        calls.clear()
        answers.append(run())
        made.append(list(calls))
    return made[0], made[1], answers


needs_switch = pytest.mark.skipif(compat.VERSION < (4, 54), reason="set_attn_implementation is 4.54's")


@needs_switch
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi", "bert"])
def test_a_forward_makes_sdpas_calls(model_type, padding, grad, calls):
    if model_type == "bert" and compat.VERSION < (5, 0):
        pytest.skip("BERT has attention of its own before 5.0")
    model = encoder("Bert") if model_type == "bert" else model_pair(model_type)[1]
    ids, mask = prompts(3, 11, padding)
    with torch.set_grad_enabled(grad):
        sdpa, ours, answers = both(model, calls, lambda: model(ids, attention_mask=mask)[0])
    assert sdpa and ours == sdpa
    torch.testing.assert_close(*(answer[mask.bool()] for answer in answers), atol=0, rtol=0)
    # The control: without padding, and where all is in the window, no mask is given; else it is.
    masked = padding is not None or model_type == "mistral"
    assert all((call["mask"] is not None) == masked for call in ours)


@needs_switch
def test_images_need_no_mask(calls):
    model = encoder("ViT")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sdpa, ours, answers = both(model, calls, lambda: model(pixels)[0])
    assert len(ours) == 2 and ours == sdpa and all(call["mask"] is None and not call["is_causal"] for call in ours)
    torch.testing.assert_close(*answers, atol=0, rtol=0)


@needs_switch
@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_generation_makes_sdpas_calls(model_type, padding, calls):
    model = model_pair(model_type)[1]
    ids, mask = prompts(2, 7, padding)
    sdpa, ours, answers = both(model, calls, lambda: greedy(model, ids, mask, 6, pad_token_id=0))
    assert len(sdpa) == 2 * 6 and ours == sdpa and torch.equal(*answers)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_oss", "mistral"])
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_like_eager(model_type, padding):
    try:
        eager, model = model_pair(model_type)
    except (ValueError, KeyError) as error:
        pytest.skip(str(error))
    ids, mask = prompts(3, 11, padding)
    assert logit_error(eager, model, ids, mask) <= TOLERANCE


@pytest.mark.parametrize("mask", ["none", "ones", "left"])
def test_layers_that_are_not_causal(mask):
    """What `sdpa` leaves out is everything for them, and what it does not is causal."""
    _, other, model = triple("llama")
    ids, padding = prompts(3, 9, "left" if mask == "left" else None)
    arguments = {} if mask == "none" else {"attention_mask": padding}
    with torch.no_grad():
        got, want = (each(ids, **arguments).logits[padding.bool()] for each in (model, other))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


class Layer(torch.nn.Module):
    is_causal, num_key_value_groups = True, 2


def layer_inputs(dtype=torch.float32, queries: int = 5, keys: int = 9):
    """(query, key, value, mask): the second sequence's first four keys are hidden, its first query sees none."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, 16, generator=generator).to(dtype)
        for heads, length in ((4, queries), (2, keys), (2, keys))
    )
    mask = torch.ones(2, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
    mask[1, :, :, :4] = False
    mask[1, :, 0] = False
    return query, key, value, mask


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("where", ["key", "value", "both"])
@pytest.mark.parametrize("what", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("kind", ["bool", "float", "bias"])
def test_nothing_comes_out_of_hidden_keys(kind, what, where, grad):
    query, key, value, mask = layer_inputs()
    poisoned = {"key": key.clone(), "value": value.clone()}
    for name in poisoned if where == "both" else (where,):
        poisoned[name][1, :, :4] = what
    more = {}
    if kind == "bias":
        more["position_bias"] = torch.randn(1, 4, 5, 9, generator=torch.Generator().manual_seed(1))
    if kind == "float":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)

    def run(key, value):
        tensors = [t.clone().requires_grad_(grad) for t in (query, key, value)]
        output, _ = flashcore_attention(Layer(), *tensors, mask, **more)
        if not grad:
            return output, ()
        return output, torch.autograd.grad(output, tensors, torch.full_like(output, 4.0))

    expected, grads = run(key, value)
    got, got_grads = run(**poisoned)
    torch.testing.assert_close(got, expected)
    assert not expected[1, 0].any(), "a query that sees no key gives zeros"
    for a, b in zip(got_grads, grads):
        torch.testing.assert_close(a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_control_sdpa_lets_nan_through(dtype):
    query, key, value, mask = layer_inputs(dtype)
    for name in ("key", "value"):
        poisoned = {"key": key, "value": value, name: {"key": key, "value": value}[name].clone()}
        poisoned[name][1, :, :4] = float("nan")
        theirs, _ = compat.attention_registry()["sdpa"](Layer(), query, **poisoned, attention_mask=mask)
        ours, _ = flashcore_attention(Layer(), query, **poisoned, attention_mask=mask)
        assert theirs.isnan().any() and ours.isfinite().all()


def test_a_mask_that_was_written_in_counts(paths):
    """A model that hides more keys in a mask of ours gets that mask, although `sdpa` would have had none."""
    model = encoder("Bert") if compat.VERSION >= (5, 0) else pytest.skip("BERT makes its own masks before 5.0")
    model.set_attn_implementation("flashcore")
    seen = []
    masks_made = masks.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    original = masks_made["flashcore"]

    def hides_a_key(**kwargs):
        mask = original(**kwargs)
        assert masks.is_left_out(mask, 7, 7) == (True, False)
        if seen:
            mask[..., 3] = False
            assert not masks.is_left_out(mask, 7, 7)[0]
        seen.append(mask)
        return mask

    ids, ones = prompts(2, 7)
    try:
        masks_made["flashcore"] = hides_a_key
        with torch.no_grad():
            whole, hidden = (model(ids, attention_mask=ones)[0] for _ in range(2))
    finally:
        masks_made["flashcore"] = original
    ones[:, 3] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=ones)[0]
    torch.testing.assert_close(hidden, expected)
    assert (whole - expected).abs().max() > 1e-3 and whole.shape[-1] == HIDDEN


def test_what_does_not_fit_goes_the_ordinary_way():
    query, key, value, mask = layer_inputs()
    for module, more in (
        (torch.nn.Module(), {"attention_mask": mask}),  # it does not say how many query heads share a key
        (Layer(), {"attention_mask": mask.double()}),
        (Layer(), {"attention_mask": mask[..., :3]}),
    ):
        arguments = {"position_bias": None, "causal": False, "window": None, "scaling": None, "dropout": 0.0, **more}
        assert as_sdpa.attend_as_sdpa(module, query, key, value, **arguments) is None
    assert as_sdpa.serves(query, key, value, (None,))
    assert not as_sdpa.serves(query, key, value, (None, torch.ones(2)))
    with torch._subclasses.FakeTensorMode() as mode:
        assert not as_sdpa.serves(*(mode.from_tensor(t) for t in (query, key, value)), (None,))
