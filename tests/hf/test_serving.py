"""Continuous batching: each request's tokens are those of its own generate(), in pages and without a gather.

Transformers runs the model in a thread of its own there, and hands what it raises to a log: ours reaches the caller.
"""

import gc
import inspect
import time
import types
import weakref

import pytest
import torch
import transformers
from flashcore_kernels import interpreter_pace
from transformers import GenerationConfig

from flashcore_hf import compat, pages, serving

from .models import model_pair

pytestmark = pytest.mark.skipif(compat.continuous_batching() is None, reason="this Transformers does not batch so")
WORKS = compat.continuous_batching() is not None and serving.why_not() is None
works = pytest.mark.skipif(not WORKS, reason=f"supported for {serving.SUPPORTED}")
# What the message tells to call.
OTHER = "sdpa_paged" if compat.HAS_INTERFACE and "sdpa_paged" in compat.attention_registry() else "sdpa"
PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
TOKENS = 6


def generation_config(**changes) -> GenerationConfig:
    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0, "bos_token_id": 1}
    config = GenerationConfig(**{**options, **changes})
    config.num_blocks, config.max_batch_tokens, config.block_size = 8, 16, 32
    return config


def small(page_size: int = 16, tokens: int = 24, blocks: int = 64, **changes) -> dict:
    """Keywords that keep the pages few: by default they take most of the memory."""
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        return {}
    kind = transformers.ContinuousBatchingConfig
    name = "page_size" if "page_size" in inspect.signature(kind).parameters else "block_size"
    config = kind(num_blocks=blocks, max_batch_tokens=tokens, **{name: page_size}, **changes)
    return {"continuous_batching_config": config}


def some_prompts(lengths=(4, 9, 21, 1, 33, 12), seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def recordable(model):
    """`model`, with experts that a CUDA graph can record: in fp32 Transformers' own reads their counts on the host."""
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("batched_mm")
    return model


def each_alone(model, prompts, tokens: int = TOKENS) -> list[list[int]]:
    """What generate() answers to each prompt by itself."""
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    return [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]


def batched(model, prompts, config: dict | None = None, generation: GenerationConfig | None = None) -> list:
    """The answers of generate_batch(), in order."""
    with interpreter_pace(keys=16, queries=16):
        answers = model.generate_batch(
            prompts, generation_config=generation or generation_config(), **(config or small()), warmup=False
        )
    return list(answers.values())


def tokens_of(answers) -> list[list[int]]:
    return [answer.generated_tokens for answer in answers]


@works
class TestTokens:
    """Batches of at most 24 tokens: prompts are cut, and prefilled beside single tokens of others."""

    @pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "qwen3"])
    def test_equal_eager(self, family, paths):
        """Windows of 6 tokens are crossed; gemma2 has a softcap, gpt-oss sinks."""
        eager, model = model_pair(family)
        prompts = some_prompts()
        answers = batched(model, prompts)
        assert tokens_of(answers) == each_alone(eager, prompts)
        assert set(paths) == {"flashcore_paged"}
        assert model.config._attn_implementation == "flashcore"

    def test_a_window_larger_than_a_page(self, paths):
        eager, model = model_pair("mistral", sliding_window=20)
        prompts = some_prompts((50, 3, 19, 27))
        assert tokens_of(batched(model, prompts)) == each_alone(eager, prompts)

    def test_through_pytorch(self, monkeypatch):
        """Where no kernel can run, such as on a CPU."""
        from flashcore_kernels.cache import paged
        from flashcore_kernels.device import Device

        monkeypatch.setattr(paged, "device_of", lambda device: Device("torch", reason="no kernel for pages here"))
        eager, model = model_pair("mistral")
        prompts = some_prompts()
        with pytest.warns(UserWarning, match="no kernel for pages here"):
            answers = model.generate_batch(prompts, generation_config=generation_config(), **small(), warmup=False)
        assert tokens_of(answers.values()) == each_alone(eager, prompts)

    def test_nothing_is_gathered(self, monkeypatch):
        """No index of a past key is made, and nobody reads one."""

        def never(*arguments, **keywords):
            raise AssertionError("a list of every past key was made")

        package = compat.batching_module()
        monkeypatch.setattr(package.PagedAttentionCache, "extend_read_and_write_indices", never)
        monkeypatch.setattr(package.PagedAttentionCache, "update", never)
        _, model = model_pair("gemma2")
        assert all(len(tokens) == TOKENS for tokens in tokens_of(batched(model, some_prompts())))

    @pytest.mark.parametrize("tamper", ["lengths", "window", "table"])
    def test_controls(self, tamper, monkeypatch):
        """Lengths off by one, a window that is ignored, pages of another request."""
        eager, model = model_pair("mistral", sliding_window=20)
        prompts = some_prompts((50, 31, 19, 27))
        attend = pages.paged_attention

        def wrong(query, where, **arguments):
            if tamper == "lengths":
                where = where._replace(key_lengths=(where.key_lengths.diff() - 1).clamp(min=0))
            elif tamper == "table":
                where = where._replace(block_table=where.block_table.flip(0).contiguous())
            else:
                arguments["window"] = 6
            return attend(query, where, **arguments)

        monkeypatch.setattr(pages, "paged_attention", wrong)
        assert tokens_of(batched(model, prompts)) != each_alone(eager, prompts)

    def test_shared_prefixes(self):
        """The second request finds the first one's pages."""
        eager, model = model_pair("llama")
        start = some_prompts((48,), seed=5)[0]
        prompts = [start + [7, 8, 9], start + [10, 11], start[:40] + [12]]
        first = batched(model, prompts[:1])
        assert tokens_of(first) == each_alone(eager, prompts[:1])
        # All at once some are prefilled together; in turn they are found.
        with manager_of(model) as manager:
            got = []
            for prompt in prompts:
                manager.add_request(prompt, max_new_tokens=TOKENS)
                got.append(manager.get_result(timeout=60).generated_tokens)
            cache = manager.batch_processor.cache
            assert cache.use_prefix_sharing
        assert got == each_alone(eager, prompts)

    @pytest.mark.parametrize("family, blocks", [("llama", 7), ("gemma2", 9)])
    def test_fewer_pages_than_requests_need(self, family, blocks, monkeypatch):
        """Some are taken out, their pages given to others, and begun anew."""
        from transformers.generation.continuous_batching import offloading_manager

        taken_out, manager = [], offloading_manager.OffloadingManager
        offload = manager.offload_requests
        monkeypatch.setattr(manager, "offload_requests", lambda *a, **k: taken_out.append(1) or offload(*a, **k))
        eager, model = model_pair(family)
        prompts = some_prompts((30, 33, 20, 28, 31))
        answers = batched(model, prompts, small(blocks=blocks), generation_config(max_new_tokens=20))
        assert tokens_of(answers) == each_alone(eager, prompts, 20)
        assert taken_out

    def test_forks(self):
        """num_return_sequences copies a request's pages when its prompt is done."""
        eager, model = model_pair("mistral")
        prompts = some_prompts((9, 21))
        config = generation_config(num_return_sequences=2, do_sample=True, temperature=1e-4)
        got = tokens_of(batched(model, prompts, generation=config))
        want = each_alone(eager, prompts)
        assert all(tokens in want for tokens in got) and len(got) >= 2

    def test_logprobs(self):
        eager, model = model_pair("llama")
        prompts = some_prompts((9, 21))
        for prompt, answer in zip(prompts, batched(model, prompts, small(return_logprobs=True))):
            ids = torch.tensor([prompt + answer.generated_tokens])
            logits = eager(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            want = logits.gather(1, torch.tensor(answer.generated_tokens)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(answer.logprobs), want, atol=1e-3)

    def test_again_with_the_same_manager(self):
        eager, model = model_pair("gemma2")
        for seed in (1, 2):
            prompts = some_prompts(seed=seed)
            with interpreter_pace(keys=16, queries=16):
                answers = model.generate_batch(
                    prompts, generation_config=generation_config(), **small(), warmup=False, persistent_manager=True
                )
            assert tokens_of(answers.values()) == each_alone(eager, prompts)
        model.destroy_cached_continuous_batching_manager()


def manager_of(model, **config):
    return model.continuous_batching_context_manager(
        generation_config=generation_config(), **small(**config), warmup=False
    )


def processor_of(manager):
    """Its thread makes it."""
    deadline = time.monotonic() + 30
    while manager.batch_processor is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return manager.batch_processor


def everything_at_once(family: str, blocks: int, device: str = "cpu", **config) -> None:
    """Prompts with a common start, forked when they are done, in mixed batches, one cancelled, on few pages of NaN.

    Each answer is that of the prompt's own generate().
    """
    eager, model = (recordable(each.to(device)) for each in model_pair(family))
    start = some_prompts((40,), seed=5)[0]
    prompts = [start + [7, 8, 9], start + [10], start[:35] + [12], *some_prompts((30, 3, 21, 33))]
    want = {}
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        made = eager.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)
        want[tuple(prompt)] = made[0, len(prompt) :].tolist()
    # Greedy, but for the name: Transformers has no forks there. Two logits are no more than 1e-4 apart.
    generation = generation_config(num_return_sequences=2, do_sample=True, temperature=1e-6)
    with (
        interpreter_pace(keys=16, queries=16),
        model.continuous_batching_context_manager(
            generation_config=generation, **small(blocks=blocks, **config), warmup=False
        ) as manager,
    ):
        for _, key, value, *_ in processor_of(manager)._flashcore_served._layers.values():
            key.fill_(float("nan")), value.fill_(float("nan"))
        if device == "cuda":
            torch.cuda.synchronize()  # the batches are another stream's
        asked = {}
        for prompt in prompts[:3]:  # one after another, so that pages of the first are found
            asked[manager.add_request(prompt, max_new_tokens=TOKENS)] = prompt
            time.sleep(0.3)
        gone = manager.add_request(some_prompts((25,), seed=9)[0], max_new_tokens=100)
        asked |= {manager.add_request(prompt, max_new_tokens=TOKENS): prompt for prompt in prompts[3:]}
        manager.cancel_request(gone)
        answers, deadline = {}, time.monotonic() + 120
        while len(answers) < 2 * len(prompts) and time.monotonic() < deadline:
            answer = manager.get_result(timeout=1)
            if answer is not None and not answer.request_id.startswith(gone):
                assert answer.error is None
                answers[answer.request_id] = answer.generated_tokens
    assert len(answers) == 2 * len(prompts)
    for name, tokens in answers.items():
        assert tokens == want[tuple(asked[name.partition("__child")[0]])], name


@works
@pytest.mark.parametrize("family, blocks", [("llama", 10), ("gemma3_text", 14)])
def test_everything_at_once(family, blocks):
    everything_at_once(family, blocks)


class TestStreams:
    """Memory is kept for each stream: a processor computes on that of one that is gone."""

    def processor(self, offloads_on_it: bool = True):
        stream = types.SimpleNamespace(device="a GPU")
        kind = type("Processor", (types.SimpleNamespace,), {})
        ios = types.SimpleNamespace(compute_stream=stream)
        offloading = types.SimpleNamespace(_compute_stream=stream if offloads_on_it else object())
        return kind(inputs_and_outputs=ios, offloading_manager=offloading), stream

    @pytest.fixture(autouse=True)
    def none_idle(self, monkeypatch):
        monkeypatch.setattr(serving, "_idle_streams", {})

    def test_one_after_another(self):
        processor, first = self.processor()
        for _ in range(5):
            serving._hand_on_stream(processor)
            assert processor.inputs_and_outputs.compute_stream is first
            assert processor.offloading_manager._compute_stream is first
            processor, own = self.processor()
            assert own is not first

    def test_two_at_once_have_their_own(self):
        (one, first), (other, second) = self.processor(), self.processor()
        serving._hand_on_stream(one)
        serving._hand_on_stream(other)
        assert one.inputs_and_outputs.compute_stream is first and other.inputs_and_outputs.compute_stream is second

    def test_nothing_is_changed_where_not_all_of_it_would_be(self):
        processor, _ = self.processor()
        serving._hand_on_stream(processor)
        processor, own = self.processor(offloads_on_it=False)
        serving._hand_on_stream(processor)
        assert processor.inputs_and_outputs.compute_stream is own


@works
class TestManager:
    def test_streaming(self):
        eager, model = model_pair("llama")
        prompt = some_prompts((9,))[0]
        with manager_of(model) as manager:
            name = manager.add_request(prompt, max_new_tokens=TOKENS, streaming=True)
            seen = []
            for answer in manager.request_id_iter(name):
                seen.append(list(answer.generated_tokens))
                if answer.is_finished():
                    break
        assert seen[-1] == each_alone(eager, [prompt])[0]
        assert len(seen) > 1 and all(seen[-1][: len(tokens)] == tokens for tokens in seen)

    def test_cancelled(self):
        """Another request's pages are then free for others, and the rest goes on."""
        eager, model = model_pair("mistral")
        prompts = some_prompts((21, 9))
        with manager_of(model) as manager:
            gone = manager.add_request(prompts[0], max_new_tokens=200)
            manager.add_request(prompts[1], max_new_tokens=TOKENS, request_id="stays")
            time.sleep(0.2)
            manager.cancel_request(gone)
            deadline = time.monotonic() + 60
            answer = None
            while (answer is None or answer.request_id != "stays") and time.monotonic() < deadline:
                answer = manager.get_result(timeout=1)
            assert answer.generated_tokens == each_alone(eager, prompts[1:])[0]

    def test_a_stopped_manager_frees_its_pages(self):
        """While somebody still holds the manager: the next one plans with that memory."""
        _, model = model_pair("llama")
        with manager_of(model) as manager:
            manager.add_request(PROMPTS[0], max_new_tokens=2)
            assert manager.get_result(timeout=60).error is None
            pool = weakref.ref(manager.batch_processor.cache)
        gc.collect()
        assert manager is not None and pool() is None

    def test_what_was_changed_is_the_managers_own(self):
        """Nothing of the classes: a model under another name, at the same time, has its own."""
        _, model = model_pair("llama")
        package = compat.batching_module()
        with manager_of(model) as manager:
            processor = processor_of(manager)
            assert type(processor.inputs_and_outputs).__name__.startswith("Flashcore")
            assert "update" in vars(processor.cache)
        assert "flashcore" not in package.PagedAttentionCache.update.__code__.co_filename
        assert "flashcore" not in package.input_outputs.ContinuousBatchingIOs.get_model_kwargs.__code__.co_filename


@works
class TestStop:
    """After every generate_batch()."""

    def test_at_once(self, monkeypatch):
        """Its thread is woken, and of a manager that is kept no garbage is looked for."""
        _, model = model_pair("llama")
        seen = []
        for kept in (True, True, False):
            with model.continuous_batching_context_manager(
                generation_config=generation_config(), **small(), warmup=False, persistent_manager=kept
            ) as manager:
                processor_of(manager)
                awake = getattr(manager, "_wake_up_loop", None) or manager._has_new_requests
                monkeypatch.setattr(awake, "wait", lambda timeout, awake=awake: type(awake).wait(awake, 60))
                time.sleep(0.15)  # it waits now
                monkeypatch.setattr(gc, "collect", lambda: seen.append(gc.get_freeze_count() > 0))
                began = time.perf_counter()
            monkeypatch.undo()
            assert time.perf_counter() - began < 30
            assert "request_stop" not in vars(manager.background_thread_status) and not gc.get_freeze_count()
        assert seen[0] and seen[1] and not any(seen[2:])
        model.destroy_cached_continuous_batching_manager()

    def test_what_others_froze_stays_so(self):
        _, model = model_pair("llama")
        gc.freeze()
        try:
            with model.continuous_batching_context_manager(
                generation_config=generation_config(), **small(), warmup=False, persistent_manager=True
            ) as manager:
                processor_of(manager)
            assert gc.get_freeze_count()
        finally:
            gc.unfreeze()
        model.destroy_cached_continuous_batching_manager()


@works
class TestPadding:
    """With graphs, whose shapes must not be too many. Without a GPU none are recorded; the shapes are the same."""

    @pytest.mark.parametrize("single", [False, True])
    @pytest.mark.parametrize("tokens", [serving.MOST_RECORDED, serving.MOST_RECORDED + 64])
    def test_large_batches_are_not_recorded(self, tokens, single):
        """They keep a GPU busy for longer than Python takes, and come in too many sizes."""
        _, model = model_pair("llama")
        with manager_of(model) as manager:
            runner = processor_of(manager).model_runner
            runner.use_cuda_graph_varlen = runner.use_cuda_graph_decode = True
            io = serving._current(runner.inputs_and_outputs)
            io.num_q_tokens, io.flashcore_single = tokens, single
            answers = [runner._get_forward_fn(True) for _ in range(serving.BEFORE_RECORDING + 2)]
            assert {forward for forward, _ in answers} == {runner._forward_process_and_sample}
            often = tokens == serving.MOST_RECORDED
            assert [recorded for _, recorded in answers] == [single] * serving.BEFORE_RECORDING + [
                single or often
            ] * 2, "a mixed batch that comes rarely takes longer to record than to launch"
            runner.use_cuda_graph_varlen = runner.use_cuda_graph_decode = False
            assert not runner._get_forward_fn(True)[1], "nor what the user has not asked for"

    def test_padded_batches_give_the_same(self, monkeypatch):
        """Padding behind the tokens, sequences without any, tables of -1."""
        package = compat.batching_module()
        init = package.model_runner.ModelRunner.__init__

        def padded(self, *arguments, **keywords):
            init(self, *arguments, **keywords)
            self.pad_inputs = True

        monkeypatch.setattr(package.model_runner.ModelRunner, "__init__", padded)
        eager, model = model_pair("gemma2")
        prompts = some_prompts()
        assert tokens_of(batched(model, prompts)) == each_alone(eager, prompts)

    def test_warm_up(self, monkeypatch):
        """Both kinds of batches run, of the largest sizes, and what they wrote is nobody's."""
        package = compat.batching_module()
        init = package.model_runner.ModelRunner.__init__
        warned = []

        def padded(self, *arguments, **keywords):
            init(self, *arguments, **keywords)
            self.pad_inputs = True

        monkeypatch.setattr(package.model_runner.ModelRunner, "__init__", padded)
        monkeypatch.setattr(package.model_runner.logger, "warning", lambda *said: warned.append(said))
        eager, model = model_pair("mistral")
        prompts = some_prompts((9, 21))
        with interpreter_pace(keys=16, queries=16):
            answers = model.generate_batch(prompts, generation_config=generation_config(), **small())
        assert tokens_of(answers.values()) == each_alone(eager, prompts)
        assert not warned
