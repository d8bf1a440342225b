"""Greedy decoding beside eager and sdpa: the same as `python -m flashcore_hf parity`, with its arguments."""

import sys

from flashcore_hf.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["parity", *sys.argv[1:]]))
