"""Compile the Hopper backward ahead of time, without a GPU, and report what ptxas made of it; as `aot` does forward.

Run as a program, in a process without TRITON_INTERPRET: python -m tests.kernels.aot_backward [plain] [range]
"""

import json
import sys

from .aot import SHARED_LIMIT
from .machine_code import LATE_EXPONENTIALS, resources

# Loads of parked values in a main loop of 250 to 500 instructions.
MAIN_LOOP_SPILLS = 0


def source(kernel, config, dtype: str):
    """The GluonASTSource of `kernel` for aligned tensors of `dtype` "bf16" or "fp16"."""
    import torch
    from flashcore_kernels.hopper.run import tile_layout
    from triton.experimental.gluon._runtime import GluonASTSource

    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    queries, keys = getattr(config, "block_m", 64), getattr(config, "block_n", 64)
    tiles = {"q": (queries, config.d), "g": (queries, config.dv), "k": (keys, config.d), "v": (keys, config.dv)}
    pointers = {"Rows": "*fp32", "Range": "*i32", "Counter": "*i32"}
    signature, constants, attributes = {}, {"C": config}, {}
    for position, name in enumerate(kernel.arg_names):
        if name == "C":
            signature[name] = "constexpr"
        elif name.endswith("_desc"):
            rows, columns = tiles[name[0]]
            signature[name] = f"tensordesc<{dtype}[1,1,{rows},{columns}],{tile_layout(rows, columns, torch_dtype)!r}>"
        elif name == "Range" and not config.range_layout:
            signature[name], constants[name] = "constexpr", None
        elif name in pointers or name.startswith("Grad"):
            signature[name] = pointers.get(name, f"*{dtype}")
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in ("places", "of_delta"):
            signature[name] = "i32"
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name.endswith("_scale") else "i32"
    return GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def problems(report: dict) -> list[str]:
    """What is wrong with a compiled kernel: an empty list is what tests want to see."""
    wrong = []
    main_loops = report["wgmma_loops"][:2]
    if report["shared"] > SHARED_LIMIT[90]:
        wrong.append(f"{report['shared']} bytes of shared memory, {SHARED_LIMIT[90]} exist")
    if not main_loops or any(spills > MAIN_LOOP_SPILLS for _, spills, _ in main_loops):
        wrong.append(f"registers spill in the main loops: {main_loops}")
    if any(exponentials > LATE_EXPONENTIALS for _, _, exponentials in main_loops):
        wrong.append(f"the exponentials of the main loops wait for the products: {main_loops}")
    if report["wgmma_arrive"] > report["wgmma"] / 2:
        wrong.append(f"{report['wgmma_arrive']} warpgroup.arrive for {report['wgmma']} wgmma: they are serialised")
    return wrong


def compiled(kernel, config, dtype: str = "bf16") -> dict:
    """What ptxas made of `kernel`, with its `problems`."""
    import triton
    from triton.backends.compiler import GPUTarget

    code = triton.compile(source(kernel, config, dtype), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    report = {"kernel": kernel.__name__, "config": repr(config), "triton": triton.__version__}
    report |= {"shared": code.metadata.shared} | resources(code.asm["cubin"], True)
    return report | {"problems": problems(report)}


def reports(features: str, rows) -> list[dict]:
    """Both kernels of each of `rows`, for calls without ("plain") or with ("range") a key range."""
    from flashcore_kernels.hopper.backward.dkdv import DkdvConfig, flashcore_backward_dkdv
    from flashcore_kernels.hopper.backward.dq import DqConfig, flashcore_backward_dq

    found = []
    for number, row in enumerate(rows):
        common = {"d": row.head_dim, "dv": row.value_dim, "range_layout": int(features == "range")}
        common["softcap"] = row.softcap
        dq = DqConfig(query_block=row.dkdv.block_m, **row.dq._asdict(), **common)
        dkdv = DkdvConfig(**row.dkdv._asdict(), **common)
        for kernel, config in ((flashcore_backward_dq, dq), (flashcore_backward_dkdv, dkdv)):
            found.append({"row": number} | compiled(kernel, config))
    return found


if __name__ == "__main__":
    from flashcore_kernels.hopper.backward.table import ROWS

    for features in sys.argv[1:] or ("plain", "range"):
        for report in reports(features, ROWS):
            print(json.dumps(report), flush=True)
