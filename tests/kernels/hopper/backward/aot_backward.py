"""Compile the Hopper backward ahead of time, without a GPU, and report what ptxas made of it (see ../../aot.py).

    python -m tests.kernels.hopper.backward.aot_backward [plain] [range] [rows] [plain-dropout] ...

One JSON line for each compiled kernel, with its `problems`.
"""

import json
import re
import sys

from ...aot import SHARED_LIMIT
from ...machine_code import LATE_EXPONENTIALS, resources

# Loads of parked values in a main loop of 250 to 500 instructions, with head_dim up to 128 and above: there dq keeps
# 128 registers of sums, and with a key range parks addresses and bounds.
MAIN_LOOP_SPILLS = {False: 0, True: 5}
# The same where softcap meets a key range a query, in whose blocks of 32 queries tanh leaves dkdv one register too few.
CAPPED_ROWS_SPILLS = 1
# The same with dropout: two loads of parked addresses, where it has more of them in use at once.
DROPPED_SPILLS = 6
FEATURES = {
    "plain": {},
    "range": {"range_layout": "sequence"},
    "rows": {"range_layout": "rows"},
    "plain-dropout": {"dropout": 0.1},
    "range-dropout": {"range_layout": "sequence", "dropout": 0.1},
    "rows-dropout": {"range_layout": "rows", "dropout": 0.1},
}


def source(kernel, constants, dtype: str):
    """The GluonASTSource of `kernel` for aligned tensors of `dtype` "bf16" or "fp16"."""
    import torch
    from flashcore_kernels.hopper.descriptors import tile_layout
    from triton.experimental.gluon._runtime import GluonASTSource

    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    queries, keys = getattr(constants, "block_m", 64), getattr(constants, "block_n", 64)
    tiles = {
        "q": (queries, constants.d),
        "g": (queries, constants.dv),
        "k": (keys, constants.d),
        "v": (keys, constants.dv),
    }
    optional = {"Range": constants.range_layout > 0, "Spans": constants.range_layout == 2}
    pointers = {"Rows": "*fp32", "Range": "*i32", "Spans": "*i32", "Counter": "*i32"}
    signature, constexprs, attributes = {}, {"C": constants}, {}
    for position, name in enumerate(kernel.arg_names):
        if name == "C":
            signature[name] = "constexpr"
        elif name.endswith("_desc"):
            rows, columns = tiles[name[0]]
            signature[name] = f"tensordesc<{dtype}[1,1,{rows},{columns}],{tile_layout(rows, columns, torch_dtype)!r}>"
        elif not optional.get(name, True):
            signature[name], constexprs[name] = "constexpr", None
        elif name in pointers or name.startswith("Grad"):
            signature[name] = pointers.get(name, f"*{dtype}")
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in ("places", "of_delta"):
            signature[name] = "i32"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.endswith("_scale") else "i32"
    return GluonASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def problems(report: dict) -> list[str]:
    """What is wrong with a compiled kernel: an empty list is what tests want to see."""
    wrong = []
    main_loops, most = report["wgmma_loops"][:2], MAIN_LOOP_SPILLS[report["head_dim"] > 128]
    if report["capped_rows"] and report["head_dim"] == 128 and report["kernel"] == "flashcore_hopper_backward_dkdv":
        most = CAPPED_ROWS_SPILLS
    if report["dropout"]:
        most = max(most, DROPPED_SPILLS)
    if report["shared"] > SHARED_LIMIT[90]:
        wrong.append(f"{report['shared']} bytes of shared memory, {SHARED_LIMIT[90]} exist")
    if not main_loops or any(spills > most for _, spills, _ in main_loops):
        wrong.append(f"registers spill in the main loops: {main_loops}")
    if any(exponentials > LATE_EXPONENTIALS for _, _, exponentials in main_loops):
        wrong.append(f"the exponentials of the main loops wait for the products: {main_loops}")
    if report["wgmma_arrive"] > report["wgmma"] / 2:
        wrong.append(f"{report['wgmma_arrive']} warpgroup.arrive for {report['wgmma']} wgmma: they are serialised")
    return wrong


def compiled(kernel, constants, dtype: str = "bf16") -> dict:
    """What ptxas made of `kernel`, with its `problems`."""
    import triton
    from triton.backends.compiler import GPUTarget

    code = triton.compile(source(kernel, constants, dtype), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    report = {
        "kernel": kernel.__name__,
        "head_dim": constants.d,
        "capped_rows": constants.softcap and constants.range_layout == 2,
        "dropout": constants.dropout,
        "constants": repr(constants),
        "triton": triton.__version__,
    }
    report |= {"shared": code.metadata.shared} | resources(code.asm["cubin"], True)
    return report | {"problems": problems(report)}


def reports(features: str, rows) -> list[dict]:
    """Both kernels of each of `rows`, for calls of one of FEATURES' kinds."""
    import torch
    from flashcore_kernels.hopper.backward import launch
    from flashcore_kernels.problem import Problem

    found = []
    for row in rows:
        problem = Problem(
            batch_size=2, num_heads=32, num_kv_heads=8, num_queries=4096, num_keys=4096, head_dim=row.head_dim,
            value_dim=row.value_dim, dtype=torch.bfloat16, device_type="cuda", mask_kind=None, scale=1.0, left=-1,
            right=0, query_start=0, has_sinks=False, aligned=True, softcap=30.0 if row.softcap else 0.0,
            **{"range_layout": None, **FEATURES[features]},
        )  # fmt: skip
        for kernel, constants in (
            (launch.flashcore_hopper_backward_dq, launch.dq_constants(problem, row)),
            (launch.flashcore_hopper_backward_dkdv, launch.dkdv_constants(problem, row)),
        ):
            size = {"value_dim": row.value_dim, "softcap": row.softcap, "features": features}
            found.append(size | compiled(kernel, constants))
    return found


def loads_of_rows(value_dim: int) -> list[str]:
    """Loads from global memory in the PTX of `flashcore_hopper_backward_rows` in bf16, without a key range."""
    import triton
    from flashcore_kernels.hopper.backward.preprocess import flashcore_hopper_backward_rows as kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constexprs = {"GradLse": None, "Range": None, "Philox": None, "RANGE": 0, "SINKS": False}
    constexprs |= {"BLOCK_M": 64, "BLOCK_DV": value_dim, "PLACES": 32}
    pointers = {"Out": "*bf16", "GradOut": "*bf16", "Lse": "*fp32", "Rows": "*fp32"}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constexprs else pointers.get(name, "i32")
        if name in pointers or name in ("places", "of_delta", "value_dim"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    signature["lse_factor"] = signature["delta_factor"] = "fp32"
    code = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    ptx = triton.compile(code, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    return re.findall(r"\bld\.global\S*", ptx)


if __name__ == "__main__":
    from flashcore_kernels.hopper.backward.table import ROWS

    for features in sys.argv[1:] or FEATURES:
        for report in reports(features, ROWS):
            print(json.dumps(report), flush=True)
