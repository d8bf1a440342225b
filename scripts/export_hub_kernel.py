"""flashcore_kernels as a kernel repository, in the layout that Hugging Face's `kernels` package loads.

python scripts/export_hub_kernel.py FOLDER --repo-id ORG/flash-attn3-flashcore

writes `build/torch-cuda/` and `build/torch-cpu/`: no compiled code, one build for every PyTorch, Python and platform.
As attn_implementation="ORG/flash-attn3-flashcore" Transformers loads it from the Hub, or offline from the folder where
LOCAL_KERNELS="ORG/flash-attn3-flashcore=FOLDER" is set. `kernels.get_local_kernel(FOLDER)` loads it too.

A repository whose name has "flash" and "3" in it is what Transformers takes for FlashAttention-3: its continuous
batching then uses block tables.
"""

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kernels" / "flashcore_kernels"
BACKENDS = ("cuda", "cpu")
# What a copy calls its operators: an installed flashcore, or another version of the kernel, may be in the same process.
NAMESPACE = (
    (r'Library\("flashcore"', 'Library("{id}"'),
    (r"\btorch\.ops\.flashcore\.", "torch.ops.{id}."),
    (r'(register_\w+\(")flashcore::', r"\g<1>{id}::"),
)
INIT = '''"""{name}: flashcore's attention kernels {version}, with FlashAttention's functions in front."""

from . import flashcore_kernels
from .flashcore_kernels import attention, explain, path_counts
from .flashcore_kernels.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = flashcore_kernels.__version__
'''
CARD = """---
license: apache-2.0
tags:
- kernels
---

# {name}

FlashAttention's functions over flashcore's Triton kernels, version {version}.

```python
from kernels import get_kernel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="{repo_id}")
kernel = get_kernel("{repo_id}", version={kernel_version})
out = kernel.flash_attn_func(q, k, v, causal=True)
```
"""


def export(folder: Path, repo_id: str, kernel_version: int = 1, backends: tuple[str, ...] = BACKENDS) -> list[Path]:
    """Write the repository to `folder`, in place of builds that are there; returns a folder for each backend.

    Raises:
        ValueError: the name is none that `kernels` takes, or a file would not work in a copy.
    """
    name = repo_id.partition("/")[2]
    if not re.fullmatch(r"[^/]+/[a-z][a-z0-9-]*[a-z0-9]", repo_id):
        raise ValueError(
            f"--repo-id: got {repo_id!r}; ORG/NAME is needed, the name of small letters, digits and dashes"
        )
    sources = {
        path.relative_to(PACKAGE).as_posix(): path.read_text()
        for path in sorted(PACKAGE.rglob("*"))
        if path.suffix == ".py" or path.name == "py.typed"
    }
    for file, text in sources.items():
        check_imports(file, text)
    version = re.search(r'__version__ = "([^"]+)"', sources["version.py"])[1]
    said = {"name": name, "version": version, "repo_id": repo_id, "kernel_version": kernel_version}
    digest = hashlib.sha256(json.dumps([sources, INIT]).encode()).hexdigest()[:7]
    builds = []
    for backend in backends:
        build = folder / "build" / f"torch-{backend}"
        if build.exists():
            shutil.rmtree(build)
        identifier = f"_{name.replace('-', '_')}_{backend}_{digest}"
        write(build / "__init__.py", INIT.format(**said))
        for file, text in sources.items():
            write(build / "flashcore_kernels" / file, renamed(file, text, identifier))
        metadata = {
            "name": name,
            "id": identifier,
            "version": kernel_version,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        write(build / "metadata.json", json.dumps(metadata, indent=2) + "\n")
        builds.append(build)
    write(folder / "README.md", CARD.format(**said))
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    return builds


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def check_imports(file: str, text: str) -> None:
    """Raise where a file imports the package by its name: a copy is loaded under another."""
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        for name in names:
            if name.partition(".")[0] in ("flashcore_kernels", "flashcore_hf", "transformers"):
                raise ValueError(f"{file}, line {node.lineno}: imports {name}; imports within the package are relative")


def renamed(file: str, text: str, identifier: str) -> str:
    """A source with its operators in the namespace `identifier`."""
    for pattern, to in NAMESPACE:
        text = re.sub(pattern, to.format(id=identifier), text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and node.attr == "flashcore" and ast.unparse(node).endswith("ops.flashcore"):
            raise ValueError(f"{file}, line {node.lineno}: an operator is spelt in a way that the export does not know")
        in_call = [arg for arg in node.args if isinstance(arg, ast.Constant)] if isinstance(node, ast.Call) else []
        if any(isinstance(arg.value, str) and re.match(r"flashcore(::|$)", arg.value) for arg in in_call):
            raise ValueError(f"{file}, line {node.lineno}: an operator is spelt in a way that the export does not know")
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the repository")
    parser.add_argument("--repo-id", required=True, help="ORG/NAME, such as ORG/flash-attn3-flashcore")
    parser.add_argument("--version", type=int, default=1, help="the kernel's version on the Hub (a branch vN)")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    options = parser.parse_args(arguments)
    try:
        builds = export(options.folder, options.repo_id, options.version, tuple(options.backends))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for build in builds:
        print(build)
    return 0


if __name__ == "__main__":
    sys.exit(main())
