"""`python -m flashcore_hf parity`: greedy decoding beside eager and SDPA."""
