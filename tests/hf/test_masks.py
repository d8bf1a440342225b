"""The mask function's answers, read back as dense masks, beside the dense masks that sdpa would get."""

import functools
import inspect

import pytest
import torch
from flashcore_kernels.key_range import layout_of, visible
from flashcore_kernels.runtime import launch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from flashcore_hf.compat import CACHE_NAME
from flashcore_hf.masks import flashcore_mask
from flashcore_hf.models import takes_key_range
from flashcore_hf.patterns import CAUSAL, EVERYTHING, Pattern, recognise

from .compare import greedy, logit_error
from .models import model_pair, prompts, tiny_config

NEW_SIGNATURE = "q_length" in inspect.signature(masking_utils.sdpa_mask).parameters


def request(num_queries, num_keys, *, query_start=0, kv_offset=0, padding=None, batch_size=3, function=None, **extra):
    """A mask request as this Transformers makes it."""
    config = tiny_config("llama")
    config._attn_implementation = "flashcore"
    positions = torch.arange(num_queries) + query_start
    where = (
        {"q_length": num_queries, "q_offset": query_start, "device": torch.device("cpu")}
        if NEW_SIGNATURE
        else {"cache_position": positions}
    )
    return {
        "batch_size": batch_size, "kv_length": num_keys, "kv_offset": kv_offset, "attention_mask": padding,
        "mask_function": function or masking_utils.causal_mask_function, "config": config, "dtype": torch.float32,
        **where, **extra,
    }  # fmt: skip


def dense(kwargs) -> torch.Tensor:
    answer = masking_utils.sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    return answer.expand(kwargs["batch_size"], -1, -1, -1)


def padding(length: int, kind: str | None) -> torch.Tensor | None:
    if kind is None:
        return None
    mask = torch.ones(3, length, dtype=torch.bool)
    for row in range(3):
        if kind == "left":
            mask[row, : 2 * row] = False
        elif kind == "right":
            mask[row, length - row :] = False
        elif kind == "holes":
            mask[row, row + 1] = False
            mask[row, : row // 2] = False
        elif kind == "empty row" and row == 1:
            mask[row] = False
    return mask


FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(4),
}
if hasattr(masking_utils, "bidirectional_mask_function"):
    FUNCTIONS["bidirectional"] = masking_utils.bidirectional_mask_function
if hasattr(masking_utils, "sliding_window_bidirectional_mask_function"):
    FUNCTIONS["sliding both ways"] = masking_utils.sliding_window_bidirectional_mask_function(4)


@pytest.mark.parametrize("kind", [None, "left", "right", "holes", "empty row"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "shape",
    [(9, 9, 0), (1, 9, 8), (3, 12, 5), (2, 70, 37)],
    ids=["prefill", "decode", "static cache", "long static cache"],
)
def test_key_range_says_what_the_dense_mask_says(name, kind, shape):
    num_queries, num_keys, start = shape
    kwargs = request(
        num_queries, num_keys, query_start=start, padding=padding(start + num_queries, kind), function=FUNCTIONS[name]
    )
    answer = flashcore_mask(**kwargs)
    if answer is None:
        assert NEW_SIGNATURE and (num_queries, kind) == (1, None) and dense(kwargs).all()
        return
    assert answer.dtype == torch.int32 and layout_of(answer, 3, num_queries, num_keys) == "sequence"
    assert torch.equal(visible(answer, num_queries, num_keys), dense(kwargs))


@pytest.mark.skipif(not NEW_SIGNATURE, reason="before 5.4 the host is not told where a query stands")
class TestNothingHidden:
    """One query that sees all of the keys gets no mask, which fits layers of any length."""

    def test_the_last_query_gets_none(self):
        for name in ("causal", "sliding", "bidirectional"):
            assert flashcore_mask(**request(1, 4, query_start=3, function=FUNCTIONS[name])) is None

    @pytest.mark.parametrize(
        "asked",
        [
            {"padding": torch.ones(3, 9, dtype=torch.bool)},  # whose values the host does not know
            {"query_start": 7},  # a slot behind it
            {"query_start": torch.tensor(8)},  # a cache that counts on the device
            {"function": FUNCTIONS["sliding"]},  # 9 keys, and a window of 4
            {"allow_is_causal_skip": False},  # slots of the cache may not be filled
        ],
        ids=lambda asked: next(iter(asked)),
    )
    def test_else_a_key_range(self, asked):
        kwargs = request(1, 9, **{"query_start": 8, **asked})
        answer = flashcore_mask(**kwargs)
        assert layout_of(answer, 3, 1, 9) == "sequence" and torch.equal(visible(answer, 1, 9), dense(kwargs))

    def test_more_queries_get_a_key_range(self):
        assert (
            flashcore_mask(**request(9, 9)) is not None and flashcore_mask(**request(2, 9, query_start=7)) is not None
        )


class TestLayersOfDifferentLengths:
    """A cache that evicts tokens (kvpress, PyramidKV) keeps more in some layers than in others; the mask is layer 0's.

    Layer 1 took a KeyRange of 13 keys for its own 25 and lost the last 12, the new token among them.
    """

    @staticmethod
    def step(model, ids, kept, **kwargs):
        from transformers import DynamicCache

        cache = DynamicCache()
        name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
        position = torch.full((ids.shape[0], 1), ids.shape[1])
        if not NEW_SIGNATURE:
            kwargs["cache_position"] = torch.tensor([kept])
        with torch.no_grad():
            model(ids, **{name: cache})
            layer = cache.layers[0]
            layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
            return model(ids[:, :1], **{name: cache}, position_ids=position, **kwargs).logits

    @pytest.fixture
    def models(self):
        if not hasattr(__import__("transformers").DynamicCache(), "layers"):
            pytest.skip("caches have no layers in this version")
        return model_pair("llama", implementation="sdpa")[1], model_pair("llama")[1]

    @pytest.mark.skipif(not NEW_SIGNATURE, reason="before 5.4 the host is not told where a query stands")
    @pytest.mark.parametrize("batch_size", [1, 2])
    @pytest.mark.parametrize("kept", [24, 12, 4])
    def test_without_padding_each_layer_sees_its_own(self, models, kept, batch_size):
        sdpa, model = models
        ids = prompts(batch_size, 24)[0]
        want = self.step(sdpa, ids, kept)
        torch.testing.assert_close(self.step(model, ids, kept), want, atol=1e-4, rtol=1e-4)
        if kept < 24:
            assert not torch.allclose(self.step(sdpa, ids, 24), want, atol=1e-3), "what is kept counts"

    @pytest.mark.parametrize("kept", [12, 4])
    def test_with_padding_they_are_refused(self, models, kept):
        """No mask of layer 0's length says which tokens layer 1 has kept."""
        ids = prompts(2, 24)[0]
        mask = torch.ones(2, kept + 1, dtype=torch.long)
        mask[0, :2] = 0
        with pytest.raises(ValueError, match=f"made for {kept + 1} keys, and the layer that got it has 25"):
            self.step(models[1], ids, kept, attention_mask=mask)


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int offset", "tensor offset"])
@pytest.mark.parametrize("kind", [None, "left"])
def test_sliding_cache_that_dropped_old_keys(kind, as_tensor):
    """Key slot 0 is position 7, as in a sliding cache; assisted decoding can make that a tensor."""
    offset = torch.tensor(7) if as_tensor else 7
    if as_tensor and not NEW_SIGNATURE:
        pytest.skip("only newer versions hand over tensors")
    kwargs = request(2, 5, query_start=10, kv_offset=7, padding=padding(12, kind), function=FUNCTIONS["sliding"])
    answer = flashcore_mask(**{**kwargs, "kv_offset": offset})
    assert answer.dtype == torch.int32
    assert torch.equal(visible(answer, 2, 5), dense(kwargs))


def test_negative_control_padding_and_window():
    """The comparison above would see padding that is ignored and a window that is off by one."""
    kwargs = request(9, 9, padding=padding(9, "left"), function=FUNCTIONS["sliding"])
    want = dense(kwargs)
    unpadded = flashcore_mask(**{**kwargs, "attention_mask": None})
    assert not torch.equal(visible(unpadded, 9, 9), want)
    wider = flashcore_mask(**{**kwargs, "mask_function": masking_utils.sliding_window_causal_mask_function(5)})
    assert not torch.equal(visible(wider, 9, 9), want)


@pytest.mark.skipif(not NEW_SIGNATURE, reason="the offset is a tensor of the cache's own from 5.4 on")
def test_answer_does_not_alias_the_caches_counter():
    counter = torch.tensor(5)
    answer = flashcore_mask(**request(1, 12, query_start=counter))
    before = answer.clone()
    counter += 1
    assert torch.equal(answer, before)


class TestPacked:
    DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 2, 3, 3, 3], [0] * 9, [0, 1, 2, 3, 4, 4, 4, 4, 4]])

    def function(self, window=None):
        parts = [masking_utils.packed_sequence_mask_function(self.DOCUMENTS)]
        base = FUNCTIONS["causal"] if window is None else masking_utils.sliding_window_causal_mask_function(window)
        return masking_utils.and_masks(base, *parts)

    @pytest.mark.parametrize("window", [None, 2, 4])
    def test_rows_say_what_the_dense_mask_says(self, window):
        kwargs = request(9, 9, function=self.function(window))
        answer = flashcore_mask(**kwargs)
        assert answer.dtype == torch.int32 and layout_of(answer, 3, 9, 9) == "rows"
        assert torch.equal(visible(answer, 9, 9), dense(kwargs))

    def test_numbers_out_of_order_are_dense(self):
        """ESM C hands over sequence numbers of its user's: a document's tokens may lie apart."""
        function = masking_utils.packed_sequence_mask_function(self.DOCUMENTS.flip(1))
        kwargs = request(9, 9, function=masking_utils.and_masks(FUNCTIONS["causal"], function))
        answer = flashcore_mask(**kwargs)
        assert answer.dtype == torch.bool and torch.equal(answer.expand(3, -1, -1, -1), dense(kwargs))


class TestRecognition:
    def test_known_parts(self):
        assert recognise({"mask_function": masking_utils.causal_mask_function}) == CAUSAL
        assert recognise({"mask_function": FUNCTIONS["sliding"]}) == Pattern(left=3, right=0)
        if "bidirectional" in FUNCTIONS:
            assert recognise({"mask_function": FUNCTIONS["bidirectional"]}) == EVERYTHING

    def test_intersections_keep_the_nearer_limit(self):
        assert Pattern(3, -1).and_(Pattern(5, 0)) == Pattern(3, 0)
        assert Pattern(-1, -1).and_(Pattern(5, 2)) == Pattern(5, 2)

    def test_unions_keep_the_farther_one(self):
        assert Pattern(3, 0).or_(Pattern(2, 5)) == Pattern(3, 5)
        assert Pattern(-1, 0).or_(Pattern(5, -1)) == EVERYTHING

    def test_a_function_of_that_name_of_somebody_else_is_unknown(self):
        def sliding_window_overlay(sliding_window):
            def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
                return kv_idx != sliding_window

            return inner_mask

        assert recognise({"mask_function": sliding_window_overlay(4)}) is None
        assert recognise({"mask_function": masking_utils.sliding_window_overlay(4)}) == Pattern(left=3)

    def test_a_function_that_wraps_one_of_transformers_is_unknown(self):
        """functools.wraps gives it the names of what it wraps, its module's too."""
        overlay = masking_utils.sliding_window_overlay(4)
        sliding_window = 3

        @functools.wraps(overlay)
        def thinned(batch_idx, head_idx, q_idx, kv_idx):
            return overlay(batch_idx, head_idx, q_idx, kv_idx) & (kv_idx % sliding_window != 1)

        assert recognise({"mask_function": thinned}) is None
        del thinned.__wrapped__
        assert recognise({"mask_function": thinned}) is None

    def test_a_window_that_shows_nothing_has_no_pattern(self):
        """-1 would say that there is no limit."""
        for window in (0, -1):
            assert recognise({"mask_function": masking_utils.sliding_window_causal_mask_function(window)}) is None

    @pytest.mark.parametrize("combine", ["and_masks", "or_masks"])
    def test_a_users_own_function_is_dense(self, combine):
        def odd(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx % 2 == 1

        function = getattr(masking_utils, combine)(masking_utils.causal_mask_function, odd)
        kwargs = request(9, 9, function=function, use_vmap=True)
        answer = flashcore_mask(**kwargs)
        assert answer.dtype == torch.bool
        assert torch.equal(answer.expand(3, -1, -1, -1), dense(kwargs))

    def test_models_that_we_do_not_know_get_a_dense_mask(self):
        class OwnConfig(type(tiny_config("llama"))):
            """A LLaMA of somebody's own, whose code may read the mask."""

        config = OwnConfig()
        config._attn_implementation = "flashcore"
        assert takes_key_range(tiny_config("llama")) and not takes_key_range(config)
        answer = flashcore_mask(**{**request(9, 9, padding=padding(9, "left")), "config": config})
        assert answer.dtype == torch.bool


class Sizes(TorchDispatchMode):
    """Collects the shapes of all tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
        return out


def has_square(shapes, num_queries: int, num_keys: int) -> bool:
    """Whether some tensor has a query and a key dimension, or as many elements as both together."""
    return any(
        (num_queries in shape and num_keys in shape[shape.index(num_queries) + 1 :])
        or (num_queries * num_keys in shape)
        for shape in shapes
    )


# Lengths that occur nowhere else in the models, so that a shape tells.
LENGTH, SLOTS = 83, 113


@pytest.mark.parametrize("implementation", ["flashcore", "sdpa"])
@pytest.mark.parametrize("kind", [None, "left", "holes"])
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_no_tensor_of_queries_times_keys(model_type, cache, kind, implementation, monkeypatch):
    """sdpa beside it is the negative control: with padding, the same look finds its mask.

    Up to the launch: what kernels hold in registers is no tensor, and the interpreter would take minutes.
    """
    launched = []
    monkeypatch.setattr(launch, "launch", lambda *args, **options: launched.append(args))
    if implementation == "sdpa" and (kind is None or cache == "static"):
        pytest.skip("sdpa makes no mask there, or does not run")
    from transformers import StaticCache

    _, model = model_pair(model_type, implementation=implementation)
    ids, _ = prompts(3, LENGTH)
    mask = padding(LENGTH, kind)
    kwargs, slots = {"use_cache": cache != "none"}, LENGTH
    if cache == "static":
        slots = SLOTS
        kwargs[CACHE_NAME] = StaticCache(config=model.config, max_batch_size=3, max_cache_len=SLOTS)
    with torch.no_grad(), Sizes() as sizes:
        model(ids, attention_mask=None if mask is None else mask.long(), **kwargs)
    found = has_square(sizes.shapes, LENGTH, slots)
    assert found == (implementation == "sdpa")
    assert len(launched) == (0 if implementation == "sdpa" else model.config.num_hidden_layers)


@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_padding_in_a_model(kind):
    eager, model = model_pair("llama")
    ids, _ = prompts(3, 12)
    mask = padding(12, kind).long()
    assert logit_error(eager, model, ids, mask) < 2e-5
    if kind == "left":
        assert torch.equal(greedy(model, ids, mask, 8), greedy(eager, ids, mask, 8))
