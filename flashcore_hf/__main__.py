"""python -m flashcore_hf env | parity | serve"""

import argparse
import os
import sys


def parser() -> argparse.ArgumentParser:
    """The command line. Imports nothing that could fail, so that `env` can always be asked for."""
    root = argparse.ArgumentParser(prog="python -m flashcore_hf", description="flashcore for Hugging Face Transformers")
    commands = root.add_subparsers(dest="command", required=True)

    commands.add_parser(
        "env",
        help="what a bug report needs: versions, GPU, what is registered, and one kernel checked",
        description="Print what a bug report needs. Exit status 1 where the kernel check fails.",
    )

    parity = commands.add_parser(
        "parity",
        help="greedy decoding beside eager and sdpa, token for token",
        description="Generate with flashcore and with a reference backend, and compare tokens and logits. Without "
        "--model two small checkpoints are trained first. Exit status 1 where a row fails, by the rule that "
        "flashcore_hf/parity/rules.py begins with.",
    )
    parity.add_argument("--model", metavar="PATH_OR_ID", help="a checkpoint of yours; default: two tiny trained ones")
    parity.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parity.add_argument(
        "--device", help="cpu, or a device_map: cuda, cuda:1, auto; default: cuda where there is one, else cpu"
    )
    parity.add_argument(
        "--prompts", metavar="FILE", help="one prompt a line: text, or a JSON list of token ids; default: shipped text"
    )
    parity.add_argument(
        "--prompt-length", type=_positive, default=100, metavar="N", help="tokens of the longest shipped prompt (100)"
    )
    parity.add_argument("--max-new-tokens", type=_positive, default=200, metavar="N", help="tokens to generate (200)")
    parity.add_argument("--reference", choices=("eager", "sdpa"), help="default: beside each of the two")
    parity.add_argument(
        "--batch", type=_positive, nargs="+", metavar="B", help="batch sizes (1 4; with --prompts: 1 and all of them)"
    )
    parity.add_argument("--cache", choices=("dynamic", "static"), nargs="+", help="default: both")
    parity.add_argument("--fp8", action="store_true", help="also report what a FlashCoreCache in float8_e4m3fn changes")
    parity.add_argument("--workdir", metavar="DIR", help="keep the tiny checkpoints here, and use them again")
    parity.add_argument("--json", metavar="FILE", help="also write the rows here")

    commands.add_parser(
        "serve",
        help="`transformers serve` with flashcore; takes its arguments",
        description="`transformers serve ...`, which refuses the name, with --attn-implementation flashcore.",
        add_help=False,
    )
    return root


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["serve"]:
        from . import serve

        return serve.main(argv[1:])
    arguments = parser().parse_args(argv)
    if arguments.command == "env":
        from .environment import main as env

        return env()
    _interpret_without_gpu(arguments.device, argv)
    try:
        from .parity.command import main as parity
    except ImportError as error:
        print(f"parity cannot run: {error}\n`python -m flashcore_hf env` says more.", file=sys.stderr)
        return 1
    return parity(arguments)


def _interpret_without_gpu(device: str | None, argv: list[str]) -> None:
    """Where no GPU will run the kernels, begin this process anew with Triton's interpreter on.

    Triton reads the variable once, when it is imported, and by now something may have imported it.
    """
    from .environment import gpu_present, triton_present

    on_gpu = gpu_present() if device is None else device != "cpu"
    if on_gpu or not triton_present() or os.environ.get("TRITON_INTERPRET") == "1":
        return
    print("No GPU is used: starting again with TRITON_INTERPRET=1, for Triton's interpreter.", flush=True)
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "flashcore_hf", *argv], environment)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


if __name__ == "__main__":
    sys.exit(main())
