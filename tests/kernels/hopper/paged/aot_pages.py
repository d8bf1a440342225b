"""Compile the Hopper kernels for pages ahead of time, without a GPU, and report what ptxas made of them.

    python -m tests.kernels.hopper.paged.aot_pages --kernel prompts single --head-dim 128 --page-size 16 256

One JSON line for each compiled variant, with its `problems` (see ../../aot.py).
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator

from ...aot import SHARED_LIMIT
from ...machine_code import problems, resources

FEATURES = {
    "none": {},
    "window": {"left": 1023},
    "all": {"softcap": 30.0, "has_sinks": True, "left": 1023},
    "ring": {"ring": 4096, "left": 4095, "new_keys": True},  # from here on single tokens alone
    "fp8": {"fp8": True},
}


def problem_of(head_dim: int, page_size: int, features: str, group: int, sequences: int):
    import torch
    from flashcore_kernels.paged_problem import PagedProblem

    problem = PagedProblem(
        num_tokens=8192, num_sequences=sequences, num_heads=8 * group, num_kv_heads=8, head_dim=head_dim,
        value_dim=head_dim, page_size=page_size, num_pages=1000, table_width=131072 // page_size, dtype=torch.bfloat16,
        ring=0, new_keys=False, cumulative=True, max_queries=8192, scale=1.0, softcap=0.0, left=-1, right=0,
        has_sinks=False, fp8=False,
    )  # fmt: skip
    return problem._replace(**FEATURES[features])


def signature_of(kernel, pointers: dict, constants, tiles: dict) -> tuple[dict, dict, dict]:
    """(signature, constexprs, attributes): as of a launch on aligned tensors; pointers of None are absent."""
    signature, attributes, constexprs = {}, {}, {"C": constants}
    for position, name in enumerate(kernel.arg_names):
        if name == "C":
            signature[name] = "constexpr"
        elif name in tiles:
            signature[name] = tiles[name]
        elif name[0].isupper() and pointers.get(name, "i32") is None:
            signature[name], constexprs[name] = "constexpr", None
        elif name[0].isupper():
            signature[name] = "*" + pointers.get(name, "i32")
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.endswith("_scale") else "i32"
    return signature, constexprs, attributes


def prompts(problem, device, has_lse: bool, **override):
    """(kernel, its signature and so on, options, what its report says) of prompts."""
    from flashcore_kernels.hopper.paged.choose import choose_hopper_prompts
    from flashcore_kernels.hopper.paged.kernel import flashcore_hopper_paged
    from flashcore_kernels.hopper.paged.launch import kernel_constants, pool_tile, query_tile, tile_layout

    config = choose_hopper_prompts(problem, device, True)
    config = config._replace(row=config.row._replace(**override))
    constants = kernel_constants(problem, config, has_lse)
    shapes = {
        "q_desc": query_tile(constants), "k_desc": pool_tile(constants.d0, constants),
        "v_desc": pool_tile(constants.dv0, constants),
    }  # fmt: skip
    tiles = {
        name: f"tensordesc<bf16[{','.join(map(str, shape))}],{tile_layout(tuple(shape), problem.dtype)!r}>"
        for name, shape in shapes.items()
    }
    pointers = {"Out": "bf16", "Lse": "fp32" if has_lse else None, "Sinks": "fp32" if problem.has_sinks else None}
    options = {"num_warps": 4, "num_stages": config.row.stages}
    arguments = signature_of(flashcore_hopper_paged, pointers, constants, tiles)
    return flashcore_hopper_paged, arguments, options, {"kernel": "flashcore_hopper", "tile": [128, constants.block_n]}


def single(problem, device, has_lse: bool):
    """The same of single tokens."""
    from flashcore_kernels.hopper.decode.launch import compiler_options
    from flashcore_kernels.hopper.paged.choose import choose_hopper_single
    from flashcore_kernels.hopper.paged.decode import flashcore_hopper_paged_decode
    from flashcore_kernels.hopper.paged.decode_launch import shares

    config = choose_hopper_single(problem, device, True)
    constants = shares(problem, config, (8 * problem.head_dim,) * 2, has_lse).constants
    stored = "fp8e4nv" if problem.fp8 else "bf16"
    new, scale = "bf16" if problem.new_keys else None, "fp32" if problem.fp8 else None
    pointers = {
        "Q": "bf16", "K": stored, "V": stored, "NewK": new, "NewV": new, "Out": "bf16", "KeyScale": scale,
        "ValueScale": scale, "Lse": "fp32" if has_lse else None, "Sinks": "fp32" if problem.has_sinks else None,
    }  # fmt: skip
    options = {"num_warps": 4, "num_stages": config.num_stages, **compiler_options(constants)}
    said = {
        "kernel": "flashcore_hopper_decode", "resident": constants.resident,
        "tile": [config.block_m, config.block_n, constants.stages, constants.levels],
    }  # fmt: skip
    return (
        flashcore_hopper_paged_decode,
        signature_of(flashcore_hopper_paged_decode, pointers, constants, {}),
        options,
        said,
    )


def compile_variant(kernel: str, head_dim: int, page_size: int, features: str, group: int, sequences: int, **override):
    """The report of one variant; `override` replaces fields of the row of prompts."""
    import triton
    from flashcore_kernels.device import Device
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    problem = problem_of(head_dim, page_size, features, group, sequences)
    device = Device("cuda", 90, triton=tuple(map(int, triton.__version__.split(".")[:2])))
    make = {"prompts": prompts, "single": single}[kernel]
    function, (signature, constexprs, attributes), options, said = make(problem, device, features == "all", **override)
    source = GluonASTSource(fn=function, signature=signature, constexprs=constexprs, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    report = {
        **said, "dtype": "bf16", "head_dim": head_dim, "page_size": page_size, "features": features, "group": group,
        "sequences": sequences, "triton": triton.__version__, "shared": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[90],
    }  # fmt: skip
    report |= resources(compiled.asm["cubin"], True)
    return report | {"problems": problems(report)}


def reports(command: list[str]) -> Iterator[dict]:
    """The report of each variant of a command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", default=["prompts", "single"])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--page-size", type=int, nargs="+", default=[16, 256])
    parser.add_argument("--features", nargs="+", default=list(FEATURES), choices=list(FEATURES))
    parser.add_argument("--group", type=int, nargs="+", default=[4])
    parser.add_argument("--sequences", type=int, nargs="+", default=[192])
    parser.add_argument("--row", nargs="*", default=[], help="fields of the row, such as consumer_registers=200")
    arguments = parser.parse_args(command)
    override = {name: int(size) for name, size in (pair.split("=") for pair in arguments.row)}
    for parts in itertools.product(
        arguments.kernel, arguments.head_dim, arguments.page_size, arguments.features, arguments.group,
        arguments.sequences,
    ):  # fmt: skip
        if parts[0] == "single" or parts[3] not in ("ring", "fp8"):
            yield compile_variant(*parts, **override)


def all_reports(command: list[str]) -> list[dict]:
    return list(reports(command))


if __name__ == "__main__":
    for report in reports(sys.argv[1:]):
        print(json.dumps(report), flush=True)
