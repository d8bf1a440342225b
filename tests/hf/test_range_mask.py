"""RangeMask: small in models that hand it on, and the dense mask wherever anything else looks at it."""

import copy
import io
import pickle

import pytest
import torch
from flashcore_kernels import make_key_range, visible
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils

import flashcore_hf.attention
from flashcore_hf.masks import flashcore_mask
from flashcore_hf.models import uses_interface
from flashcore_hf.range_mask import RangeMask, can_be_made

from .test_masks import padding, request

for_encoders = pytest.mark.skipif(
    not hasattr(masking_utils, "create_bidirectional_mask"), reason="this Transformers makes encoders' masks elsewhere"
)


def made(kind: str | None = "holes") -> RangeMask:
    """A causal mask of three sequences, 9 queries on 9 keys."""
    key_mask = padding(9, kind)
    return RangeMask(make_key_range(3, 9, right=0, key_mask=key_mask, device="cpu"), 9, 9)


def values() -> torch.Tensor:
    return torch.ones(9, 9, dtype=torch.bool).tril() & padding(9, "holes")[:, None, None]


def test_is_what_sdpa_gets_until_it_is_read():
    mask = made()
    assert (mask.shape, mask.dtype, mask.device) == ((3, 1, 9, 9), torch.bool, torch.device("cpu"))
    assert mask.dim() == 4 and mask.is_contiguous() and not mask.requires_grad
    assert mask._dense is None, "asking for shapes wrote the mask down"
    assert torch.equal(mask.dense(), values())
    assert mask.dense() is mask.dense()
    assert type(mask.dense()) is torch.Tensor


SCORES = torch.arange(9.0)
READ = {
    "sliced": lambda mask: mask[:, :, 2:5, :7],
    "by a list": lambda mask: mask[[2, 0]],
    "expanded": lambda mask: mask.expand(3, 4, 9, 9),
    "repeated": lambda mask: mask.repeat_interleave(2, dim=0),
    "inverted": lambda mask: ~mask,
    "added": lambda mask: mask + SCORES,
    "added to": lambda mask: SCORES + mask,
    "where": lambda mask: torch.where(mask, SCORES, -1.0),
    "filling": lambda mask: SCORES.expand(3, 1, 9, 9).masked_fill(~mask, 0.0),
    "and another": lambda mask: mask & mask.mT,
    "as a number": lambda mask: mask.to(torch.float32),
    "all": lambda mask: mask.all(),
    "cat": lambda mask: torch.cat([mask, mask], dim=-1),
    "cloned": lambda mask: mask.clone(),
    "contiguous": lambda mask: mask.contiguous()[0],
    "truth": lambda mask: bool(mask[0, 0, 3, 3]),
    "list": lambda mask: mask.tolist(),
    "numpy": lambda mask: torch.from_numpy(mask.numpy()),
    "saved": lambda mask: saved(mask),
    "pickled": lambda mask: pickle.loads(pickle.dumps(mask)),
    "copied": lambda mask: copy.copy(mask)[:],
    "copied deep": lambda mask: copy.deepcopy(mask),
    "in place": lambda mask: in_place(mask),
    "sdpa": lambda mask: torch.nn.functional.scaled_dot_product_attention(*heads(), attn_mask=mask),
    "vmap": lambda mask: torch.vmap(lambda line: line.sum())(mask),
}


def saved(mask: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(mask, file)
    file.seek(0)
    return torch.load(file)


def in_place(mask: torch.Tensor) -> torch.Tensor:
    mask[:, :, 0, :] = True
    return mask[:]


def heads() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 2, 9, 8, generator=generator) for _ in range(3))


@pytest.mark.parametrize("gradients", [False, True], ids=["", "gradients"])
@pytest.mark.parametrize("name", READ)
def test_read_is_the_dense_mask(name, gradients):
    with torch.set_grad_enabled(gradients):
        answer, expected = READ[name](made()), READ[name](values())
    assert type(answer) is type(expected)
    if isinstance(answer, torch.Tensor):
        torch.testing.assert_close(answer, expected, rtol=0, atol=0)
    else:
        assert answer == expected


@torch.no_grad()
def test_handed_on():
    mask = made()
    for handed_on in (mask.detach(), mask.alias() if hasattr(mask, "alias") else mask.detach(), mask.data):
        assert type(handed_on) is RangeMask and handed_on is not mask
        assert torch.equal(handed_on.dense(), values())


def test_moved_to_a_device():
    mask = made()
    mask.note = "what a layer will ask"
    assert mask.detach().note == mask.to("cpu", copy=True).note == mask.note
    moved = mask.to("meta")
    assert type(moved) is RangeMask and (moved.device.type, moved.shape) == ("meta", (3, 1, 9, 9))
    assert moved.key_range.device.type == "meta" and mask._dense is None
    copied = mask.to("cpu", copy=True)
    assert type(copied) is RangeMask and copied is not mask and torch.equal(copied.dense(), values())
    assert mask.to("cpu") is mask, "a device_map's hooks leave it as it is where it already is"


@torch.no_grad()
def test_a_compiled_part_of_a_model_takes_one():
    def part(mask, scores):
        return torch.where(mask, scores, -1.0).sum(-1)

    compiled = torch.compile(part, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(made(), SCORES), part(values(), SCORES))
    read = made()
    read[:, :, :, 4] = True
    with pytest.raises(Exception, match="after other parts had read it"):
        compiled(read, SCORES)


def written(mask, query):
    mask[:, :, :, 4] = True
    return query


def written_in_a_view(mask, query):
    mask[:, :, 2:, :].fill_(True)
    return query


def only_read(mask, query):
    return query + 0 * mask[:, :, :, :1].sum()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("reads", [written, written_in_a_view, only_read])
def test_a_compiled_part_sees_what_it_wrote_into_one(reads, backend):
    """It attended by the KeyRange of before."""
    torch._dynamo.reset()
    layer = Layer()

    def part(mask, query):
        query = reads(mask, query)
        return flashcore_hf.attention.flashcore_attention(layer, query, query, query, mask)[0]

    query = heads()[0]
    expected = part(made(), query)
    torch.testing.assert_close(torch.compile(part, backend=backend, fullgraph=True)(made(), query), expected)
    changed = flashcore_hf.attention.flashcore_attention(layer, query, query, query, made())[0] - expected
    assert (changed.abs().max() > 0.1) == (reads is not only_read), "the control"


def encoder_request(**extra) -> dict:
    kwargs = request(9, 9, padding=padding(9, "holes"), function=masking_utils.bidirectional_mask_function, **extra)
    kwargs["config"].model_type = "bert"
    return {**kwargs, "allow_is_causal_skip": False}


@for_encoders
def test_made_only_where_operators_run_at_once():
    with torch.no_grad():
        assert type(flashcore_mask(**encoder_request())) is RangeMask
        assert type(torch.vmap(lambda _: torch.tensor(can_be_made()))(torch.zeros(1))) is torch.Tensor
        assert not torch.vmap(lambda _: torch.tensor(can_be_made()))(torch.zeros(2)).any()
    assert type(flashcore_mask(**encoder_request())) is RangeMask, "gradients are on"


@for_encoders
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_what_hides_nothing_is_not_passed(padded, monkeypatch):
    """Where nobody gave a padding mask; one of values is not looked at, and may hide something."""
    kwargs = encoder_request()
    if not padded:
        kwargs["attention_mask"] = None
    mask = flashcore_mask(**kwargs)
    assert type(mask) is RangeMask and mask.hides_nothing is not padded
    assert mask.to("cpu", copy=True).hides_nothing is mask.detach().hides_nothing is mask.hides_nothing
    passed = []

    def attend(inputs, causal, window, *arguments):
        passed.append((inputs.key_range, inputs.mask, causal, window))
        return inputs.query.transpose(1, 2), None

    monkeypatch.setattr(flashcore_hf.attention, "attend", attend)
    query = torch.randn(3, 2, 9, 8)
    flashcore_hf.attention.flashcore_attention(Layer(), query, query, query, mask)
    ((key_range, dense, causal, window),) = passed
    assert dense is None and causal is False and window is None
    assert key_range is (mask.key_range if padded else None)
    if not padded:
        assert mask._key_range is None, "nobody has asked for one"
        assert mask.dense().all()


# What a layer may compute with its mask and something that has a gradient.
COMPUTED = {
    "masked_fill": lambda x, mask: x.masked_fill(~mask, -1.0).exp(),
    "where": lambda x, mask: torch.where(mask, x, x * 0.5),
    "product": lambda x, mask: x * mask,
    "sum": lambda x, mask: (x + mask).square(),
    "bias in place": lambda x, mask: (x * 1.0).masked_fill_(mask, 2.0).square(),
}


@pytest.mark.parametrize("way", ["plain", "checkpointed", "checkpointed, reentrant"])
@pytest.mark.parametrize("name", COMPUTED)
def test_gradients_beside_a_mask_that_is_read(name, way):
    def gradient(mask):
        x = torch.linspace(-1, 1, mask.numel()).view(mask.shape).requires_grad_()
        if way == "plain":
            answer = COMPUTED[name](x, mask)
        else:
            answer = checkpoint(COMPUTED[name], x, mask, use_reentrant="reentrant" in way)
        answer.sum().backward()
        return x.grad

    assert torch.equal(gradient(made()), gradient(values()))
    assert not torch.equal(gradient(made()), gradient(~values()))


@torch.no_grad()
def test_made_ahead_for_a_compiled_decode_of_a_static_cache(monkeypatch):
    """generate() makes masks ahead for a static cache, and compiles the model that takes them: one graph."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from transformers import StaticCache

    from .compare import TOLERANCE, named
    from .models import model_pair, prompts

    monkeypatch.setattr(flashcore_hf.masks, "takes_key_range", lambda config: False)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    eager, model = model_pair("llama", **small)
    ids, padded = prompts(2, 9, "left")
    full = torch.ones(2, 20, dtype=torch.long)
    full[:, :9] = padded
    counter = CompileCounterWithBackend("aot_eager")
    steps = {"eager": eager, "flashcore": torch.compile(model, backend=counter, fullgraph=True)}
    logits = {}
    for name, each in (("eager", eager), ("flashcore", model)):
        cache = StaticCache(config=each.config, max_batch_size=2, max_cache_len=20)
        place = {"cache_position": torch.arange(9)}
        out = each(ids, attention_mask=full, **named(cache), use_cache=True, **place)
        logits[name] = [out.logits[:, -1:]]
        for i in range(9, 15):
            mask = full
            place = {"cache_position": torch.tensor([i])}
            if name == "flashcore":
                kwargs = request(1, 20, query_start=torch.tensor(i), padding=full.bool(), batch_size=2)
                mask = flashcore_mask(**kwargs, allow_is_causal_skip=False)
                assert type(mask) is RangeMask
            token = logits["eager"][i - 9].argmax(-1)
            out = steps[name](
                token, attention_mask=mask, position_ids=full[:, :i].sum(-1, keepdim=True), **named(cache), **place
            )
            logits[name].append(out.logits)
    assert counter.frame_count == 1
    expected, got = (torch.cat(each, dim=1) for each in logits.values())
    assert (got - expected).abs().max() / expected.abs().max() < TOLERANCE


class Layer(torch.nn.Module):
    is_causal = False


@torch.no_grad()
@pytest.mark.parametrize("dropped", [0, 4])
def test_attention_sees_what_it_says(dropped):
    """Also in a layer whose cache has evicted keys: it sees the first columns, as it does of a dense mask."""
    query, key, value = heads()
    key, value = key[:, :, dropped:], value[:, :, dropped:]
    output, _ = flashcore_hf.attention.flashcore_attention(Layer(), query, key, value, made())
    mask = values()[..., : 9 - dropped]
    nothing = ~mask.any(-1, keepdim=True)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask | nothing)
    expected = expected.masked_fill(nothing, 0.0).transpose(1, 2)
    torch.testing.assert_close(output, expected)
    # The control: one that lies is believed.
    lying = RangeMask(make_key_range(3, 9, key_mask=padding(9, "holes"), device="cpu"), 9, 9)
    output, _ = flashcore_hf.attention.flashcore_attention(Layer(), query, key, value, lying)
    assert (output - expected).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("hand_on", [lambda mask: mask, torch.Tensor.detach, lambda mask: mask.to("cpu", copy=True)])
def test_attention_sees_what_a_model_wrote_into_it(hand_on):
    query, key, value = heads()
    mask, expected_mask = made("left"), made("left").dense().clone()
    mask[:, :, :, 4] = True
    expected_mask[:, :, :, 4] = True
    output, _ = flashcore_hf.attention.flashcore_attention(Layer(), query, key, value, hand_on(mask))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=expected_mask)
    torch.testing.assert_close(output, expected.transpose(1, 2))
    unwritten, _ = flashcore_hf.attention.flashcore_attention(Layer(), query, key, value, made("left"))
    assert (unwritten - output).abs().max() > 0.1, "the control"


def encoders() -> dict:
    from transformers import BartConfig, BertConfig, ModernBertConfig

    small = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    one = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "bert": BertConfig(**small, **one),
        "modernbert": ModernBertConfig(**small, **one, local_attention=8, cls_token_id=1, sep_token_id=2),
        "bart": BartConfig(
            **small,
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_position_embeddings=64,
        ),  # fmt: skip
    }


@for_encoders
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "holes"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "bart"])
def test_encoders_compute_what_eager_does_and_never_write_the_mask(name, side, monkeypatch):
    from transformers import AutoModel

    config = encoders()[name]
    if not uses_interface(AutoModel._model_mapping[type(config)]):
        pytest.skip("this Transformers' ModernBERT has attention of its own")
    torch.manual_seed(0)
    ours = AutoModel.from_config(copy.deepcopy(config), attn_implementation="flashcore").eval()
    eager = AutoModel.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    eager.load_state_dict(ours.state_dict())
    ids = torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(1))
    mask = padding(20, side)
    seen = []
    read = flashcore_hf.attention._read_range_mask
    monkeypatch.setattr(flashcore_hf.attention, "_read_range_mask", lambda *call: seen.append(call[0]) or read(*call))
    real = mask if name != "bart" else torch.ones_like(mask)  # its decoder pads nothing
    difference = ours(ids, attention_mask=mask.long())[0] - eager(ids, attention_mask=mask.long())[0]
    assert difference[real].abs().max() < 1e-5
    assert len(seen) == {"bert": 2, "modernbert": 2, "bart": 6}[name]
    # The control: what the padding hides counts.
    difference = ours(ids)[0] - eager(ids, attention_mask=mask.long())[0]
    assert difference[real].abs().max() > 1e-3


@for_encoders
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_compiled_exported_and_in_parallel():
    """Layers that are compiled one by one get the RangeMask; a model that is compiled or traced whole makes none."""
    config = encoders()["bert"]
    from transformers import AutoModel

    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation="flashcore").eval()
    ids, mask = torch.randint(3, 97, (3, 20)), padding(20, "holes").long()
    expected = model(ids, attention_mask=mask)[0]
    whole = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    exported = torch.export.export(model, (ids,), {"attention_mask": mask}).module()
    for other in (whole, exported, torch.nn.DataParallel(model)):
        torch.testing.assert_close(other(ids, attention_mask=mask)[0], expected)
    traced = torch.jit.trace(model, (ids, mask), strict=False)
    torch.testing.assert_close(traced(ids, mask)["last_hidden_state"], expected)
    for layer in model.encoder.layer:
        layer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(ids, attention_mask=mask)[0], expected)
    assert model(ids[:2, :13])[0].shape == (2, 13, 64), "another shape"


def test_visible_is_the_definition():
    mask = made()
    assert torch.equal(mask.dense(), visible(mask.key_range, 9, 9))
