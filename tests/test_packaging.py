"""What an installation holds, what may import what, and that our `kernels` folder hides nobody else's package."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PACKAGES = {"flashcore_hf": ROOT / "flashcore_hf", "flashcore_kernels": ROOT / "kernels" / "flashcore_kernels"}


def sources() -> dict[str, Path]:
    """Every file that an installation must hold: its name inside site-packages -> where it is in the repository."""
    return {
        f"{name}/{path.relative_to(folder).as_posix()}": path
        for name, folder in PACKAGES.items()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def python(code: str, *arguments: str, folder: Path, path: tuple[Path, ...] = (), flags: tuple[str, ...] = ()) -> str:
    """Run `code` in a new Python that starts in `folder` with `path` in PYTHONPATH; returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what building needs: building writes beside the sources."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("flashcore_hf", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return copy


def pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_every_file(checkout, tmp_path):
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(checkout))
    (wheel,) = tmp_path.glob("flashcore_hf-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = set(sources())
    assert {"flashcore_hf/data/corpus.txt", "flashcore_hf/py.typed", "flashcore_kernels/py.typed"} <= expected
    assert expected <= held, f"missing: {sorted(expected - held)}"
    # Neither a package named kernels nor tests may land in a user's site-packages.
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == set(PACKAGES)


def test_the_kernels_alone_are_a_distribution_of_the_same_version(checkout, tmp_path):
    """For who has no use for Transformers: nothing of the adapter, and nothing that needs Transformers."""
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(checkout / "kernels"))
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(checkout))
    kernels, both = sorted(tmp_path.glob("*.whl"), key=lambda wheel: "kernels" not in wheel.name)
    assert kernels.name.split("-")[1] == both.name.split("-")[1]
    held = zipfile.ZipFile(kernels)
    files = {name for name in held.namelist() if ".dist-info/" not in name}
    assert files == {name for name in sources() if name.startswith("flashcore_kernels/")}
    (metadata,) = (held.read(name).decode() for name in held.namelist() if name.endswith("/METADATA"))
    needs = {line.split()[1].split(">")[0] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")}
    assert needs == {"torch", "triton"}


FIND_IN_EDITABLE = """
import importlib.util, site, sys
folder, *modules = sys.argv[1:]
finders, path = list(sys.meta_path), list(sys.path)
site.addsitedir(folder)  # runs the installation's .pth files
# In front of whatever else is installed here, perhaps under the same names.
sys.meta_path.sort(key=finders.__contains__)
sys.path.sort(key=path.__contains__)
for module in modules:
    spec = importlib.util.find_spec(module)
    print(spec.origin if spec else None)
"""


def test_editable_install_finds_every_module(checkout, tmp_path):
    pip("install", "--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed", "--prefix", str(tmp_path),
        "-e", str(checkout))  # fmt: skip
    (site_packages,) = tmp_path.rglob("site-packages")
    files = [name for name in sources() if name.endswith(".py")]
    modules = [name[:-3].replace("/", ".").removesuffix(".__init__") for name in files]
    assert "flashcore_kernels.portable.tables.sm90" in modules
    # Without `site`, and first on the path: an editable installation in use here has a finder of the same name.
    here = Path(torch.__file__).parents[1]
    origins = python(
        FIND_IN_EDITABLE, str(site_packages), *modules, folder=tmp_path, path=(site_packages, here), flags=("-S",)
    ).splitlines()
    for file, origin in zip(files, origins, strict=True):
        assert Path(origin) in (checkout / file, checkout / "kernels" / file)


def test_hugging_face_kernels_is_not_shadowed(tmp_path):
    """A regular package `kernels` that comes later on the path wins over our folder, which is none."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("name = 'theirs'\n")
    code = "import sys; assert sys.path[0] == ''; import kernels; print(getattr(kernels, 'name', None))"
    assert python(code, folder=ROOT, path=(tmp_path,)) == "theirs"


def test_shadowing_would_be_noticed(tmp_path):
    """The negative control: in a folder where kernels has an __init__.py, theirs is hidden."""
    for owner in ("ours", "theirs"):
        (tmp_path / owner / "kernels").mkdir(parents=True)
        (tmp_path / owner / "kernels" / "__init__.py").write_text(f"name = {owner!r}\n")
    assert (
        python("import kernels; print(kernels.name)", folder=tmp_path / "ours", path=(tmp_path / "theirs",)) == "ours"
    )


def test_transformers_works_from_the_repository_root():
    """Transformers asks whether Hugging Face's kernels is there; our folder must not be taken for it."""
    code = (
        "from transformers import LlamaConfig, LlamaForCausalLM;"
        "from transformers.utils import is_kernels_available;"
        "LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=8,"
        " num_attention_heads=2)); print('ok')"
    )
    assert python(code, folder=ROOT).endswith("ok")


def imported(source: str) -> set[str]:
    """The top-level names that a source text imports absolutely, wherever the import stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package, forbidden", [("flashcore_kernels", "transformers"), ("flashcore_hf", "triton")])
def test_packages_know_nothing_of_each_others_world(package, forbidden):
    texts = {name: path.read_text() for name, path in sources().items() if name.endswith(".py")}
    assert not [n for n, text in texts.items() if n.startswith(f"{package}/") and forbidden in imported(text)]


def test_forbidden_imports_would_be_noticed():
    """The negative control of the scan: each way to write an import."""
    for line in ("import triton", "import triton.language as tl", "from triton import jit", "from triton.x import y"):
        assert "triton" in imported(f"def f():\n    {line}\n")
    assert "triton" not in imported("from .triton import jit\nname = 'triton'\n")


def test_readme_table_is_what_the_results_say():
    """scripts/readme_tables.py wrote the README's table, and the results have not changed since."""
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "readme_tables.py"), "--check"])
    assert done.returncode == 0, "run python scripts/readme_tables.py"
