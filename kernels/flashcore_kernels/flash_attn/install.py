"""For code that imports flash_attn: our functions under that name, where FlashAttention itself is not installed."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from . import dense, fa3, kvcache, padding, varlen

# The release whose functions these are: callers compare it.
FLASH_ATTN_VERSION = "2.8.4"

_FUNCTIONS = (
    dense.flash_attn_func,
    dense.flash_attn_kvpacked_func,
    dense.flash_attn_qkvpacked_func,
    varlen.flash_attn_varlen_func,
    varlen.flash_attn_varlen_kvpacked_func,
    varlen.flash_attn_varlen_qkvpacked_func,
    kvcache.flash_attn_with_kvcache,
)
_PADDING = (
    padding.index_first_axis,
    padding.index_put_first_axis,
    padding.pad_input,
    padding.unpad_input,
    padding.unpad_input_for_concatenated_sequences,
)
_MODULES = {
    "flash_attn": _FUNCTIONS,
    "flash_attn.flash_attn_interface": _FUNCTIONS,
    "flash_attn.bert_padding": _PADDING,
    "flash_attn_interface": (
        fa3.flash_attn_func,
        fa3.flash_attn_qkvpacked_func,
        fa3.flash_attn_varlen_func,
        fa3.flash_attn_with_kvcache,
    ),
}
_installed: dict[str, ModuleType] = {}


def install_as_flash_attn() -> None:
    """Let `import flash_attn` find flashcore's functions in this process, until `uninstall_as_flash_attn`.

    There are then `flash_attn`, `flash_attn.flash_attn_interface`, `flash_attn.bert_padding`, and FlashAttention-3's
    `flash_attn_interface`; nothing else of theirs. Who looks for an installed distribution, as Transformers does, finds
    none, as before: there, load models with attn_implementation="flashcore".

    Raises:
        RuntimeError: FlashAttention is installed, or something else is imported under its name.
    """
    if _installed:
        return
    for name in ("flash_attn", "flash_attn_interface"):
        loaded = sys.modules.get(name)
        found = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
        if loaded is not None or found is not None:
            where = getattr(found, "origin", None) or getattr(loaded, "__file__", None) or "an unknown place"
            raise RuntimeError(
                f"install_as_flash_attn: there is a {name} already, at {where}. flashcore does not take its place: "
                "uninstall it, or import from flashcore_kernels.flash_attn"
            )
    for name, functions in _MODULES.items():
        module = ModuleType(name, f"flashcore's functions, in the place of {name} (flashcore_kernels.flash_attn).")
        module.__spec__ = ModuleSpec(name, loader=None, origin=__file__, is_package=name == "flash_attn")
        module.__file__ = __file__  # which an ImportError names
        for function in functions:
            setattr(module, function.__name__, function)
        _installed[name] = module
    package = _installed["flash_attn"]
    package.__path__ = []
    package.__version__ = FLASH_ATTN_VERSION
    for name, module in _installed.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(package, child, module)
    sys.modules.update(_installed)


def uninstall_as_flash_attn() -> None:
    """Undo `install_as_flash_attn`. What was imported in the meantime stays with those who imported it."""
    for name, module in _installed.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _installed.clear()
