"""Each example runs as it stands, with its small default model, and says what it promises."""

import importlib.util
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

pytestmark = pytest.mark.filterwarnings("error::FutureWarning")
EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def example(name: str):
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name, argv, says",
    [
        ("load_and_chat", ["--max-new-tokens", "4", "Hi", "So?"], "tokens in the cache"),
        ("static_cache_compile", ["--max-new-tokens", "5"], "with and without compiling: True"),
        ("left_padded_batch", ["--max-new-tokens", "3"], "the same alone and in the batch: True"),
        pytest.param(
            "generate_with_graphs",
            ["--max-new-tokens", "3"],
            "equal with graphs: True",
            marks=pytest.mark.skipif(Version(transformers.__version__) < Version("4.57"), reason="needs 4.57"),
        ),
        ("kernel_alone", ["--steps", "3"], "flashcore_decode"),
        pytest.param(
            "serve_batch",
            ["--max-new-tokens", "3"],
            "the same alone: True",
            marks=pytest.mark.skipif(Version(transformers.__version__) < Version("5.17"), reason="needs 5.17"),
        ),
    ],
)
def test_example(name, argv, says, capsys, paths, monkeypatch):
    """Without asking Transformers for anything that it calls deprecated, in a warning or in its log."""
    logged = []
    monkeypatch.setattr(transformers.logging.get_logger("transformers.utils.generic"), "warning_once", logged.append)
    example(name).main(argv)
    assert not logged
    said = capsys.readouterr().out
    assert says in said and "False" not in said
    assert paths and set(paths) <= {"flashcore_forward", "flashcore_decode", "flashcore_paged"}


def test_every_example_is_run():
    (mark,) = test_example.pytestmark
    tested = {getattr(case, "values", case)[0] for case in mark.args[1]}
    assert tested == {path.stem for path in EXAMPLES.glob("*.py")}
