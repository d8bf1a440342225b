"""Which path served how many calls, so that a test or a user can see that a kernel was really run."""

from collections import Counter

import torch

# How many calls each path served since the process began (or since someone cleared it), by kernel name; a backward
# counts apart from its forward. In a graph of torch.compile an operator counts whenever it runs.
path_counts: Counter[str] = Counter()


@torch.compiler.assume_constant_result
def count_path(path: str) -> None:
    """Count a call that `path` serves. Never traced: a graph that read the counter would be compiled at every call."""
    path_counts[path] += 1
