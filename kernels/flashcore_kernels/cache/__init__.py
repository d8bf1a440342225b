"""Caches of keys and values, and what writes to them."""
