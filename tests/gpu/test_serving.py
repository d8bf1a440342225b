"""Attention on pages, and continuous batching with its CUDA graphs, on a GPU."""

import pytest
import torch
from flashcore_kernels import paged_attention, path_counts, write_pages

from flashcore_hf.serving import MOST_RECORDED

from ..hf.models import model_pair
from ..hf.test_serving import (
    TOKENS,
    WORKS,
    batched,
    everything_at_once,
    generation_config,
    recordable,
    small,
    some_prompts,
    tokens_of,
)
from ..kernels.cache.test_paged import MIXED, SINGLE, assert_all_right, build

LARGE = ((1, 5000), (600, 600), (1, 1), (0, 0), (1, -1), (37, 3000), (1, 257), (129, 129), (1, 9000))
SHAPE = {"head_dim": 128, "heads": (32, 8), "dtype": torch.bfloat16, "device": "cuda"}


@pytest.mark.parametrize("page_size", [16, 256, 1024])
@pytest.mark.parametrize("window", [None, 300])
def test_right(page_size, window):
    batch = build(LARGE, page_size=page_size, **SHAPE)
    output, lse = batch.run(window=window, return_lse=True)
    assert_all_right(batch, output, lse, window=window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_dtypes(dtype, head_dim):
    batch = build(LARGE, page_size=64, **{**SHAPE, "dtype": dtype, "head_dim": head_dim, "heads": (8, 2)})
    assert_all_right(batch, batch.run())


@pytest.mark.parametrize("ring, window", [(256, 256), (512, 300), (200, 128)])
def test_ring(ring, window):
    batch = build(LARGE, page_size=64, ring=ring, filled=False, **SHAPE)
    output = batch.run(new_key=batch.new_key, new_value=batch.new_value, window=window)
    assert_all_right(batch, output, window=window)


@pytest.mark.parametrize("lengths", [MIXED, SINGLE, LARGE], ids=["mixed", "single", "large"])
@pytest.mark.parametrize("ring", [0, 64])
def test_written(lengths, ring):
    before, after = (build(lengths, ring=ring, filled=filled, **SHAPE) for filled in (False, True))
    write_pages(before.pages, before.new_key, before.new_value)
    for got, want in zip(before.pages[:2], after.pages[:2]):
        assert torch.equal(got[~want.isnan()], want[~want.isnan()])


def test_one_graph_serves_all_lengths():
    """Captured for one batch, replayed for another of the same shapes: lengths, pages and who has a prompt differ."""
    batches = [
        build(lengths, page_size=64, padding=padding, seed=seed, **SHAPE)
        for seed, (lengths, padding) in enumerate(
            [(((1, 500), (60, 700), (1, 1)), 38), (((90, 90), (1, 3000), (9, 10)), 0), (((1, 4), (1, 5), (1, -1)), 97)]
        )
    ]
    pools = [batch.pages.key.shape[0] for batch in batches]
    widths = [batch.pages.block_table.shape[1] for batch in batches]
    assert len({len(batch.query) for batch in batches}) == 1
    static = batches[1]
    key, value = (
        torch.zeros(max(pools), *pool.shape[1:], dtype=pool.dtype, device="cuda") for pool in static.pages[:2]
    )
    table = torch.full((3, max(widths)), -1, dtype=torch.int32, device="cuda")
    query, where = static.query.clone(), static.pages._replace(key=key, value=value, block_table=table)
    where = where._replace(cu_seqlens_q=where.cu_seqlens_q.clone(), key_lengths=where.key_lengths.clone())

    def load(batch):
        query.copy_(batch.query)
        table.fill_(-1)
        table[:, : batch.pages.block_table.shape[1]] = batch.pages.block_table
        for to, of in zip(where[:2], batch.pages[:2]):
            to[: len(of)] = of
        where.cu_seqlens_q.copy_(batch.pages.cu_seqlens_q)
        where.key_lengths.copy_(batch.pages.key_lengths)

    load(static)
    for _ in range(2):
        paged_attention(query, where)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = paged_attention(query, where)
    for batch in (*batches, *batches):
        load(batch)
        graph.replay()
        assert_all_right(batch, output)
        assert torch.equal(output, paged_attention(query, where))


def test_repeats():
    batch = build(LARGE, page_size=256, **SHAPE)
    first = batch.run()
    assert all(torch.equal(batch.run(), first) for _ in range(100))


@pytest.mark.skipif(not WORKS, reason="this Transformers is not supported")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "qwen3"])
@pytest.mark.parametrize("graphs", [False, True])
def test_generate_batch(family, graphs):
    """In fp32, with more requests than fit into a batch: asynchronous, and with graphs replayed for many lengths."""
    eager, model = (recordable(each.cuda()) for each in model_pair(family))
    prompts = some_prompts((4, 9, 21, 1, 33, 12, 60, 2, 17, 40))
    want = [
        eager.generate(torch.tensor([p], device="cuda"), max_new_tokens=40, do_sample=False)[0, len(p) :].tolist()
        for p in prompts
    ]
    path_counts.clear()
    from transformers import GenerationConfig

    generation = GenerationConfig(max_new_tokens=40, do_sample=False, eos_token_id=-1, pad_token_id=0)
    for warmup in (False, True):
        answers = model.generate_batch(
            prompts, generation_config=generation, warmup=warmup,
            **small(page_size=16, tokens=48, blocks=128, use_cuda_graph=graphs),
        )  # fmt: skip
        assert tokens_of(answers.values()) == want
    assert set(path_counts) == {"flashcore_paged"}


@pytest.mark.skipif(not WORKS, reason="this Transformers is not supported")
@pytest.mark.parametrize("family, blocks", [("llama", 7), ("gemma2", 9)])
def test_pages_on_the_host(family, blocks):
    """Requests that find no pages wait with theirs in the host's memory."""
    eager, model = (each.cuda() for each in model_pair(family))
    prompts = some_prompts((30, 33, 20, 28, 31))
    answers = batched(
        model, prompts, small(blocks=blocks, cpu_offload_space=0.1), generation_config(max_new_tokens=20)
    )  # fmt: skip
    want = [
        eager.generate(torch.tensor([p], device="cuda"), max_new_tokens=20, do_sample=False)[0, len(p) :].tolist()
        for p in prompts
    ]
    assert tokens_of(answers) == want


@pytest.mark.skipif(not WORKS, reason="this Transformers is not supported")
@pytest.mark.parametrize(
    "family, blocks", [("llama", 10), ("qwen3", 10), ("mistral", 10), ("gemma3_text", 14), ("gpt_oss", 14)]
)
def test_everything_at_once(family, blocks):
    """Asynchronous, with graphs, and with the pages of requests that wait in the host's memory."""
    everything_at_once(family, blocks, "cuda", cpu_offload_space=0.1)


@pytest.mark.skipif(not WORKS, reason="this Transformers is not supported")
@pytest.mark.parametrize("persistent", [False, True])
def test_memory_is_flat(persistent):
    """Batches of ever other lengths leave nothing behind: of managers that are kept, and of others.

    What cuBLAS and the kernels keep for each stream is kept once (see `serving._hand_on_stream`).
    """
    _, model = model_pair("llama")
    model.cuda()
    used = []
    for seed in range(4):
        prompts = some_prompts(tuple(1 + (7 * i + seed) % 40 for i in range(250)), seed=seed)
        answers = model.generate_batch(
            prompts, generation_config=generation_config(), warmup=False, persistent_manager=persistent,
            **small(page_size=16, tokens=64, blocks=256),
        )  # fmt: skip
        assert [len(tokens) for tokens in tokens_of(answers.values())] == [TOKENS] * 250
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] <= used[1] + (1 << 20)


@pytest.mark.skipif(not WORKS, reason="this Transformers is not supported")
def test_batches_too_large_to_be_recorded():
    """Launched one by one on the compute stream, in turns with graphs of the batches of single tokens."""
    eager, model = (each.cuda() for each in model_pair("mistral"))
    prompts = some_prompts((900, 400, 33, 700, 1, 260))
    path_counts.clear()
    answers = batched(model, prompts, small(page_size=16, tokens=MOST_RECORDED + 256, blocks=256, use_cuda_graph=True))
    want = [
        eager.generate(torch.tensor([p], device="cuda"), max_new_tokens=TOKENS, do_sample=False)[0, len(p) :].tolist()
        for p in prompts
    ]
    assert tokens_of(answers) == want
    assert set(path_counts) == {"flashcore_paged"}
