"""The export for Hugging Face's `kernels`: loaded under a name of its own, beside the package, and by Transformers.

What needs the `kernels` package is skipped without it; `nox -s hub` has it, and a Transformers that takes its version.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REPO_ID = "somebody/flash-attn3-flashcore"


@pytest.fixture(scope="module")
def exporter():
    spec = importlib.util.spec_from_file_location("export_hub_kernel", ROOT / "scripts" / "export_hub_kernel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(exporter, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    assert exporter.main([str(folder), "--repo-id", REPO_ID]) == 0
    return folder


def python(code: str, repository: Path, **environment: str) -> str:
    """Run `code`, after a loader `load(backend)` that does what `kernels` does, in a new Python; what it prints."""
    loader = """
import importlib.util, json, os, sys
from pathlib import Path
FOLDER = Path(os.environ["FOLDER"])

def load(backend="cpu"):
    build = FOLDER / "build" / f"torch-{backend}"
    name = json.loads((build / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, build / "__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""
    environment = {**os.environ, "FOLDER": str(repository), "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", loader + code], cwd=repository, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_layout(repository):
    assert {path.name for path in (repository / "build").iterdir()} == {"torch-cuda", "torch-cpu"}
    ids = set()
    for backend in ("cuda", "cpu"):
        metadata = json.loads((repository / "build" / f"torch-{backend}" / "metadata.json").read_text())
        ids.add(metadata.pop("id"))
        assert metadata == {
            "name": "flash-attn3-flashcore", "version": 1, "license": "Apache-2.0", "python-depends": [],
            "backend": {"type": backend},
        }  # fmt: skip
    assert len(ids) == 2 and all(i.isidentifier() for i in ids)
    files = {p.relative_to(repository / "build/torch-cuda/flashcore_kernels") for p in
             (repository / "build/torch-cuda/flashcore_kernels").rglob("*.py")}  # fmt: skip
    package = ROOT / "kernels" / "flashcore_kernels"
    assert files == {path.relative_to(package) for path in package.rglob("*.py")}
    assert not list(repository.rglob("*.pyc"))


def test_it_needs_nothing_of_ours(repository):
    """Neither package can be imported, nor is Transformers, and the answer is right."""
    said = python(
        """
sys.path[:] = [entry for entry in sys.path if not (Path(entry or ".") / "flashcore_kernels").exists()]
sys.modules["flashcore_kernels"] = sys.modules["flashcore_hf"] = sys.modules["transformers"] = None
import torch
kernel = load()
q = torch.randn(1, 9, 4, 16)
out = kernel.flash_attn_func(q, q, q, causal=True)
q = q.transpose(1, 2)
want = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2)
print(torch.allclose(out, want, atol=1e-5), sum(kernel.path_counts.values()))
""",
        repository,
        TRITON_INTERPRET="1",
    )
    assert said.split() == ["True", "1"]


def test_beside_the_package(repository):
    """Operators have names of their own: an installed flashcore stays as it is, whichever comes first."""
    for first, second in (
        ("import flashcore_kernels", "kernel = load()"),
        ("kernel = load()", "import flashcore_kernels"),
    ):
        code = f"""
import torch
{first}
{second}
q = torch.randn(1, 2, 9, 16)
a = flashcore_kernels.attention(q, q, q, is_causal=True)
b = kernel.attention(q, q, q, is_causal=True)
print(torch.equal(a, b), sum(flashcore_kernels.path_counts.values()), sum(kernel.path_counts.values()))
x = q.clone().requires_grad_()
kernel.attention(x, x, x).sum().backward()
print(x.grad is not None)
"""
        assert python(code, repository).split() == ["True", "1", "1", "True"]


def test_beside_the_package_with_the_same_names(repository, exporter, tmp_path, monkeypatch):
    """The control: operators under the package's name cannot be there twice."""
    monkeypatch.setattr(exporter, "NAMESPACE", ())
    with pytest.raises(ValueError, match=r"autograd.py, line \d+: an operator is spelt"):
        exporter.export(tmp_path, REPO_ID)
    monkeypatch.setattr(exporter, "renamed", lambda file, text, identifier: text)
    exporter.export(tmp_path, REPO_ID)
    code = "import flashcore_kernels\ntry:\n    load()\nexcept RuntimeError as error:\n    print(error)"
    assert "flashcore" in python(code, tmp_path)


def test_refused(exporter, tmp_path, capsys):
    with pytest.raises(ValueError, match="imports flashcore_kernels.op; imports within the package are relative"):
        exporter.check_imports("plan.py", "from flashcore_kernels.op import attention")
    with pytest.raises(ValueError, match="imports transformers"):
        exporter.check_imports("plan.py", "def later():\n    import transformers")
    exporter.check_imports("plan.py", "from .op import attention\nimport torch")
    for spelt in ('torch.library.impl("flashcore::attention", f)', "op = ops.flashcore", 'Library(name, "flashcore")'):
        with pytest.raises(ValueError, match="line 1: an operator is spelt"):
            exporter.renamed("op.py", spelt, "_x")
    assert exporter.main([str(tmp_path / "x"), "--repo-id", "Flash_Attn"]) == 1
    assert "--repo-id: got 'Flash_Attn'" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_the_same_sources_have_the_same_id(exporter, repository, tmp_path):
    again = exporter.export(tmp_path, REPO_ID, backends=("cpu",))[0]
    assert again.joinpath("metadata.json").read_text() == (repository / "build/torch-cpu/metadata.json").read_text()
    again.joinpath("old.py").write_text("")
    exporter.export(tmp_path, REPO_ID, backends=("cpu",))
    assert not again.joinpath("old.py").exists()


def has_kernels() -> bool:
    """Whether Hugging Face's package is here: our folder of that name is none."""
    found = importlib.util.find_spec("kernels")
    return found is not None and found.origin is not None


needs_kernels = pytest.mark.skipif(not has_kernels(), reason="needs Hugging Face's kernels")


@needs_kernels
def test_get_local_kernel(repository):
    said = python(
        """
import kernels, torch
kernel = kernels.get_local_kernel(FOLDER, backend="cpu")
print(kernel.__name__, kernels.get_kernel("somebody/flash-attn3-flashcore", version=1) is kernel)
q = torch.randn(2, 3, 4, 16)
print(kernel.flash_attn_with_kvcache(q, q, q).shape == q.shape)
""",
        repository,
        LOCAL_KERNELS=f"{REPO_ID}={repository}",
    )
    assert re.match(r"_flash_attn3_flashcore_\w+ True\nTrue", said), said


def transformers_takes_kernels() -> bool:
    from transformers.utils import is_kernels_available

    return has_kernels() and is_kernels_available()


MODELS = """
import torch, transformers
from transformers import AutoModelForCausalLM
REPO_ID = "somebody/flash-attn3-flashcore"
SIZES = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, vocab_size=99, max_position_embeddings=128, initializer_range=0.18, pad_token_id=0,
             eos_token_id=None)
MORE = {"mistral": dict(sliding_window=8), "gemma2": dict(sliding_window=8, attn_logit_softcapping=3.0)}

def build(model_type, peer="eager"):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SIZES, **MORE.get(model_type, {}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=peer).eval()
    model.save_pretrained(FOLDER / model_type)
    return model, AutoModelForCausalLM.from_pretrained(FOLDER / model_type, attn_implementation=REPO_ID).eval()

def calls():
    import kernels
    return sum(loaded.module.path_counts.total() for loaded in kernels.get_loaded_kernels())
"""


@needs_kernels
@pytest.mark.parametrize("model_type", ["mistral", "gemma2"])
def test_transformers(model_type, repository):
    """A tiny model through the name of a repository: logits with and without padding, and greedy tokens."""
    if not transformers_takes_kernels():
        pytest.skip("this Transformers wants another version of kernels")
    said = python(
        MODELS + f"model_type = {model_type!r}\n" + """
theirs, ours = build(model_type)
print(ours.config._attn_implementation == REPO_ID)
ids = torch.randint(1, 99, (2, 20))
mask = torch.ones_like(ids); mask[0, :5] = 0
def off(**inputs):
    with torch.no_grad():
        a, b = theirs(**inputs).logits, ours(**inputs).logits
    kept = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    return (a - b)[kept].abs().max().item(), a[kept].abs().max().item()
for inputs in (dict(input_ids=ids), dict(input_ids=ids, attention_mask=mask)):
    error, size = off(**inputs)
    print(error < 1e-5 * size)
before = calls()
print(before > 0)
options = dict(input_ids=ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
print(torch.equal(theirs.generate(**options), ours.generate(**options)), calls() > before)
# The control: another scale in one layer shows.
ours.model.layers[0].self_attn.scaling *= 1.3
error, size = off(input_ids=ids)
print(error > 1e-3 * size)
""",
        repository,
        LOCAL_KERNELS=f"{REPO_ID}={repository}",
    )  # fmt: skip
    assert said.split() == ["True"] * 7, said


@needs_kernels
def test_transformers_knows_the_functions(repository):
    """What its wrapper passes on is what it finds in the signatures; serving finds the block table."""
    if not transformers_takes_kernels():
        pytest.skip("this Transformers wants another version of kernels")
    said = python(
        MODELS
        + """
build("llama")
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
functions, process = lazy_import_flash_attention(REPO_ID)
print(all(function is not None for function in functions))
supported = process.keywords["supports_mapping"]
print(*(name for name in ("dropout_p", "window_size", "softcap", "deterministic", "s_aux", "max_seqlen_q")
        if not supported[name]))
import inspect
print("block_table" in inspect.signature(functions[2]).parameters)
""",
        repository,
        LOCAL_KERNELS=f"{REPO_ID}={repository}",
    )
    assert said.split() == ["True", "True"], said
