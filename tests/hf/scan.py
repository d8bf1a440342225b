"""What the source of a Transformers asks of attention backends, read without importing it: the tripwire's eyes."""

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Ways in which code asks whether an implementation's name is a FlashAttention's.
_FLASH_TEST = re.compile(
    r"""is_flash_attention_requested\(|["'][^"'\s]*flash[^"'\s]*["']\s*(?:not\s+)?in\s"""
    r"""|(?:==|!=|\bin\b)\s*[\[({]?\s*["'][^"'\s]*flash[^"'\s]*["']|startswith\(\s*["']flash|["']flash_attention_2["']\s*:"""
)


@functools.cache
def attention_arguments(root: Path) -> dict[str, set[str]]:
    """Keywords that layers pass to the function looked up in ALL_ATTENTION_FUNCTIONS -> model folders that do.

    Args:
        root: the folder of the transformers package.
    """
    found: dict[str, set[str]] = {}
    for file in sorted(root.glob("models/*/modeling_*.py")):
        source = file.read_text()
        if "ALL_ATTENTION_FUNCTIONS" not in source:
            continue
        lines = [number for number, line in enumerate(source.splitlines(), 1) if "ALL_ATTENTION_FUNCTIONS" in line]
        for function in _functions(ast.parse(source)):
            if any(function.lineno <= number <= function.end_lineno for number in lines):
                for keyword in _keywords_of_interface_calls(function):
                    found.setdefault(keyword, set()).add(file.parent.name)
    return found


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef]:
    """The functions in a tree, but not those within another function. Expressions are not looked at."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield child
        elif isinstance(child, ast.stmt):
            yield from _functions(child)


def _keywords_of_interface_calls(function: ast.FunctionDef) -> set[str]:
    nodes = list(ast.walk(function))
    if not any(map(_is_registry, nodes)):
        return set()
    names = {
        target.id
        for node in nodes
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        and any(map(_is_registry, ast.walk(node.value)))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }  # fmt: skip
    return {
        keyword.arg
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
        for keyword in node.keywords
        if keyword.arg is not None
    }


def _is_registry(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "ALL_ATTENTION_FUNCTIONS"


def mask_parts(root: Path) -> set[str]:
    """Functions of masking_utils that make or combine mask functions, and keywords that mask makers take."""
    tree = ast.parse((root / "masking_utils.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    parts = {f.name for f in functions if re.search(r"mask_function$|overlay$|^(and|or)_masks$|^remap_", f.name)}
    for function in functions:
        if re.fullmatch(r"create_\w*causal_mask|create_bidirectional\w*_mask|create_chunked\w*", function.name):
            parts |= {f"argument {a.arg}" for a in function.args.args + function.args.kwonlyargs}
    return parts


def mask_requests(root: Path) -> set[str]:
    """Keywords with which masking_utils calls a backend's mask function."""
    tree = ast.parse((root / "masking_utils.py").read_text())
    return {
        keyword.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "mask_interface"
        for keyword in node.keywords
        if keyword.arg is not None
    }


def flash_tests(root: Path) -> Counter[str]:
    """How often each file of the package asks whether a name is a FlashAttention's."""
    found: Counter[str] = Counter()
    for file in sorted(root.rglob("*.py")):
        if file.name.startswith(("modular_", "modeling_tf_", "modeling_flax_")):
            continue  # modular files are what modeling files are generated from
        source = file.read_text()
        if "flash" in source:
            code = "\n".join(
                line for line in source.splitlines() if not line.lstrip().startswith(("#", "def ", "from "))
            )
            count = len(_FLASH_TEST.findall(code))
            if count:
                found[file.relative_to(root).as_posix()] = count
    return found
