"""Keywords that reach attention through a model: those for others pass, those unknown are errors with a way out."""

import inspect

import pytest
import torch
from flashcore_kernels import make_key_range
from transformers import DataCollatorWithFlattening

import flashcore_hf
from flashcore_hf import arguments
from flashcore_hf.attention import flashcore_attention

from .models import model_pair, prompts

pytestmark = pytest.mark.usefixtures("through_torch")

MODULE = torch.nn.Module()


def tensors(num_queries=7, num_keys=7):
    torch.manual_seed(0)
    return torch.randn(2, 4, num_queries, 16), torch.randn(2, 2, num_keys, 16), torch.randn(2, 2, num_keys, 16)


@pytest.fixture
def restored(monkeypatch):
    """What a test allows is forgotten after it."""
    monkeypatch.setattr(arguments, "_passing", set(arguments._passing))


class TestForOthers:
    """TRL 1.16's packing and the flattening collator send seq_idx, which was refused; losses send what they take."""

    def packed(self):
        documents = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 10, 11]}]
        try:
            collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
        except TypeError:
            pytest.skip("this Transformers' collator makes no seq_idx")
        return documents, collate(documents, return_tensors="pt")

    def test_flattened_documents_stay_apart(self):
        documents, batch = self.packed()
        assert {"seq_idx", "cu_seq_lens_q", "max_length_q"} <= batch.keys()
        eager, model = model_pair("llama")
        with torch.no_grad():
            got = model(**batch, use_cache=False)
            alone = [eager(torch.tensor([each["input_ids"]])).logits[0] for each in documents]
            torch.testing.assert_close(got.logits[0], torch.cat(alone), atol=1e-4, rtol=1e-4)
            # The control: as one document the second's logits are others.
            joined = eager(batch["input_ids"]).logits[0]
        assert (joined[4:] - alone[1]).abs().max() > 0.1

    @pytest.mark.parametrize("extra", ["shift_labels", "ignore_index", "num_items_in_batch"])
    def test_what_losses_take(self, extra):
        """The loss is eager's, and not the one that it is without the argument."""
        eager, model = model_pair("llama")
        ids, _ = prompts(2, 9)
        given = {
            "shift_labels": ids.roll(-1, dims=1).masked_fill(torch.arange(9) > 4, -100),
            "ignore_index": int(ids[0, 3]),
            "num_items_in_batch": 5,
        }[extra]
        with torch.no_grad():
            want = eager(ids, labels=ids, **{extra: given}).loss
            got = model(ids, labels=ids, **{extra: given}).loss
            without = eager(ids, labels=ids).loss
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert (want - without).abs() > 1e-2

    @pytest.mark.parametrize(
        "name", ["seq_idx", "logits_indices", "logits_processor_args", "special_tokens_mask", "cache"]
    )
    def test_the_answer_is_the_same(self, name):
        got, _ = flashcore_attention(MODULE, *tensors(), None, **{name: torch.arange(7)})
        want, _ = flashcore_attention(MODULE, *tensors(), None)
        assert torch.equal(got, want)


class TestUnknown:
    def test_names_itself_and_the_way_out(self):
        with pytest.raises(NotImplementedError) as caught:
            flashcore_attention(MODULE, *tensors(), None, key_temperature=torch.zeros(3, 4))
        message = str(caught.value)
        assert "'key_temperature' (a tensor of shape [3, 4], float32)" in message
        assert 'flashcore_hf.allow_argument("key_temperature")' in message
        assert "attn_implementation='eager'" in message

    def test_long_values_are_not_printed(self):
        with pytest.raises(NotImplementedError, match=r"\(a list of 5000\)") as caught:
            flashcore_attention(MODULE, *tensors(), None, key_temperature=list(range(5000)))
        assert len(str(caught.value)) < 500

    @pytest.mark.parametrize(
        "value, words",
        [
            (torch.zeros(2, 3, dtype=torch.int64), "a tensor of shape [2, 3], int64"),
            ([torch.zeros(9)] * 3, "a list of 3"),
            ({"a": 1}, "a dict of 1"),
            (True, "True"),
            (0.5, "0.5"),
            ("short", "'short'"),
            ("x" * 1000, "a str of 1000 characters"),
            (MODULE, "a Module"),
        ],
        ids=str,
    )
    def test_described(self, value, words):
        assert arguments.describe(value) == words

    @pytest.mark.usefixtures("restored")
    def test_allowed_is_passed_in_every_model(self):
        eager, model = model_pair("llama")
        ids, mask = prompts(2, 9, "left")
        with pytest.raises(NotImplementedError, match="allow_argument"):
            model(ids, attention_mask=mask, tags_of_mine=torch.ones(2))
        flashcore_hf.allow_argument("tags_of_mine")
        flashcore_hf.allow_argument("tags_of_mine")
        with torch.no_grad():
            got = model(ids, attention_mask=mask, tags_of_mine=torch.ones(2)).logits
            want = eager(ids, attention_mask=mask).logits
        torch.testing.assert_close(got[mask == 1], want[mask == 1], atol=1e-4, rtol=1e-4)
        with pytest.raises(NotImplementedError, match="'tags_of_yours'"):
            model(ids, attention_mask=mask, tags_of_yours=torch.ones(2))

    @pytest.mark.usefixtures("restored")
    @pytest.mark.parametrize("name", ["softcap", "head_mask", "sliding_window", "attention_mask", "query"])
    def test_what_attention_reads_cannot_be_allowed(self, name):
        with pytest.raises(ValueError, match=f"reads '{name}' itself"):
            flashcore_hf.allow_argument(name)

    @pytest.mark.usefixtures("restored")
    @pytest.mark.parametrize("name", ["alibi_slopes", "block_table", "score_mod", "cu_seqlens_q"])
    def test_what_changes_the_answer_cannot_be_allowed(self, name):
        with pytest.raises(ValueError, match="cannot be ignored"):
            flashcore_hf.allow_argument(name)
        with pytest.raises(NotImplementedError) as caught:
            flashcore_attention(MODULE, *tensors(), None, **{name: torch.ones(1)})
        assert "allow_argument" not in str(caught.value)

    def test_what_attention_reads_is_listed(self):
        assert set(inspect.signature(flashcore_attention).parameters) - {"kwargs"} == arguments.READ

    def test_a_name_is_a_string(self):
        with pytest.raises(TypeError, match="a list"):
            flashcore_hf.allow_argument(["a", "b"])

    @pytest.mark.parametrize("name", ["read_index", "write_index", "block_table", "k_cache"])
    def test_pages_are_named_for_what_they_are(self, name):
        with pytest.raises(NotImplementedError, match=rf"'{name}' \(a list of 2\).*continuous batching"):
            flashcore_attention(MODULE, *tensors(), None, **{name: [torch.arange(9000)] * 2})

    def test_a_paged_cache_is_refused(self):
        """Up to 5.23 it comes as `cache`, by which 5.24 means any cache."""
        cache = type("PagedAttentionCache", (), {})()
        with pytest.raises(NotImplementedError, match="a PagedAttentionCache.*continuous batching"):
            flashcore_attention(MODULE, *tensors(), None, cache=cache)
        flashcore_attention(MODULE, *tensors(), None, cache=object())


class TestHeadMask:
    """Up to 4.57 models take a factor for each head's weights, applied after the softmax."""

    HEADS = torch.tensor([0.0, 1.0, 0.5, 2.0])

    @pytest.mark.parametrize("shape", [(4,), (1, 4, 1, 1), (4, 1, 1)], ids=str)
    @pytest.mark.parametrize("weights", [False, True], ids=["", "weights"])
    def test_multiplies_each_head(self, shape, weights):
        query, key, value = tensors()
        mask = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
        probability = torch.softmax(
            (query @ key.repeat_interleave(2, 1).transpose(2, 3) / 4).masked_fill(~mask, -torch.inf), -1
        ) * self.HEADS.view(1, 4, 1, 1)
        got, got_weights = flashcore_attention(
            MODULE, query, key, value, mask, head_mask=self.HEADS.view(shape), output_attentions=weights
        )
        want = (probability @ value.repeat_interleave(2, 1)).transpose(1, 2)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        if weights:
            torch.testing.assert_close(got_weights, probability, atol=1e-5, rtol=1e-5)
        without, _ = flashcore_attention(MODULE, query, key, value, mask)
        assert (got - without).abs().max() > 0.1

    @pytest.mark.parametrize("shape", [(1, 4, 7, 7), (3,), (7, 7)], ids=str)
    def test_any_other_is_refused(self, shape):
        with pytest.raises(NotImplementedError, match="head_mask of shape.*eager"):
            flashcore_attention(MODULE, *tensors(), None, head_mask=torch.ones(shape))


class TestWhatIsNoMask:
    def test_block_mask(self):
        """It was an AttributeError in the first layer."""
        from torch.nn.attention.flex_attention import create_block_mask

        mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 12, 12, device="cpu")
        _, model = model_pair("llama")
        with pytest.raises(NotImplementedError, match="a BlockMask for an attention_mask.*flex_attention"):
            model(prompts(1, 12)[0], attention_mask=mask)

    @pytest.mark.parametrize("num_keys", [5, 6, 7, 40, 200])
    @pytest.mark.parametrize("added", [torch.zeros(1), torch.zeros(1, 4, 1, 1), torch.ones(1, dtype=torch.int64)])
    def test_a_key_range_that_was_computed_with(self, num_keys, added):
        """With few keys it is longer than a mask, would be cut to the keys, and the words in it be added to scores."""
        query, key, value = tensors(num_keys, num_keys)
        key_range = make_key_range(2, num_keys, right=0)
        flashcore_attention(MODULE, query, key, value, key_range)
        with pytest.raises(ValueError, match="remains of a KeyRange.*eager"):
            flashcore_attention(MODULE, query, key, value, key_range + added)

    def test_a_mask_that_is_too_long_is_still_cut(self):
        query, key, value = tensors()
        mask = torch.zeros(2, 1, 7, 20)
        mask[..., 3:] = -torch.inf
        got, _ = flashcore_attention(MODULE, query, key, value, mask)
        want, _ = flashcore_attention(MODULE, query, key[:, :, :3], value[:, :, :3], None, is_causal=False)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
    def test_a_mask_of_ints(self, dtype):
        with pytest.raises(ValueError, match="bool"):
            flashcore_attention(MODULE, *tensors(), torch.ones(2, 1, 7, 7, dtype=dtype))
