"""Compile the kernels ahead of time, without a GPU, and report what ptxas made of them.

Run as a program, in a process without TRITON_INTERPRET (the interpreter and the compiler cannot share one):

    python -m tests.kernels.aot --arch 90 --kernel flashcore_forward --head-dim 64 128 --features none mask-all

One JSON line for each compiled variant: shared memory in bytes, registers a thread, bytes of stack (spills), and for
sm_90 the counts of instructions that betray trouble.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

from .machine_code import problems, resources

# Bytes of shared memory that one block may have (CUDA programming guide, "maximum per thread block").
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

FEATURES = {
    "none": {},
    "few-queries": {"queries": 512},  # which may take another row of the Gluon kernel's table
    "range": {"range": "sequence"},
    "softcap": {"softcap": True},
    "sinks": {"sinks": True, "lse": True},
    "range-all": {"range": "sequence", "softcap": True, "sinks": True, "lse": True},
    "fp8": {"range": "sequence", "fp8": True},
    "dropout": {"range": "sequence", "lse": True, "dropout": True},
    # From here on keys may be seen by no row, and `choose` takes other rows of the tables.
    "rows": {"range": "rows"},
    "rows-all": {"range": "rows", "softcap": True, "sinks": True, "lse": True},
    "bool-mask": {"mask": "bool"},
    "float-mask": {"mask": "float"},
    "mask-all": {"range": "sequence", "mask": "float", "softcap": True, "sinks": True, "lse": True},
    "bool-mask-all": {"range": "sequence", "mask": "bool", "softcap": True, "sinks": True, "lse": True},
    "bool-mask-rows": {"range": "rows", "mask": "bool", "lse": True},
    "bias-fp32": {"mask": "float", "mask-dtype": "fp32"},
    "bias-row": {"mask": "float", "shared-by-queries": True},  # one row for all queries
    "padding-all": {"range": "sequence", "mask": "float", "shared-by-queries": True, "softcap": True, "sinks": True},
}
BITS = {"fp16": 16, "bf16": 16, "fp32": 32}


GLUON = ("flashcore_hopper", "flashcore_hopper_decode")
DECODE = ("flashcore_decode", "flashcore_hopper_decode")


class Variant(NamedTuple):
    """What is compiled: a kernel for an architecture, an element type, head dimensions, and a set of FEATURES."""

    kernel: str
    arch: int
    dtype: str  # "fp16", "bf16" or "fp32"
    head_dim: int
    value_dim: int
    features: str
    rows: int = 64  # decode: query tokens x group, which choose the tile's height
    batch: int = 2  # decode: which chooses how many programs are to fit on an SM

    def __str__(self):
        return f"{self.kernel} sm_{self.arch} {self.dtype} {self.head_dim}/{self.value_dim} {self.features} {self.rows}"


def _mask_dtype(variant: Variant) -> str:
    return FEATURES[variant.features].get("mask-dtype", variant.dtype)


def chosen_plan(variant: Variant):
    """A call of this kind, and the Plan that it gets."""
    import torch
    import triton
    from flashcore_kernels.choose import choose
    from flashcore_kernels.device import Device
    from flashcore_kernels.problem import Problem

    features = FEATURES[variant.features]
    decode = variant.kernel in DECODE
    queries = 1 if decode else features.get("queries", 4096)
    group = variant.rows if decode else 4
    problem = Problem(
        batch_size=variant.batch, num_heads=8 * group, num_kv_heads=8, num_queries=queries, num_keys=4096,
        head_dim=variant.head_dim, value_dim=variant.value_dim,
        dtype={"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[variant.dtype],
        device_type="cuda", range_layout=features.get("range"), mask_kind=features.get("mask"), scale=1.0,
        softcap=30.0 if features.get("softcap") else 0.0, left=-1, right=0, query_start=4096 - queries,
        has_sinks=bool(features.get("sinks")), dropout=0.1 if features.get("dropout") else 0.0,
        aligned=True, fp8=bool(features.get("fp8")),
        mask_bits={None: 0, "bool": 8, "float": BITS[_mask_dtype(variant)]}[features.get("mask")],
        mask_rows="mask" in features and not features.get("shared-by-queries"),
    )  # fmt: skip
    version = tuple(map(int, triton.__version__.split(".")[:2])) if variant.kernel in GLUON else (0, 0)
    chosen = choose(problem, Device("cuda", variant.arch, triton=version))
    assert chosen.kernel == variant.kernel, chosen
    return problem, chosen


def source(variant: Variant, config):
    """The ASTSource of the variant, specialised as a launch on aligned tensors would be."""
    from flashcore_kernels.portable.blocks import mask_number
    from flashcore_kernels.portable.decode import flashcore_decode
    from flashcore_kernels.portable.forward import flashcore_forward
    from triton.compiler import ASTSource

    fn = {"flashcore_forward": flashcore_forward, "flashcore_decode": flashcore_decode}[variant.kernel]
    features = FEATURES[variant.features]
    constants = {
        "HEAD_DIM": variant.head_dim,
        "VALUE_DIM": variant.value_dim,
        "BLOCK_D": config.block_d,
        "BLOCK_DV": config.block_dv,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "EXACT": variant.dtype == "fp32",
        "RANGE": (None, "sequence", "rows").index(features.get("range")),
        "HAS_RANGE": "range" in features,
        "MASK": mask_number(features.get("mask"), bool(features.get("shared-by-queries"))),
        "HAS_SINKS": bool(features.get("sinks")),
        "SOFTCAP": bool(features.get("softcap")),
        "HAS_LSE": bool(features.get("lse")),
    }
    if variant.kernel == "flashcore_forward":
        constants |= {"BLOCK_D1": config.block_d1, "BLOCK_DV1": config.block_dv1}
    else:
        constants |= {
            "MERGE_ROWS": max(min(config.block_m, 512 // config.block_dv), 1), "MIN_CHUNK": config.min_chunk,
            "MAX_SPLITS": config.max_chunks, "MAY_SPLIT": True,
        }  # fmt: skip
    constants = {name: constant for name, constant in constants.items() if name in fn.arg_names}
    stored = "fp8e4nv" if features.get("fp8") else variant.dtype
    pointers = {"Q": variant.dtype, "K": stored, "V": stored, "Out": variant.dtype}
    absent = {
        "Lse": None if features.get("lse") else "absent",
        "Range": None if features.get("range") else "absent",
        "Mask": None if features.get("mask") else "absent",
        "Sinks": None if features.get("sinks") else "absent",
        "KeyScale": None if features.get("fp8") else "absent",
        "ValueScale": None if features.get("fp8") else "absent",
        "Philox": None if features.get("dropout") else "absent",
    }
    pointers |= {"Lse": "fp32", "Range": "i32", "Sinks": "fp32", "Partial": "fp32", "Count": "i32"}
    pointers |= {"KeyScale": "fp32", "ValueScale": "fp32", "Philox": "i64"}
    pointers["Mask"] = "u8" if features.get("mask") == "bool" else _mask_dtype(variant)

    signature, attributes = {}, {}
    for position, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif absent.get(name) == "absent":
            signature[name] = "constexpr"
            constants[name] = None
        elif name in pointers:
            signature[name] = "*" + pointers[name]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in ("score_scale", "cap_scale", "one"):
            signature[name] = "fp32"
        elif name == "stride_mk":
            signature[name] = "constexpr"
            constants[name] = 1
        else:
            signature[name] = "i32"
            # A head_dim such as 40 leaves no stride divisible by 16; a KeyRange's width never promises it.
            if name.startswith("stride_") and name[7] in "qkvo" and variant.head_dim % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)


def hopper_source(variant: Variant, problem, plan):
    """The GluonASTSource of the variant of `flashcore_hopper`."""
    import torch
    from flashcore_kernels.hopper.descriptors import tile_layout
    from flashcore_kernels.hopper.prefill.kernel import flashcore_hopper
    from flashcore_kernels.hopper.prefill.launch import kernel_constants
    from triton.experimental.gluon._runtime import GluonASTSource

    features = FEATURES[variant.features]
    config = kernel_constants(problem, plan.config, bool(features.get("lse")))
    constants = {"C": config}
    keys, values = (config.d0, config.d1), (config.dv0, config.dv1)
    out = (values[0] * plan.config.row.query_buffers // 2, values[1])  # from one buffer it leaves in halves
    tiles = {"q": (config.rows, *keys), "k": (config.block_n, *keys), "v": (config.block_n, *values), "o": (64, *out)}
    features = features | {"output": config.one_copy, "bias": config.mask == 3}
    optional = {"Lse": ("lse", "*fp32"), "Range": ("range", "*i32"), "Sinks": ("sinks", "*fp32")}
    optional |= {"Lines": ("mask", "*i32"), "Bits": ("mask", "*i32"), "Bias": ("bias", f"*{_mask_dtype(variant)}")}
    optional |= {"Out": ("output", f"*{variant.dtype}"), "Philox": ("dropout", "*i64")}
    signature, attributes = {}, {}
    for position, name in enumerate(flashcore_hopper.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "mask_desc":
            if config.mask == 2:
                element = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[_mask_dtype(variant)]
                layout = tile_layout(64, config.block_n, element)
                signature[name] = f"tensordesc<{_mask_dtype(variant)}[1,1,64,{config.block_n}],{layout!r}>"
            else:
                signature[name], constants[name] = "constexpr", None
        elif name.endswith("_desc"):
            rows, columns = tiles[name[0]][0], tiles[name[0]][1 + int(name[1])]
            if columns and not (name[0] == "o" and config.one_copy):
                layout = tile_layout(rows, columns, problem.dtype)
                signature[name] = f"tensordesc<{variant.dtype}[1,1,{rows},{columns}],{layout!r}>"
            else:
                signature[name], constants[name] = "constexpr", None
        elif name in optional and not features.get(optional[name][0]):
            signature[name], constants[name] = "constexpr", None
        elif name in optional or name == "Counter":
            signature[name] = optional[name][1] if name in optional else "*i32"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.endswith("_scale") else "i32"
    return GluonASTSource(fn=flashcore_hopper, signature=signature, constexprs=constants, attrs=attributes)


def hopper_decode_source(variant: Variant, problem, plan):
    """As `hopper_source`, for `flashcore_hopper_decode` and the layout that caches have; and its DecodeConstants."""
    from flashcore_kernels.hopper.decode.kernel import flashcore_hopper_decode
    from flashcore_kernels.hopper.decode.launch import kernel_constants
    from flashcore_kernels.hopper.decode.sharing import share_out
    from triton.experimental.gluon._runtime import GluonASTSource

    features = FEATURES[variant.features]
    sharing, lse = share_out(problem, plan.config), bool(features.get("lse"))
    may_split = not sharing.whole_sequences
    config = kernel_constants(problem, plan.config, sharing, problem.head_dim, problem.value_dim, may_split, lse)
    stored = "fp8e4nv" if problem.fp8 else variant.dtype
    pointers = {"Q": variant.dtype, "K": stored, "V": stored, "Out": variant.dtype, "Partial": "i32"}
    optional = {
        "Lse": ("lse", "fp32"), "Range": ("range", "i32"), "Sinks": ("sinks", "fp32"), "KeyScale": ("fp8", "fp32"),
        "ValueScale": ("fp8", "fp32"),
    }  # fmt: skip
    pointers |= {name: dtype for name, (feature, dtype) in optional.items() if features.get(feature)}
    constants = {"C": config} | {name: None for name in optional if name not in pointers}
    signature, attributes = {}, {}
    for position, name in enumerate(flashcore_hopper_decode.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers:
            signature[name] = "*" + pointers[name]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.endswith("_scale") else "i32"
    code = GluonASTSource(fn=flashcore_hopper_decode, signature=signature, constexprs=constants, attrs=attributes)
    return code, config


def compile_variant(variant: Variant, **override) -> dict:
    """Compile one variant; `override` replaces fields of the config that a portable kernel gets from its table."""
    import triton
    from triton.backends.compiler import GPUTarget

    problem, plan = chosen_plan(variant)
    plan = plan._replace(config=plan.config._replace(**override))
    config = plan.config
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    counted = {}
    began = time.perf_counter()
    if variant.kernel == "flashcore_hopper":
        code = hopper_source(variant, problem, plan)
        counted = {"one_copy": config.row.one_copy}
    elif variant.kernel == "flashcore_hopper_decode":
        from flashcore_kernels.hopper.decode.launch import compiler_options

        code, constants = hopper_decode_source(variant, problem, plan)
        options |= compiler_options(constants)
        counted = {"resident": constants.resident}
    else:
        code = source(variant, config)
    compiled = triton.compile(code, target=GPUTarget("cuda", variant.arch, 32), options=options)
    seconds = time.perf_counter() - began
    report = (
        variant._asdict()
        | {
            "tile": [config.block_m, config.block_n, config.num_warps, config.num_stages],
            "triton": triton.__version__,
            "shared": compiled.metadata.shared,
            "shared_limit": SHARED_LIMIT[variant.arch],
            "seconds": round(seconds, 2),
        }
        | counted
    )
    return report | resources(compiled.asm["cubin"], variant.arch == 90)


def variants(arguments: argparse.Namespace) -> Iterator[Variant]:
    for kernel, arch, dtype, size, features in itertools.product(
        arguments.kernel, arguments.arch, arguments.dtype, arguments.head_dim, arguments.features
    ):
        head_dim, _, value_dim = size.partition("/")
        if kernel in DECODE and features.startswith("rows") or kernel == "flashcore_decode" and features == "fp8":
            continue
        if features == "fp8" and max(map(int, size.split("/"))) > 256:
            continue
        if kernel == "flashcore_hopper_decode" and "mask" in FEATURES[features] or arch < 89 and features == "fp8":
            continue
        for rows in arguments.rows if kernel in DECODE else (64,):
            for batch in arguments.batch:
                yield Variant(kernel, arch, dtype, int(head_dim), int(value_dim or head_dim), features, rows, batch)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="+", default=["flashcore_forward", "flashcore_decode"])
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 89, 90, 100])
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--head-dim", nargs="+", default=["64", "128", "256"], help="D, or D/Dv")
    parser.add_argument("--features", nargs="+", default=["none", "range-all", "mask-all"], choices=list(FEATURES))
    parser.add_argument("--rows", nargs="+", type=int, default=[16, 64], help="decode: query tokens x group")
    parser.add_argument("--batch", nargs="+", type=int, default=[2])
    parser.add_argument(
        "--tile", nargs=4, type=int, metavar=("M", "N", "WARPS", "STAGES"), help="portable: instead of the table"
    )
    return parser


def reports(command: list[str]) -> Iterator[dict]:
    """Compile what the command line asks for: a report of each variant, with its `problems`."""
    arguments = parser().parse_args(command)
    names = ("block_m", "block_n", "num_warps", "num_stages")
    override = dict(zip(names, arguments.tile)) if arguments.tile else {}
    for variant in variants(arguments):
        report = compile_variant(variant, **override)
        yield report | {"problems": problems(report)}


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
