"""flashcore for Hugging Face Transformers: importing this makes `attn_implementation="flashcore"` work.

`enable()` and `disable()` switch the backend on and off again; importing enables it. Where something that is needed
cannot be imported, this package can still be: `import_error` then holds the reason, and `python -m flashcore_hf env`
prints it. `allow_argument(name)` lets a keyword that flashcore does not know pass through attention unread.

`FlashCoreCache`, `use_flashcore_cache` and `graphed` need Transformers 4.57. On 4.40 to 4.52 the way in is
`replace_attention_with_flashcore(model)`, which `restore_attention(model)` undoes. All are imported when asked for.
"""

import importlib

import_error: str | None = None
__version__ = "unknown"  # where the kernels cannot be imported

try:
    from flashcore_kernels import __version__

    from .backend import disable, enable

    enable()
except Exception as error:  # noqa: BLE001 - `env` must be able to report whatever went wrong
    import_error = f"{type(error).__name__}: {error}"

    def enable() -> None:
        """Raise: the backend could not be imported."""
        raise ImportError(f"flashcore cannot be enabled: {import_error}. `python -m flashcore_hf env` says more.")

    def disable() -> None:
        """Do nothing: the backend could not be imported, so nothing was changed."""


_LAZY = {
    "allow_argument": "arguments",
    "FlashCoreCache": "cache.flashcore_cache",
    "FlashCoreEncoderDecoderCache": "cache.encoder_decoder",
    "use_flashcore_cache": "cache.switch",
    "graphed": "graphs",
    "replace_attention_with_flashcore": "legacy",
    "restore_attention": "legacy",
}


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["__version__", "disable", "enable", "import_error"]
