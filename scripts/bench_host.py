"""Host time of one decode step, and where it goes: flashcore's attention function, its cache, its masks, a whole layer.

usage: python scripts/bench_host.py [--json FILE] [--device cuda|cpu] [--calls N] [--profile]

On a GPU the kernels are launched for real, few enough in a row that the launch queue never fills. On a CPU the launch
is left out, so that what remains is the Python around it.
"""

import argparse
import cProfile
import pstats
import statistics
import sys
import time
import types
from pathlib import Path

import benchmarking
import torch
from flashcore_kernels import attention as kernel_attention
from flashcore_kernels.device import Device, device_of
from flashcore_kernels.runtime import launch as launch_module
from flashcore_kernels.runtime import prepared
from transformers import DynamicCache
from transformers.models.llama import LlamaConfig

import flashcore_hf
from flashcore_hf.attention import flashcore_attention
from flashcore_hf.cache.flashcore_cache import FlashCoreCache
from flashcore_hf.masks import flashcore_mask

BATCH, HEADS, KV_HEADS, KEYS, HEAD_DIM = 1, 32, 8, 2048, 128
AT_ONCE = 200  # calls between two synchronisations: fewer than the launch queue holds


class Layer(torch.nn.Module):
    """What the attention function asks of a model's layer."""

    is_causal = True


def host_microseconds(calls: dict, rounds: int) -> dict[str, float]:
    """Median host time of each call, without waiting for the device; in turn, because a host's speed changes."""
    cuda = torch.cuda.is_available()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            for _ in range(AT_ONCE):
                call()
            times[name].append((time.perf_counter() - began) / AT_ONCE * 1e6)
    return {name: statistics.median(each) for name, each in times.items()}


def parts(device: str) -> dict:
    """name -> a call of that part of a decode step."""
    dtype = torch.bfloat16
    query = torch.randn(BATCH, 1, HEADS, HEAD_DIM, device=device, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(BATCH, KV_HEADS, 2 * KEYS, HEAD_DIM, device=device, dtype=dtype) for _ in range(2))
    key, value = key[:, :, :KEYS], value[:, :, :KEYS]
    new = torch.randn(BATCH, KV_HEADS, 1, HEAD_DIM, device=device, dtype=dtype)
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)
    padding = torch.ones(BATCH, KEYS, dtype=torch.bool, device=device)
    layer = Layer()

    def mask():
        return flashcore_mask(
            batch_size=BATCH, q_length=1, kv_length=KEYS, q_offset=KEYS - 1, kv_offset=0, attention_mask=padding,
            config=config, device=padding.device, dtype=dtype,
        )  # fmt: skip

    def mask_without_padding():
        return flashcore_mask(
            batch_size=BATCH, q_length=1, kv_length=KEYS, q_offset=KEYS - 1, kv_offset=0, attention_mask=None,
            config=config, device=padding.device, dtype=dtype,
        )  # fmt: skip

    ranges = mask()
    caches = {"DynamicCache.update": DynamicCache(config=config), "FlashCoreCache.update": FlashCoreCache(config)}
    for cache in caches.values():
        cache.update(key, value, 0)
    scale = HEAD_DIM**-0.5

    def attend():
        flashcore_attention(layer, query, key, value, ranges, scaling=scale, dropout=0.0, position_ids=None)

    def attend_to_another_length():  # as in the first layer of each step
        prepared._calls.clear()
        attend()

    def updating(cache):
        def call():
            cache.update(new, new, 0)

        return call

    return {
        "attention function (adapter's entry to return)": attend,
        "attention function, first layer of a step (another length than before)": attend_to_another_length,
        "flashcore_kernels.attention alone": lambda: kernel_attention(query, key, value, key_range=ranges, scale=scale),
        **{name: updating(cache) for name, cache in caches.items()},
        "mask function, padded (once a step)": mask,
        "mask function, no padding (once a step)": mask_without_padding,
        "scaled_dot_product_attention": lambda: torch.nn.functional.scaled_dot_product_attention(
            query, key, value, enable_gqa=True
        ),
    }


def pretend_a_gpu() -> None:
    """As if tensors were on a Hopper GPU, up to the launch, which does nothing."""
    launch, probe, hopper = launch_module.launch, device_of, Device("cuda", 90, triton=(3, 6))
    for module in list(sys.modules.values()):
        if vars(module).get("launch") is launch:  # getattr would make Transformers import what it has none of
            module.launch = lambda *arguments, **options: None
        if vars(module).get("device_of") is probe:
            module.device_of = lambda device: hopper
    compiled = types.SimpleNamespace(run=lambda *arguments: None, function=None, packed_metadata=None)
    prepared.compiled_kernel = lambda *arguments: compiled
    torch.Tensor.is_cuda, torch.Tensor.get_device = True, lambda self: 0
    torch.cuda.current_device = lambda: None  # the index of a CPU's device
    torch._C._cuda_getDevice = torch._C._cuda_getCurrentRawStream = lambda *index: 0


def profiled(call) -> list[dict]:
    """The functions that take most time of their own, in microseconds a call; profiling makes all of it slower."""
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(AT_ONCE):
        call()
    profile.disable()
    found = []
    for (file, line, name), (_, calls, own, total, _) in pstats.Stats(profile).stats.items():
        where = f"{Path(file).name}:{line}:{name}" if line else name
        found.append(
            {"where": where, "calls": calls // AT_ONCE, "own": own / AT_ONCE * 1e6, "all": total / AT_ONCE * 1e6}
        )
    return sorted(found, key=lambda each: -each["own"])[:20]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--profile", action="store_true", help="also show where the attention function's time goes")
    arguments = parser.parse_args()
    assert flashcore_hf.import_error is None, flashcore_hf.import_error
    if arguments.device == "cpu":
        pretend_a_gpu()
    record = benchmarking.Record(arguments.json, device=arguments.device)
    with torch.inference_mode():
        calls = parts(arguments.device)
        if arguments.device == "cpu":
            del calls["scaled_dot_product_attention"]
        for call in calls.values():
            call()
        for name, host in host_microseconds(calls, max(arguments.calls // AT_ONCE, 3)).items():
            row = {"case": name, "unit": "us", "host": round(host, 2)}
            print(f"{row['host']:8.2f} us  {name}", flush=True)
            record.add(row)
        if arguments.profile:
            for each in profiled(next(iter(calls.values()))):
                print(f"{each['own']:8.2f} us own {each['all']:8.2f} us in all {each['calls']:4d} x  {each['where']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
