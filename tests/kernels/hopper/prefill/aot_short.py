"""Compile the Hopper kernel for short sequences ahead of time, without a GPU, and report what ptxas made of it.

    python -m tests.kernels.hopper.prefill.aot_short --keys 64 128 --features none range-lse

One JSON line for each compiled variant, with its `problems`.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator

from ...aot import SHARED_LIMIT
from ...machine_code import MAIN_LOOP_SPILLS, resources
from ..paged.aot_pages import signature_of

FEATURES = ("none", "lse", "range", "range-lse", "lse-dropout", "range-lse-dropout")


def problems(report: dict) -> list[str]:
    """What is wrong: registers that spill, products that ptxas serialised, programs that find no room on an SM.

    With a key range a few values may be parked, mostly for the blocks in which it hides something.
    """
    wrong = []
    in_main_loop = max(spills for _, spills, _ in report["wgmma_loops"])
    if report["stack"] and "range" not in report["features"] or in_main_loop > MAIN_LOOP_SPILLS:
        wrong.append(f"{report['stack']} bytes of stack a thread: registers spill, {in_main_loop} in the main loop")
    if report["wgmma_arrive"] > report["wgmma"] / 2:
        wrong.append(f"{report['wgmma_arrive']} warpgroup.arrive for {report['wgmma']} wgmma: they are serialised")
    if report["registers"] > report["asked_registers"]:
        wrong.append(f"{report['registers']} registers, and {report['asked_registers']} were asked for")
    resident = 512 // report["asked_registers"]
    if resident * (report["shared"] + 1024) > 233472:
        wrong.append(f"{report['shared']} bytes of shared memory, too many for {resident} programs on an SM")
    return wrong


def compile_variant(keys: int, features: str, **override) -> dict:
    """The report of one variant; `override` replaces fields of its row."""
    import torch
    import triton
    from flashcore_kernels.choose import choose
    from flashcore_kernels.device import Device
    from flashcore_kernels.hopper.descriptors import tile_layout
    from flashcore_kernels.hopper.prefill.short import flashcore_hopper_short
    from flashcore_kernels.hopper.prefill.short_launch import short_constants
    from flashcore_kernels.problem import Problem
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    has_range, has_lse = "range" in features, "lse" in features
    problem = Problem(
        batch_size=64, num_heads=12, num_kv_heads=12, num_queries=keys, num_keys=keys, head_dim=64, value_dim=64,
        dtype=torch.bfloat16, device_type="cuda", range_layout="sequence" if has_range else None, mask_kind=None,
        scale=0.125, softcap=0.0, left=-1, right=-1, query_start=0, has_sinks=False, aligned=True,
        dropout=0.1 if "dropout" in features else 0.0, fp8=False, mask_bits=0, mask_rows=False,
    )  # fmt: skip
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    plan = choose(problem, Device("cuda", 90, triton=version))
    assert plan.kernel == "flashcore_hopper_short", plan
    config = plan.config._replace(row=plan.config.row._replace(**override))
    constants = short_constants(problem, config, has_lse)
    tiles = {}
    for name, rows in (("q", config.block_m), ("k", config.block_n), ("v", config.block_n)):
        layout = tile_layout(rows, constants.d0, problem.dtype)
        tiles[f"{name}_desc"] = f"tensordesc<bf16[1,1,{rows},{constants.d0}],{layout!r}>"
    pointers = {"Out": "bf16", "Lse": "fp32" if has_lse else None, "Range": "i32" if has_range else None}
    pointers["Philox"] = "i64" if problem.dropout else None
    signature, constexprs, attributes = signature_of(flashcore_hopper_short, pointers, constants, tiles)
    source = GluonASTSource(fn=flashcore_hopper_short, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.row.registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    report = {
        "keys": keys, "features": features, "triton": triton.__version__, "shared": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[90], "tile": [config.block_m, config.block_n, config.num_warps, config.num_stages],
        "asked_registers": config.row.registers,
    }  # fmt: skip
    report |= resources(compiled.asm["cubin"], True)
    return report | {"problems": problems(report)}


def reports(command: list[str]) -> Iterator[dict]:
    """The report of each variant of a command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keys", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--features", nargs="+", default=list(FEATURES), choices=FEATURES)
    parser.add_argument("--row", nargs="*", default=[], help="fields of the row, such as registers=168 stages=2")
    arguments = parser.parse_args(command)
    override = {name: int(size) for name, size in (pair.split("=") for pair in arguments.row)}
    for keys, features in itertools.product(arguments.keys, arguments.features):
        yield compile_variant(keys, features, **override)


def all_reports(command: list[str]) -> list[dict]:
    """`reports` at once, for a caller in another process."""
    return list(reports(command))


if __name__ == "__main__":
    for report in reports(sys.argv[1:]):
        print(json.dumps(report), flush=True)
