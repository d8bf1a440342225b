"""Compile the backward's kernels ahead of time, without a GPU, and report what ptxas made of them (see ../aot.py).

    python -m tests.kernels.portable.aot_backward --arch 90 --kernel dq dkdv --head-dim 64 128 --features range all

One JSON line for each compiled variant, with its `problems`.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

from ..aot import SHARED_LIMIT
from ..machine_code import PARKED_STACK, problems, resources

# What a call asks for; `all` is what takes most registers.
FEATURES = {
    "none": {},
    "range": {"range": "sequence", "grad_lse": True},
    "softcap": {"range": "sequence", "softcap": 30.0},
    "rows": {"range": "rows"},
    "dropout": {"range": "sequence", "dropout": True},
    "bool-mask": {"mask": "bool"},
    "bias": {"range": "sequence", "mask": "float"},
    "all": {"range": "sequence", "softcap": 30.0, "mask": "float", "dropout": True, "grad_lse": True},
}


# By wgmma, loads and stores of spilled registers in the loop over blocks that nearly all calls run. What spills in the
# loop for sequences with holes, and outside of loops, is not counted: with a key range there are both.
MAIN_LOOP_SPILLS = 2
# (kernel, head_dim) -> the same with Triton before 3.9, and from there on. On an H200 with Triton 3.6 a first form of
# the kernel for 128 with 21 was the fastest: 170 to 215 TFLOP/s, tiles of 32x128 without any 160 to 187, of 64x64 119
# to 135. For 256 they come with a key range, and with 3.9; smaller tiles would leave wgmma. That has not been timed.
KNOWN_SPILLS = {("dkdv", 128): (12, 36), ("dkdv", 256): (70, 94)}


class Variant(NamedTuple):
    """What is compiled: a kernel for an architecture, an element type, head dimensions, and a set of FEATURES."""

    kernel: str  # "dq", "dkdv", "mask" or "shift"
    arch: int
    dtype: str  # "fp16", "bf16" or "fp32"
    head_dim: int
    value_dim: int
    features: str


def problem_of(variant: Variant):
    import torch
    from flashcore_kernels.problem import Problem

    features = FEATURES[variant.features]
    mask = "float" if variant.kernel in ("mask", "shift") else features.get("mask")
    return Problem(
        batch_size=2, num_heads=32, num_kv_heads=8, num_queries=4096, num_keys=4096, head_dim=variant.head_dim,
        value_dim=variant.value_dim, device_type="cuda", range_layout=features.get("range"), mask_kind=mask, scale=1.0,
        dtype={"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[variant.dtype],
        softcap=features.get("softcap", 0.0), left=-1, right=0, query_start=0, has_sinks=False,
        dropout=0.1 if features.get("dropout") else 0.0,
    )  # fmt: skip


def source(variant: Variant, config, row):
    """The ASTSource of the variant, specialised as a launch on aligned tensors would be."""
    from flashcore_kernels.portable.backward import BackwardCall
    from flashcore_kernels.portable.backward_key import flashcore_backward_dkdv
    from flashcore_kernels.portable.backward_mask import flashcore_backward_mask
    from flashcore_kernels.portable.backward_query import flashcore_backward_dq
    from flashcore_kernels.portable.backward_shift import flashcore_backward_shift
    from triton.compiler import ASTSource

    kernels = {"dq": flashcore_backward_dq, "dkdv": flashcore_backward_dkdv, "mask": flashcore_backward_mask}
    kernels["shift"] = flashcore_backward_shift
    fn, features, problem = kernels[variant.kernel], FEATURES[variant.features], problem_of(variant)
    mask = (None, "bool", "float").index(problem.mask_kind)
    constants = {
        "HEAD_DIM": variant.head_dim, "VALUE_DIM": variant.value_dim, "BLOCK_D": config.block_d,
        "BLOCK_DV": config.block_dv, "BLOCK_M": row.block_m, "BLOCK_N": row.block_n, "EXACT": variant.dtype == "fp32",
        "RANGE": (None, "sequence", "rows").index(problem.range_layout), "MASK": mask, "SOFTCAP": problem.softcap > 0.0,
        "FOLD": BackwardCall.folds(problem), "SUM_M": False, "SUM_N": False,
        "BRANCH": row.branch,
    }  # fmt: skip
    constants = {name: constant for name, constant in constants.items() if name in fn.arg_names}
    pointers = dict.fromkeys(("Q", "K", "V", "Out", "GradOut", "DQ", "DK", "DV"), variant.dtype)
    pointers |= {"Lse": "fp32", "Delta": "fp32", "DMask": "fp32", "Shift": "fp32", "Sinks": "fp32"}
    pointers["Weight"] = "fp32" if mask == 2 else None
    pointers["GradLse"] = "fp32" if features.get("grad_lse") else None
    pointers["Range"] = "i32" if problem.range_layout else None
    pointers["Blocks"] = "i32" if problem.range_layout == "rows" else None
    pointers["Mask"] = (None, "u8", variant.dtype)[mask]
    pointers["Philox"] = "i64" if features.get("dropout") else None
    signature, attributes = {}, {}
    for position, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers and pointers[name] is None or name == "stride_mk":
            signature[name] = "constexpr"
            constants[name] = 1 if name == "stride_mk" else None
        elif name in pointers:
            signature[name] = "*" + pointers[name]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name.endswith("_scale") or name in ("scale", "one"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            of_a_tensor = name.startswith("stride_") and name[7] in "qkvogd"
            if of_a_tensor and variant.head_dim % 16 == 0 and variant.value_dim % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)


def compile_variant(variant: Variant, tile: tuple[int, int, int, int] | None = None) -> dict:
    """Compile one variant; `tile` stands in for that of the table's row."""
    import triton
    from flashcore_kernels.portable.backward_table import backward_config
    from triton.backends.compiler import GPUTarget

    config = backward_config(problem_of(variant), variant.arch)
    row = getattr(config, "mask" if variant.kernel == "shift" else variant.kernel)
    row = row if tile is None else row._replace(tile=tile)
    options = {"num_warps": row.num_warps, "num_stages": row.num_stages}
    code = source(variant, config, row)
    compiled = triton.compile(code, target=GPUTarget("cuda", variant.arch, 32), options=options)
    report = variant._asdict() | {
        "tile": list(row.tile),
        "triton": triton.__version__,
        "shared": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[variant.arch],
    }
    return report | resources(compiled.asm["cubin"], variant.arch == 90)


def wrong_with(report: dict) -> list[str]:
    """What is wrong with a compiled variant: an empty list is what tests want to see."""
    if not report.get("wgmma_loops"):
        return problems(report)
    wrong = []
    if report["shared"] > report["shared_limit"]:
        wrong.append(f"{report['shared']} bytes of shared memory, {report['shared_limit']} exist")
    newer = tuple(map(int, report["triton"].split(".")[:2])) >= (3, 9)
    allowed = KNOWN_SPILLS.get((report["kernel"], report["head_dim"]), (MAIN_LOOP_SPILLS,) * 2)[newer]
    _, spills, _ = report["wgmma_loops"][0]
    if spills > allowed:
        wrong.append(f"{spills} loads and stores of spilled registers in the main loop, {report['stack']} bytes")
    if allowed == MAIN_LOOP_SPILLS and len(report["wgmma_loops"]) == 1 and report["stack"] > PARKED_STACK:
        wrong.append(f"{report['stack']} bytes of stack a thread")
    if report["wgmma_arrive"] > report["wgmma"] / 2:
        wrong.append(f"{report['wgmma_arrive']} warpgroup.arrive for {report['wgmma']} wgmma: they are serialised")
    return wrong


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", default=["dq", "dkdv"], choices=["dq", "dkdv", "mask", "shift"])
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 89, 90, 100])
    parser.add_argument("--dtype", nargs="+", default=["bf16"])
    parser.add_argument("--head-dim", nargs="+", default=["64", "128", "256"], help="D, or D/Dv")
    parser.add_argument("--features", nargs="+", default=["range", "all"], choices=list(FEATURES))
    parser.add_argument("--tile", nargs=4, type=int, metavar=("M", "N", "WARPS", "STAGES"), help="instead of the table")
    return parser


def reports(command: list[str]) -> Iterator[dict]:
    """Compile what the command line asks for: a report of each variant, with its `problems`."""
    arguments = parser().parse_args(command)
    tile = tuple(arguments.tile) if arguments.tile else None
    for kernel, arch, dtype, size, features in itertools.product(
        arguments.kernel, arguments.arch, arguments.dtype, arguments.head_dim, arguments.features
    ):
        head_dim, _, value_dim = size.partition("/")
        variant = Variant(kernel, arch, dtype, int(head_dim), int(value_dim or head_dim), features)
        report = compile_variant(variant, tile)
        yield report | {"problems": wrong_with(report)}


def all_reports(command: list[str]) -> list[dict]:
    """`reports` at once, for a caller in another process."""
    return list(reports(command))


def main() -> int:
    failed = False
    for report in reports(sys.argv[1:]):
        failed |= bool(report["problems"])
        print(json.dumps(report), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
