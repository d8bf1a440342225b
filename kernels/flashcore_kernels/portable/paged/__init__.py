"""Attention on keys and values that are kept in pages, on every GPU: its choice, kernels and launches."""
