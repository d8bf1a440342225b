"""flashcore for Hugging Face Transformers: importing this makes `attn_implementation="flashcore"` work.

`enable()` and `disable()` switch the backend on and off again; importing enables it. Where something that is needed
cannot be imported, this package can still be: `import_error` then holds the reason, and `python -m flashcore_hf env`
prints it.
"""

__version__ = "0.1.0"

import_error: str | None = None

try:
    from .backend import disable, enable

    enable()
except Exception as error:  # noqa: BLE001 - `env` must be able to report whatever went wrong
    import_error = f"{type(error).__name__}: {error}"

    def enable() -> None:
        """Raise: the backend could not be imported."""
        raise ImportError(f"flashcore cannot be enabled: {import_error}. `python -m flashcore_hf env` says more.")

    def disable() -> None:
        """Do nothing: the backend could not be imported, so nothing was changed."""


__all__ = ["__version__", "disable", "enable", "import_error"]
