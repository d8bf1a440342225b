"""What is compiled ahead for continuous batching: the very kernels that its batches launch. No GPU is needed."""

import contextlib
from collections import defaultdict

import pytest
import torch
from flashcore_kernels import precompile
from flashcore_kernels.cache import paged, paged_kernels
from flashcore_kernels.device import Device
from flashcore_kernels.runtime import launch

from flashcore_hf import ahead, compat, serving

from .models import model_pair
from .test_serving import WORKS, generation_config, small, some_prompts

pytestmark = pytest.mark.skipif(not WORKS, reason=f"supported for {serving.SUPPORTED}")
H200 = Device("cuda", 90, triton=(3, 6))
SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}


@pytest.fixture
def batches(monkeypatch):
    """Keys of the kernels that batches launch on what stands for an H200: (number of sequences, single) -> keys.

    Nothing is computed. What is compiled ahead is noted as compiled.
    """
    from flashcore_kernels.portable.paged import launch as portable_launch
    from flashcore_kernels.portable.paged import write

    hopper = pytest.importorskip("flashcore_kernels.hopper.paged.launch")
    from flashcore_kernels.hopper.paged import decode_launch

    launched, asked = defaultdict(set), []

    def only_note(kernel, programs, arguments, scalars, constants, *, num_warps=4, num_stages=1, **options):
        if arguments[0] is not None and getattr(arguments[0], "base", arguments[0]).is_meta:
            return launch.launch(
                kernel, programs, arguments, scalars, constants, num_warps=num_warps, num_stages=num_stages, **options
            )
        asked.append(launch._key(kernel, arguments, constants, num_warps, num_stages))

    for module in (portable_launch, write, hopper, decode_launch):
        monkeypatch.setattr(module, "launch", only_note)
    for module in (paged, precompile):
        monkeypatch.setattr(module, "device_of", lambda device: H200)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU's device
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(precompile, "THREADS_MAY_PARSE", True)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(precompile, "_compile_all", lambda device, stages: None)
    runner, attend = compat.batching_module().model_runner.ModelRunner, paged_kernels.serve_pages
    init = runner.__init__

    def padded(self, *arguments, **keywords):
        init(self, *arguments, **keywords)
        self.pad_inputs = True

    def by_batch(problem, *arguments):
        attend(problem, *arguments)
        if not arguments[1].is_meta:
            launched[problem.num_sequences, problem.max_queries == 1].update(asked)
            asked.clear()

    monkeypatch.setattr(runner, "__init__", padded)
    monkeypatch.setattr(paged, "serve_pages", by_batch)
    return launched


@pytest.fixture
def warmed_up(monkeypatch):
    """Numbers of sequences of the batches of single tokens that were warmed up."""
    sizes, runner = [], compat.batching_module().model_runner.ModelRunner
    warm_up = runner.run_one_warmup

    def noted(self, model, num_q_tokens, max_kv_read):
        if max_kv_read is None:
            sizes.append(num_q_tokens)
        return warm_up(self, model, num_q_tokens, max_kv_read)

    monkeypatch.setattr(runner, "run_one_warmup", noted)
    return sizes


def run(family: str, monkeypatch, prompts=None, **shape):
    """The Ahead of a manager that has warmed up, and answered `prompts`; a model in bf16."""
    found = []
    begin = ahead.begin_compiling_batches
    monkeypatch.setattr(serving, "begin_compiling_batches", lambda *a: found.append(begin(*a)) or found[-1])
    _, model = model_pair(family, **{**SHAPE, **shape})
    model.bfloat16()
    prompts = prompts or some_prompts((30, 70, 21, 1, 33, 12, 90, 2, 45, 17, 80))
    config = small(page_size=64, tokens=128, blocks=61, max_requests_per_batch=len(prompts), q_padding_interval_size=64)
    model.generate_batch(prompts, generation_config=generation_config(), **config)
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "qwen3"])
def test_what_is_compiled_is_what_is_launched(family, batches, monkeypatch):
    """Windows are rings of pages: of some layers, of all, of none."""
    shape = {"sliding_window": 96} if family in ("mistral", "gemma2", "gpt_oss") else {}
    told = run(family, monkeypatch, **shape)
    planned = set().union(*told._keys.values())
    assert set().union(*batches.values()) <= planned, "a kernel that nobody compiles ahead"
    assert {size for size, single in batches if single} >= {11}, "single tokens came"
    for (size, single), keys in batches.items():
        if single and size & (size - 1) == 0 or size == 11:
            assert keys <= told._keys[size if single else "mixed"], "it is compiled for another batch"


@pytest.mark.parametrize("change", ["group", "dtype", "ring", "softcap"])
def test_control(change, batches, monkeypatch):
    """A layer told wrong is noticed."""
    attend = ahead.attend_pages

    def wrong(query, key, value, call, **options):
        if change == "group":
            query = torch.cat([query, query], 1)
        elif change == "dtype":
            pools = {name: getattr(call.pages, name).half() for name in ("key", "value")}
            query, key, value, call = (
                *(t.half() for t in (query, key, value)),
                call._replace(pages=call.pages._replace(**pools)),
            )
        elif change == "ring":
            call = call._replace(pages=call.pages._replace(ring=0))
        else:
            options["softcap"] = 5.0
        return attend(query, key, value, call, **options)

    monkeypatch.setattr(ahead, "attend_pages", wrong)
    told = run("mistral", monkeypatch, sliding_window=96)
    assert not set().union(*batches.values()) <= set().union(*told._keys.values())


def test_the_first_answer_waits_for_no_small_batch(batches, warmed_up, monkeypatch):
    """Of batches whose kernels are not there yet the graphs are recorded when they come."""
    told = run("llama", monkeypatch)
    assert warmed_up == [11] and not told.ready(1)


def test_all_are_warmed_up_where_their_kernels_are_there(batches, warmed_up, monkeypatch):
    """The largest first."""
    monkeypatch.setattr(precompile, "is_compiled", lambda key: True)
    run("llama", monkeypatch)
    assert warmed_up == [11, 8, 4, 2, 1]


@pytest.mark.parametrize("most, times", [(128, 1), (127, 0)])
def test_a_batch_that_is_not_recorded_needs_no_warm_up(most, times, batches, monkeypatch):
    """The first one takes as long. A batch has 128 tokens at most here."""
    monkeypatch.setattr(serving, "MOST_RECORDED", most)
    runner, tokens = compat.batching_module().model_runner.ModelRunner, []
    warm_up = runner.run_one_warmup
    monkeypatch.setattr(
        runner,
        "run_one_warmup",
        lambda self, model, count, kv: tokens.append((count, kv)) or warm_up(self, model, count, kv),
    )
    run("llama", monkeypatch)
    assert len([count for count, kv in tokens if kv is not None]) == times
