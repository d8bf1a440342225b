"""Compile the kernels for pages ahead of time, without a GPU, and report what ptxas made of them (see ../aot.py).

    python -m tests.kernels.portable.aot_paged --arch 90 --head-dim 64 128 --calls single mixed ring

One JSON line for each compiled variant, with its `problems`.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

from ..aot import SHARED_LIMIT
from ..machine_code import problems, resources

# What a call is: "single" tokens of a server's steps, "mixed" with prompts, "ring" the same in a layer with a window.
CALLS = {
    "single": {"max_queries": 1},
    "mixed": {},
    "small-pages": {"page_size": 16},
    "ring": {"ring": 4096, "left": 4095, "new_keys": True},
    "ring-single": {"ring": 4096, "left": 4095, "max_queries": 1},
    "all": {"softcap": 30.0, "has_sinks": True, "page_size": 16, "ring": 4096, "left": 4095, "new_keys": True},
    "fp8": {"fp8": True},
}


class Variant(NamedTuple):
    """What is compiled: the kernel for an architecture, an element type, a head dimension, and one of CALLS."""

    arch: int
    dtype: str  # "fp16", "bf16" or "fp32"
    head_dim: int
    call: str


def problem_of(variant: Variant):
    import torch
    from flashcore_kernels.paged_problem import PagedProblem

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[variant.dtype]
    common = PagedProblem(
        num_tokens=256, num_sequences=256, num_heads=32, num_kv_heads=8, head_dim=variant.head_dim,
        value_dim=variant.head_dim, page_size=256, num_pages=1000, table_width=64, dtype=dtype, ring=0, new_keys=False,
        cumulative=True, max_queries=256, scale=1.0, softcap=0.0, left=-1, right=0, has_sinks=False, fp8=False,
    )  # fmt: skip
    return common._replace(**CALLS[variant.call])


def source(variant: Variant, config):
    """The ASTSource of the variant, specialised as a launch on aligned tensors would be."""
    from flashcore_kernels.portable.paged.kernel import flashcore_paged
    from flashcore_kernels.portable.paged.launch import kernel_constants
    from triton.compiler import ASTSource

    problem = problem_of(variant)
    constants = kernel_constants(problem, config, variant.call == "all", problem.several)
    stored = "fp8e4nv" if problem.fp8 else variant.dtype
    pointers = {"Q": variant.dtype, "K": stored, "V": stored, "Out": variant.dtype}
    pointers |= dict.fromkeys(("Table", "CuQ", "Lengths"), "i32")
    if constants["MAY_SPLIT"]:
        pointers |= {"Partial": "fp32", "Count": "i32"}
    if problem.new_keys:
        pointers |= {"NewK": variant.dtype, "NewV": variant.dtype}
    if problem.fp8:
        pointers |= {"KeyScale": "fp32", "ValueScale": "fp32"}
    if problem.has_sinks:
        pointers["Sinks"] = "fp32"
    if constants["HAS_LSE"]:
        pointers["Lse"] = "fp32"
    signature, attributes = {}, {}
    for position, name in enumerate(flashcore_paged.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = "*" + pointers[name]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name[0].isupper():  # a pointer that this variant lacks
            signature[name], constants[name] = "constexpr", None
        elif name.endswith("_scale") or name == "one":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith("stride_") and name != "stride_table" and variant.head_dim % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=flashcore_paged, signature=signature, constexprs=constants, attrs=attributes)


def compile_variant(variant: Variant, **override) -> dict:
    """Compile one variant; `override` replaces fields of its config."""
    import triton
    from flashcore_kernels.device import Device
    from flashcore_kernels.portable.paged.choose import choose_paged
    from triton.backends.compiler import GPUTarget

    config = choose_paged(problem_of(variant), Device("cuda", variant.arch))._replace(**override)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source(variant, config), target=GPUTarget("cuda", variant.arch, 32), options=options)
    report = variant._asdict() | {
        "kernel": "flashcore_paged",
        "triton": triton.__version__,
        "tile": [config.block_m, config.block_n, config.decode_m, config.decode_n, *options.values()],
        "shared": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[variant.arch],
    }
    report |= resources(compiled.asm["cubin"], variant.arch == 90)
    return report | {"problems": problems(report)}


def reports(command: list[str]) -> Iterator[dict]:
    """The report of each variant of a command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[90])
    parser.add_argument("--dtype", nargs="+", default=["bf16"])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128])
    parser.add_argument("--calls", nargs="+", default=list(CALLS), choices=list(CALLS))
    parser.add_argument("--config", nargs="*", default=[], help="fields of the config, such as block_n=32")
    arguments = parser.parse_args(command)
    override = {name: int(size) for name, size in (pair.split("=") for pair in arguments.config)}
    for parts in itertools.product(arguments.arch, arguments.dtype, arguments.head_dim, arguments.calls):
        variant = Variant(*parts)
        if variant.call == "fp8" and (variant.arch < 89 or variant.dtype == "fp32"):
            continue
        yield compile_variant(variant, **override)


def all_reports(command: list[str]) -> list[dict]:
    return list(reports(command))


if __name__ == "__main__":
    for report in reports(sys.argv[1:]):
        print(json.dumps(report), flush=True)
