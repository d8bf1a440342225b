"""Prefill: many queries, in tiles of 64 or 128 of one head."""
