"""Compile `flashcore_hopper_paged` ahead of time, without a GPU, and report what ptxas made of it (see ../../aot.py).

    python -m tests.kernels.hopper.paged.aot_prompts --head-dim 64 128 --page-size 16 256 --features none all

One JSON line for each compiled variant, with its `problems`.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator

from ...aot import SHARED_LIMIT
from ...machine_code import problems, resources

FEATURES = {"none": {}, "window": {"left": 1023}, "all": {"softcap": 30.0, "has_sinks": True, "left": 1023}}


def compile_variant(head_dim: int, page_size: int, features: str, group: int, **override) -> dict:
    """The report of one variant; `override` replaces fields of its row."""
    import torch
    import triton
    from flashcore_kernels.device import Device
    from flashcore_kernels.hopper.paged.choose import choose_hopper_paged
    from flashcore_kernels.hopper.paged.kernel import flashcore_hopper_paged
    from flashcore_kernels.hopper.paged.launch import kernel_constants, pool_tile, query_tile, tile_layout
    from flashcore_kernels.paged_problem import PagedProblem
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    problem = PagedProblem(
        num_tokens=8192, num_sequences=256, num_heads=8 * group, num_kv_heads=8, head_dim=head_dim,
        value_dim=head_dim, page_size=page_size, num_pages=1000, table_width=64, dtype=torch.bfloat16, ring=0,
        new_keys=False, cumulative=True, max_queries=8192, scale=1.0, softcap=0.0, left=-1, right=0, has_sinks=False,
        fp8=False,
    )  # fmt: skip
    problem = problem._replace(**FEATURES[features])
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    config = choose_hopper_paged(problem, Device("cuda", 90, triton=version), True)
    config = config._replace(row=config.row._replace(**override))
    constants = kernel_constants(problem, config, has_lse=features == "all")
    tiles = {
        "q_desc": query_tile(constants), "k_desc": pool_tile(constants.d0, constants),
        "v_desc": pool_tile(constants.dv0, constants),
    }  # fmt: skip
    pointers = {"Out": "bf16", "Lse": "fp32", "Sinks": "fp32"}
    absent = {"Lse": not constants.lse, "Sinks": not constants.sinks}
    signature, attributes, constexprs = {}, {}, {"C": constants}
    for position, name in enumerate(flashcore_hopper_paged.arg_names):
        if name == "C":
            signature[name] = "constexpr"
        elif name in tiles:
            layout = tile_layout(tuple(tiles[name]), torch.bfloat16)
            signature[name] = f"tensordesc<bf16[{','.join(map(str, tiles[name]))}],{layout!r}>"
        elif absent.get(name):
            signature[name], constexprs[name] = "constexpr", None
        elif name[0].isupper():
            signature[name] = "*" + pointers.get(name, "i32")
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.endswith("_scale") else "i32"
    source = GluonASTSource(
        fn=flashcore_hopper_paged, signature=signature, constexprs=constexprs, attrs=attributes
    )  # fmt: skip
    options = {"num_warps": 4, "num_stages": config.row.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    report = {
        "kernel": "flashcore_hopper", "head_dim": head_dim, "page_size": page_size, "features": features,
        "group": group, "tile": [128, constants.block_n], "triton": triton.__version__,
        "shared": compiled.metadata.shared, "shared_limit": SHARED_LIMIT[90],
    }  # fmt: skip
    report |= resources(compiled.asm["cubin"], True)
    return report | {"problems": problems(report)}


def reports(command: list[str]) -> Iterator[dict]:
    """The report of each variant of a command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--page-size", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--features", nargs="+", default=list(FEATURES), choices=list(FEATURES))
    parser.add_argument("--group", type=int, nargs="+", default=[4])
    parser.add_argument("--row", nargs="*", default=[], help="fields of the row, such as consumer_registers=200")
    arguments = parser.parse_args(command)
    override = {name: int(size) for name, size in (pair.split("=") for pair in arguments.row)}
    for parts in itertools.product(arguments.head_dim, arguments.page_size, arguments.features, arguments.group):
        yield compile_variant(*parts, **override)


def all_reports(command: list[str]) -> list[dict]:
    return list(reports(command))


if __name__ == "__main__":
    for report in reports(sys.argv[1:]):
        print(json.dumps(report), flush=True)
