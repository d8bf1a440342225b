"""Decode: up to 16 query tokens on many keys, which are cut into chunks."""
