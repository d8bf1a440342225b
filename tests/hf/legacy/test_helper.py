"""One call on a loaded model: what it computes on older versions, and what it says of models that it does not know.

From 4.53 on it sets the attention implementation, whose results the other tests of this folder are about.
"""

import os

import pytest
import torch
import transformers
from flashcore_kernels import key_range
from torch._dynamo.testing import CompileCounter
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache, cache_utils

import flashcore_hf
from flashcore_hf import backend, compat, environment
from flashcore_hf.legacy import classes
from flashcore_hf.legacy import helper as legacy
from flashcore_hf.legacy.helper import replace_attention_with_flashcore, restore_attention
from flashcore_hf.parity.rules import Settings, compare_model
from flashcore_hf.parity.runs import Cell, has_static_cache

from ..compare import TOLERANCE, greedy, logit_error
from ..models import VOCABULARY, model_pair, prompts, tiny_config

FULL = os.environ.get("FLASHCORE_TEST_FULL") == "1"
OLD = not compat.HAS_INTERFACE
only_old = pytest.mark.skipif(not OLD, reason="this Transformers has the attention interface")
only_new = pytest.mark.skipif(OLD, reason="this Transformers has no attention interface")
every_model = pytest.mark.parametrize("model_type", legacy.MODEL_TYPES)


@pytest.fixture
def masks_seen(monkeypatch):
    """Every mask that our attention function is given."""
    seen = []
    registry = compat.attention_registry()
    place = {"flashcore": classes.flashcore_attention} if registry is None else registry
    original = place["flashcore"]

    def listening(module, query, key, value, attention_mask=None, **kwargs):
        seen.append(attention_mask)
        return original(module, query, key, value, attention_mask, **kwargs)

    if registry is None:
        monkeypatch.setattr(classes, "flashcore_attention", listening)
    else:
        monkeypatch.setitem(registry, "flashcore", listening)
    return seen


def skip_without_static_cache(config):
    if not has_static_cache(config):
        pytest.skip("generate() of this Transformers has no static cache for this model")


@only_old
class TestGeneration:
    @pytest.mark.parametrize("padding", [None, "left"])
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @every_model
    def test_64_tokens(self, model_type, cache, padding, through_torch, masks_seen, paths):
        """From a prompt that is longer than the window already; and no mask of queries x keys is made."""
        eager, model = model_pair(model_type)
        options = {}
        if cache == "static":
            skip_without_static_cache(model.config)
            options["cache_implementation"] = "static"
        ids, mask = prompts(2, 9, padding)
        assert torch.equal(greedy(model, ids, mask, 64, **options), greedy(eager, ids, mask, 64, **options))
        assert paths["torch"] == len(masks_seen) == 2 * 64
        assert all(seen.dtype == torch.int32 for seen in masks_seen)

    @every_model
    def test_parity_on_the_kernels(self, model_type, tmp_path):
        """`parity`'s own rule, with its negative control; its rows need every call to be served by a kernel."""
        if not FULL and model_type != "mistral":
            pytest.skip("with FLASHCORE_TEST_FULL=1: Triton's interpreter is slow")
        config = tiny_config(model_type, initializer_range=0.3, num_key_value_heads=1)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        texts, steps = [[5, 9, 2, 11, 60, 7, 8], [3, 4, 5]], 64 if FULL else 16
        caches = ("dynamic", "static") if has_static_cache(config) else ("dynamic",)
        cells = [Cell(cache, texts[:size], steps, 0) for cache in caches for size in (2, 1)]
        rows = compare_model(
            Settings(
                model_type, str(tmp_path), torch.float32, "cpu", ("eager",), cells if FULL else cells[:1],
                interpreted=True,
            )
        )  # fmt: skip
        assert len(rows) == (len(cells) if FULL else 1)
        assert [row.failures for row in rows] == [[] for _ in rows]

    @pytest.mark.parametrize("model_type", ["llama", "mistral"])
    def test_caches_that_drop_keys(self, model_type, through_torch, masks_seen):
        """A sink cache, and Mistral's sliding one: through the model's own masks."""
        if compat.VERSION < {"llama": (4, 41), "mistral": (4, 46)}[model_type]:
            pytest.skip("Transformers' own code breaks on this cache")
        eager, model = model_pair(model_type)
        # A longer prompt than the window does so in later versions, too.
        ids, mask = prompts(1, 5)
        answers = []
        for each in (model, eager):
            if model_type == "llama":
                options = {"past_key_values": cache_utils.SinkCache(8, 2)}
            else:
                options = {"cache_implementation": "sliding_window"}
            answers.append(greedy(each, ids, mask, 12, **options))
        assert torch.equal(*answers)
        assert masks_seen and all(seen is None or seen.dtype != torch.int32 for seen in masks_seen)

    @pytest.mark.parametrize("way", ["beams", "prompt lookup"])
    @every_model
    def test_ways_of_decoding(self, model_type, way, through_torch):
        """Caches that are reordered, and cut."""
        eager, model = model_pair(model_type)
        if way == "beams":
            (ids, mask), options = prompts(2, 9, "left"), {"num_beams": 3}
        else:
            ids = torch.arange(3, 9).repeat(3)[None]
            # Some versions need a token to stop at.
            mask, options = torch.ones_like(ids), {"prompt_lookup_num_tokens": 4, "eos_token_id": VOCABULARY - 1}
        assert torch.equal(greedy(model, ids, mask, 12, **options), greedy(eager, ids, mask, 12, **options))

    def test_dynamic_cache_after_a_static_one(self, through_torch):
        """4.40 leaves an empty static cache on the layers, and by itself loses the keys of the next dynamic one."""
        eager, model = model_pair("llama")
        ids, mask = prompts(2, 9, "left")
        greedy(model, ids, mask, 3, cache_implementation="static")
        assert torch.equal(greedy(model, ids, mask, 12), greedy(eager, ids, mask, 12))


@only_old
class TestForward:
    @pytest.mark.parametrize("chunks", [(13,), (5, 8), (1, 1, 11)], ids=str)
    @pytest.mark.parametrize("cache", ["tuple", "DynamicCache", "StaticCache"])
    @every_model
    def test_a_prompt_in_pieces(self, model_type, cache, chunks, through_torch):
        """In each form that a cache comes in. NaN in unfilled slots reaches nothing."""
        if cache == "tuple" and compat.VERSION >= (4, 48):
            pytest.skip("this Transformers takes no tuples")
        eager, model = model_pair(model_type)
        ids, mask = prompts(3, 13, "left")
        past, fixed = DynamicCache(), {}
        if cache == "tuple":
            past = None
        if cache == "StaticCache":
            if compat.VERSION == (4, 40) or not has_static_cache(model.config):
                pytest.skip("no such object in this Transformers for this model")
            past = static_cache(model.config, 3, 40)
        got, start = [], 0
        with torch.no_grad():
            expected = eager(ids, attention_mask=mask).logits
            for size in chunks:
                part = slice(start, start + size)
                start += size
                if cache == "StaticCache":
                    fixed = {"cache_position": torch.arange(part.start, part.stop)}
                out = model(ids[:, part], attention_mask=mask[:, :start], past_key_values=past, use_cache=True, **fixed)
                past = out.past_key_values
                got.append(out.logits)
        assert isinstance(past, tuple) is (cache == "tuple" or compat.VERSION == (4, 40) and model_type == "llama")
        error = ((torch.cat(got, dim=1) - expected).abs() * mask[..., None]).max() / expected.abs().max()
        assert error < TOLERANCE

    @pytest.mark.parametrize("padding", [None, "left", "right", "absent"])
    @pytest.mark.parametrize("seen", [0, 9], ids=["prompt", "later"])
    @every_model
    def test_range_says_what_the_models_own_mask_says(self, model_type, seen, padding, through_torch, masks_seen):
        """Key by key. The window is not the same in all versions, and Qwen2 has one in some of them only."""
        eager, model = model_pair(model_type)
        ids, mask = prompts(3, 13, None if padding == "absent" else padding)
        own = []
        eager.model.layers[0].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: own.append(kwargs["attention_mask"]), with_kwargs=True
        )
        with torch.no_grad():
            for each in (eager, model):
                past = None
                if seen:
                    past = each(ids[:, :seen], attention_mask=mask[:, :seen], use_cache=True).past_key_values
                given = None if padding == "absent" else mask
                each(ids[:, seen:], attention_mask=given, past_key_values=past, use_cache=True)
        shown = key_range.visible(masks_seen[-1], 13 - seen, 13)
        assert torch.equal(shown, own[-1][..., :13] == 0)
        assert not shown.all()

    @pytest.mark.parametrize("scaling", ["linear", "dynamic"])
    def test_scaled_rotary_embedding(self, scaling, through_torch):
        eager, model = model_pair("llama", rope_scaling={"type": scaling, "factor": 2.0}, max_position_embeddings=8)
        plain, _ = model_pair("llama", max_position_embeddings=8)
        ids, mask = prompts(2, 13, "left")
        assert logit_error(eager, model, ids, mask) < TOLERANCE
        assert logit_error(plain, model, ids, mask) > 100 * TOLERANCE

    @pytest.mark.parametrize("kind", ["own float mask", "weights"])
    @every_model
    def test_dense_mask_and_weights(self, model_type, kind, through_torch):
        eager, model = model_pair(model_type)
        ids, mask = prompts(2, 11)
        with torch.no_grad():
            if kind == "weights":
                expected = eager(ids, attention_mask=mask, output_attentions=True).attentions
                got = model(ids, attention_mask=mask, output_attentions=True).attentions
                torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=1e-4)
                return
            if compat.VERSION < (4, 42):
                pytest.skip("this Transformers takes 4-D masks in a form of its own")
            seen = torch.ones(11, 11, dtype=torch.bool).tril()
            seen[:, :4] = True
            additive = torch.zeros(2, 1, 11, 11).masked_fill(~seen, torch.finfo(torch.float32).min)
            assert logit_error(eager, model, ids, additive) < TOLERANCE
            assert logit_error(eager, model, ids, mask) < TOLERANCE
            difference = model(ids, attention_mask=additive).logits - model(ids, attention_mask=mask).logits
            assert difference.abs().max() > 0.01

    @every_model
    def test_compiled_decode_step(self, model_type, through_torch):
        """fullgraph, with a static cache: the tokens of eager, and no more graphs than sdpa takes."""
        if compat.VERSION < (4, 45) or (not FULL and model_type != "llama"):
            pytest.skip("too old to be compiled whole, or not asked for by FLASHCORE_TEST_FULL=1")
        eager, model = model_pair(model_type)
        ids, mask = prompts(2, 9, "left")
        expected = greedy(eager, ids, mask, 8)[:, 9:]
        _, plain = model_pair(model_type, implementation="sdpa")
        tokens, graphs = compiled_decode(model, ids, mask, 8)
        assert torch.equal(tokens, expected)
        assert graphs <= compiled_decode(plain, ids, mask, 8)[1]

    def test_a_mask_that_is_too_short_is_an_error(self, through_torch):
        _, model = model_pair("qwen2")
        ids, mask = prompts(2, 9)
        with torch.no_grad():
            past = model(ids, attention_mask=mask, use_cache=True).past_key_values
            with pytest.raises(ValueError, match="9 columns, and with those in the cache there are 10 keys"):
                model(ids[:, :1], attention_mask=mask, past_key_values=past, use_cache=True)

    @pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
    @every_model
    def test_training_gives_eagers_gradients(self, model_type, checkpointing, through_torch):
        """Also where two forwards, with different masks, are recomputed in one backward."""
        eager, model = model_pair(model_type)
        batches = [prompts(3, 13, "left"), prompts(2, 11, seed=2)]
        gradients = []
        for each in (eager, model):
            each.train()
            if checkpointing:
                each.gradient_checkpointing_enable({"use_reentrant": False})
            losses = []
            for ids, mask in batches:
                # A query that sees no key gives zeros here and the mean of all values in eager: no loss on it.
                counts = mask.bool() & mask.roll(1, dims=1).bool()
                losses.append(each(ids, attention_mask=mask, labels=ids.masked_fill(~counts, -100)).loss)
            sum(losses).backward()
            gradients.append({name: parameter.grad for name, parameter in each.named_parameters()})
        for name, expected in gradients[0].items():
            assert (gradients[1][name] - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-7, name

    @pytest.mark.parametrize("defect", ["scale", "padding", "window", "nothing"])
    @every_model
    def test_negative_controls(self, model_type, defect, through_torch, monkeypatch):
        """A scale of 1.5x, padding that is ignored, a window off by one: the comparisons above would see each."""
        eager, model = model_pair(model_type)
        made = classes.make_key_range

        def ignoring_padding(*args, **kwargs):
            return made(*args, **{**kwargs, "key_mask": None})

        def window_off_by_one(*args, **kwargs):
            return made(*args, **{**kwargs, "left": kwargs["left"] + 1 if kwargs["left"] >= 0 else 5})

        if defect == "scale":
            for layer in model.model.layers:
                layer.self_attn.scaling *= 1.5
        elif defect != "nothing":
            wrong = {"padding": ignoring_padding, "window": window_off_by_one}[defect]
            monkeypatch.setattr(classes, "make_key_range", wrong)
        ids, mask = prompts(3, 13, "left")
        error = logit_error(eager, model, ids, mask)
        assert error < TOLERANCE if defect == "nothing" else error > 100 * TOLERANCE


def static_cache(config, batch_size: int, slots: int, fill: float = torch.nan) -> StaticCache:
    """An empty one, with `fill` in every slot; its arguments have had several names."""
    size = {"batch_size": batch_size} if (4, 45) <= compat.VERSION < (4, 48) else {"max_batch_size": batch_size}
    device = {"device": torch.device("cpu")} if compat.VERSION < (4, 54) else {}
    cache = StaticCache(config=config, max_cache_len=slots, **size, **device)
    for name in ("key_cache", "value_cache"):
        for buffer in getattr(cache, name, ()):
            buffer.fill_(fill)
    return cache


@torch.no_grad()
def compiled_decode(model, ids, mask, steps: int) -> tuple[torch.Tensor, int]:
    """Greedy tokens `[B, steps]` of a compiled decode with a static cache, and how many graphs it took."""
    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(model.forward, backend=counter, fullgraph=True)
    batch_size, length = ids.shape
    cache = static_cache(model.config, batch_size, 40, fill=0.0)
    mask = torch.nn.functional.pad(mask, (0, 40 - length))
    ranks = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(
        ids, attention_mask=mask[:, :length], position_ids=ranks[:, :length], past_key_values=cache, use_cache=True,
        cache_position=torch.arange(length),
    )  # fmt: skip
    tokens = [out.logits[:, -1:].argmax(-1)]
    for position in range(length, length + steps - 1):
        mask[:, position] = 1
        out = step(
            input_ids=tokens[-1], attention_mask=mask, position_ids=(mask.cumsum(-1) - 1)[:, position : position + 1],
            past_key_values=cache, use_cache=True, cache_position=torch.tensor([position]),
        )  # fmt: skip
        tokens.append(out.logits[:, -1:].argmax(-1))
    torch._dynamo.reset()
    return torch.cat(tokens, dim=1), counter.frame_count


class TestErrors:
    """Each leaves the model as it was."""

    @only_old
    def test_another_model_type(self):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2))
        with pytest.raises(ValueError, match=r"model type gpt2\).*llama, mistral, qwen2.*4.40 to 4.52.*4.53"):
            replace_attention_with_flashcore(model)

    @only_new
    def test_a_model_without_the_interface(self):
        config = AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=2, vocab_size=50)
        model = AutoModelForCausalLM.from_config(config)
        before = model.config._attn_implementation
        with pytest.raises(ValueError, match="attention interface"):
            replace_attention_with_flashcore(model)
        assert model.config._attn_implementation == before and not hasattr(model, legacy._BEFORE)

    @every_model
    def test_calls_by_name(self, model_type):
        _, model = model_pair(model_type, implementation="sdpa")
        for name in legacy.MODEL_TYPES:
            call = getattr(legacy, f"replace_{name}_attention_with_flashcore")
            if name == model_type:
                assert call(model) is model and restore_attention(model) is model
            else:
                with pytest.raises(ValueError, match=f"this call is for {name}"):
                    call(model)

    def test_no_model(self):
        for call in (replace_attention_with_flashcore, restore_attention):
            with pytest.raises(TypeError, match="got str"):
                call("meta-llama/Llama-3.1-8B")
        with pytest.raises(ValueError, match="Linear"):
            replace_attention_with_flashcore(torch.nn.Linear(2, 2))

    @only_old
    def test_attention_of_somebody_else(self):
        _, model = model_pair("llama", implementation="sdpa")
        attention = model.model.layers[1].self_attn
        original = type(attention)
        attention.__class__ = type("MyAttention", (original,), {})
        with pytest.raises(ValueError, match="whose layers have a MyAttention"):
            replace_attention_with_flashcore(model)
        attention.__class__ = original
        attention.forward = lambda *args, **kwargs: None
        with pytest.raises(ValueError, match="something else has done so already"):
            replace_attention_with_flashcore(model)
        del attention.forward
        model.config._attn_implementation_internal = "flash_attention_2"
        with pytest.raises(ValueError, match='loaded with "flash_attention_2"'):
            replace_attention_with_flashcore(model)
        assert not any(map(classes.is_stand_in, model.modules()))

    @only_old
    def test_a_function_that_no_longer_calls_what_is_replaced(self):
        with pytest.raises(NotImplementedError, match="does not call make_mask"):
            classes._with_globals(lambda: 1, make_mask=print)


class TestWayIn:
    def test_import_and_env(self):
        assert flashcore_hf.import_error is None
        assert set(backend.status().values()) <= {"registered", "patched"}
        facts = environment.collect()
        assert facts["flashcore_hf"] == "imported"
        assert facts["way in"].startswith("helper for older versions" if OLD else "attention interface")
        assert ("attention classes" in facts["way in"]) is (compat.VERSION < (4, 48))

    @only_old
    def test_from_pretrained_says_what_to_call(self, tmp_path):
        model_pair("llama")[0].save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"needs Transformers 4.53 .*replace_attention_with_flashcore\(model\)"):
            AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flashcore")

    @only_old
    def test_disable_and_enable(self):
        patched = vars(transformers.PreTrainedModel)["_autoset_attn_implementation"]
        flashcore_hf.disable()
        try:
            assert vars(transformers.PreTrainedModel)["_autoset_attn_implementation"] is not patched
            assert "flashcore" not in (compat.attention_registry() or {})
            with pytest.raises(ValueError, match="attn_implementation"):
                AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation="flashcore")
        finally:
            flashcore_hf.enable()
        assert set(backend.status().values()) <= {"registered", "patched"}
