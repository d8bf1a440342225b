"""torch.compile(fullgraph=True) of a static-cache decode: one graph, no recompiles, eager's logits."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache, masking_utils

from .compare import TOLERANCE, named
from .models import model_pair, prompts

STEPS = 64


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decode(step, model, ids, mask, slots: int) -> torch.Tensor:
    """Prefill with `model`, then STEPS tokens through `step`; all logits of the decode, `[B, STEPS, V]`.

    The mask has a column for each slot from the start, as generate() has it too for a static cache that it compiles.
    """
    batch_size, length = ids.shape
    cache = StaticCache(config=model.config, max_batch_size=batch_size, max_cache_len=slots)
    full = torch.zeros(batch_size, slots, dtype=torch.long)
    full[:, :length] = mask
    full[:, length:] = 1
    logits = []
    with torch.no_grad():
        out = model(ids, attention_mask=full, **named(cache), use_cache=True, cache_position=torch.arange(length))
        for i in range(STEPS):
            token = out.logits[:, -1:].argmax(-1)
            position = torch.tensor([length + i])
            ranks = (full[:, : length + i].sum(-1, keepdim=True)).long()
            out = step(
                token, attention_mask=full, **named(cache), use_cache=True, cache_position=position,
                position_ids=ranks,
            )  # fmt: skip
            logits.append(out.logits)
    return torch.cat(logits, dim=1)


def compiled_decode(model, ids, mask) -> tuple[torch.Tensor, int]:
    """Logits of a compiled decode, and how many graphs it took."""
    torch._dynamo.reset()
    counter = CompileCounter()
    logits = decode(torch.compile(model, backend=counter, fullgraph=True), model, ids, mask, 80)
    return logits, counter.frame_count


@pytest.mark.parametrize(("model_type", "padding"), [("llama", None), ("llama", "left"), ("mistral", "left")])
def test_static_decode_does_not_recompile(model_type, padding):
    # Few heads: each is a program of Triton's interpreter at each of the steps.
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    eager, model = model_pair(model_type, **small)
    ids, mask = prompts(2, 9, padding)
    got, graphs = compiled_decode(model, ids, mask)
    expected = decode(eager, eager, ids, mask, 80)
    if model_type == "llama":
        assert graphs == 1
    else:
        # A sliding static layer counts in a Python int, on which any backend's graph specialises.
        _, sdpa = model_pair(model_type, implementation="sdpa", **small)
        assert graphs <= compiled_decode(sdpa, ids, mask)[1]
    assert (got - expected).abs().max() / expected.abs().max() < TOLERANCE
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


def test_operator_is_one_node():
    """The graph holds the operator itself; nothing of it was traced into."""
    from flashcore_kernels import attention

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    query, key = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 9, 16)
    torch.compile(lambda q, k: attention(q, k, k) * 2, backend=keep, fullgraph=True)(query, key)
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("flashcore" in target for target in targets) == 1
    assert len(targets) <= 3


def test_a_whole_prefill_compiles():
    eager, model = model_pair("mistral")
    ids, mask = prompts(2, 13, "left")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(ids, attention_mask=mask).logits
        expected = eager(ids, attention_mask=mask).logits
    assert ((got - expected).abs() * mask[..., None]).max() / expected.abs().max() < TOLERANCE


def test_a_decoder_that_is_not_causal_compiles():
    """A window to both sides was taken for one of what is causal, as closures cannot be read in a trace."""
    if not hasattr(masking_utils, "create_bidirectional_sliding_window_mask"):
        pytest.skip("this version's decoders are causal")
    eager, model = model_pair("mistral")
    ids, mask = prompts(2, 13, "left")
    outputs = {}
    for causal in (True, False):
        eager.config.is_causal = model.config.is_causal = causal
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            got = compiled(ids, attention_mask=mask, use_cache=False).logits
            outputs[causal] = expected = eager(ids, attention_mask=mask, use_cache=False).logits
        assert ((got - expected).abs() * mask[..., None]).max() / expected.abs().max() < TOLERANCE
    assert (outputs[True] - outputs[False]).abs().max() > 0.1, "the control"


@pytest.mark.filterwarnings("ignore::flashcore_kernels.FlashcoreFallbackWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_steps_compile_once(dropout):
    """What counts calls was traced: each step was compiled anew, and the ninth failed."""
    eager, model = model_pair("llama", num_hidden_layers=1, attention_dropout=dropout)
    model.train()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, _ = prompts(2, 9)
    for _ in range(10):
        model.zero_grad()
        loss = step(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    if not dropout:
        expected = eager.train()(input_ids=ids, labels=ids, use_cache=False).loss
        expected.backward()
        assert abs(loss - expected) < TOLERANCE * expected
        for mine, theirs in zip(model.parameters(), eager.parameters()):
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-3)
