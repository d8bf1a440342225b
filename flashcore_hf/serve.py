"""`python -m flashcore_hf serve`: `transformers serve` with attn_implementation="flashcore", which it does not know.

The server checks the name against a list of its own, in one method, which is asked here about another name.
"""

import functools

from .models import NAME


def accept_name(manager: type) -> None:
    """Let the server's ModelManager take our name too; whatever else it refuses it goes on refusing."""
    original = manager._validate_args
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def _validate_args(self):
        asked = self.attn_implementation
        self.attn_implementation = "sdpa" if asked == NAME else asked
        try:
            return original(self)
        finally:
            self.attn_implementation = asked

    manager._validate_args = _validate_args


def main(argv: list[str]) -> int:
    """Run the server with Transformers' own command line; --attn-implementation is ours where it is not given.

    Returns:
        1 where this Transformers has no such server, or what it needs is not installed.
    """
    try:
        from transformers.cli.serving.model_manager import ModelManager
        from transformers.cli.transformers import app
    except ImportError as error:
        print(f"serve needs Transformers 5 with its server: pip install 'transformers[serving]' ({error})")
        return 1
    accept_name(ModelManager)
    if not any(argument.startswith("--attn-implementation") for argument in argv):
        argv = [*argv, "--attn-implementation", NAME]
    app(["serve", *argv])
    return 0
