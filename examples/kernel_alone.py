"""The kernels without Transformers: one call of attention, and a cache that grows by itself.

Runs on a GPU where there is one. On a CPU the answer comes from PyTorch, with a warning that says so, or from the
kernels in Triton's interpreter where TRITON_INTERPRET=1 is set.
"""

import argparse

import torch
from flashcore_kernels import attention, attention_with_kv_cache, make_key_range, naive_attention, path_counts


def left_padded_prefill(device: torch.device) -> None:
    """Three sequences, 8 query heads on 2 KV heads, causal, the first 0, 3 and 7 keys padding."""
    query = torch.randn(3, 8, 20, 64, device=device)  # [B, H, Q, D]
    key, value = torch.randn(2, 3, 2, 20, 64, device=device)  # [B, Hkv, K, D] each
    padding = torch.tensor([0, 3, 7], device=device)
    key_range = make_key_range(3, 20, first=padding, right=0)  # right=0: no key after the query's own
    output = attention(query, key, value, key_range=key_range)  # [B, H, Q, D]
    expected, _ = naive_attention(query.double(), key.double(), value.double(), key_range=key_range)
    print(f"prefill: largest error {(output - expected).abs().max():.1e} beside float64")


def decode_with_cache(device: torch.device, steps: int) -> None:
    """Prefill, then one token at a time; the cache is made by the first call."""
    cache = None
    for step in range(steps):
        length = 10 if step == 0 else 1
        query = torch.randn(1, 8, length, 64, device=device)  # [B, H, Q, D]
        key, value = torch.randn(2, 1, 2, length, 64, device=device)  # [B, Hkv, Q, D] each: only the new tokens
        output, cache = attention_with_kv_cache(query, key, value, cache)
    print(f"decode: {steps} steps, the last output is {list(output.shape)}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="steps of the decode loop, the prefill included")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path_counts.clear()
    left_padded_prefill(device)
    decode_with_cache(device, arguments.steps)
    print(f"served by: {', '.join(f'{name} {count}' for name, count in sorted(path_counts.items()))}")


if __name__ == "__main__":
    main()
