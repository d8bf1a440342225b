"""Prompts on keys and values that lie in pages."""
