"""torch.export and ONNX export with a dynamic length: as `sdpa` exports, and then the answer of eager at any length."""

import pytest
import torch

from .compare import TOLERANCE
from .models import model_pair

SMALL = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
LENGTHS = (7, 19, 33, 64, 100)  # 7 is where a KeyRange is as wide as there are keys, and has a word more


class Logits(torch.nn.Module):
    """What is exported: tokens and a padding mask in, logits out."""

    def __init__(self, model):
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def forward(self, tokens, mask):
        return self.model(tokens, attention_mask=mask, use_cache=False).logits


def padded(length):
    """Tokens, and a mask by which half of the second row is left padding."""
    tokens = torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(tokens)
    mask[1, : length // 2] = 0
    return tokens, mask


def error(got, eager, tokens, mask):
    """Of the logits of tokens that exist, relative to the largest."""
    want = eager(tokens, attention_mask=mask, use_cache=False).logits
    return ((got - want).abs() * mask[..., None]).max() / want.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(("low", "strict"), [(2, False), (17, False), (17, True)])
def test_an_exported_model_answers_at_every_length(low, strict):
    eager, model = model_pair("llama", **SMALL)
    length = torch.export.Dim("length", min=low, max=128)
    dynamic = ({1: length}, {1: length})
    program = torch.export.export(Logits(model), padded(24), dynamic_shapes=dynamic, strict=strict)
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("flashcore.attention" in name for name in operators) == 1, "the kernels stay in an exported program"
    exported = program.module()
    for length in LENGTHS if low == 2 else LENGTHS[1:3]:
        tokens, mask = padded(length)
        assert error(exported(tokens, mask), eager, tokens, mask) < TOLERANCE, length
    unpadded = error(exported(tokens, torch.ones_like(mask)), eager, tokens, mask)
    assert unpadded > 10 * TOLERANCE, "negative control: the mask matters"


@torch.no_grad()
def test_an_exported_program_can_be_taken_apart():
    """What runs elsewhere has no kernels of ours: the operator decomposes into PyTorch's own."""
    from torch._decomp import get_decompositions

    eager, model = model_pair("llama", **SMALL)
    length = torch.export.Dim("length", min=8, max=128)
    program = torch.export.export(Logits(model), padded(24), dynamic_shapes=({1: length}, {1: length}))
    # Taken apart the guard on 7 keys, where a KeyRange has a word more, comes back.
    program = program.run_decompositions(get_decompositions([torch.ops.flashcore.attention]))
    assert not any("flashcore" in str(node.target) for node in program.graph.nodes)
    for length in (19, 40):
        tokens, mask = padded(length)
        assert error(program.module()(tokens, mask), eager, tokens, mask) < TOLERANCE, length


@torch.no_grad()
def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    eager, model = model_pair("llama", **SMALL)
    length = torch.export.Dim("length", min=2, max=128)
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        Logits(model), padded(24), path, dynamic_shapes=({1: length}, {1: length}), dynamo=True, verbose=False
    )
    session = onnxruntime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]
    for length in LENGTHS:
        tokens, mask = padded(length)
        (got,) = session.run(None, dict(zip(names, (tokens.numpy(), mask.numpy()))))
        assert error(torch.from_numpy(got), eager, tokens, mask) < TOLERANCE, length


@pytest.mark.parametrize("implementation", ["sdpa", "flashcore"])
def test_a_model_of_shapes_alone(implementation):
    """On meta there is no autocast to ask for, and no data: device maps and FLOP counters run models like this."""
    _, model = model_pair("llama", implementation=implementation, **SMALL)
    with torch.no_grad():
        logits = model.to("meta")(torch.ones(1, 4, dtype=torch.long, device="meta")).logits
    assert logits.is_meta and logits.shape[:2] == (1, 4)
