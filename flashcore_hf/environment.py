"""`python -m flashcore_hf env`: what a bug report needs, and one kernel held against the definition.

The report must always print: this module imports the standard library alone, each probe is guarded, and what may crash
the process (a driver, a kernel) runs in another one.
"""

import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "kernels")
# The first versions of Transformers with an attention interface that a backend can join, with a registry of attention
# functions, and with models that the helper for older versions knows.
INTERFACE_SINCE, REGISTRY_SINCE, HELPER_SINCE = (4, 53), (4, 48), (4, 40)
CHECK_SECONDS = 300


def main() -> int:
    """Print the report, then check a kernel. Returns the exit status: 0 where the check passes."""
    print("Copy and paste the text below into your report.\n")
    for name, value in collect().items():
        print(f"- {name}: {value}")
    passed, text = kernel_check()
    print(f"- kernel check: {text}")
    print("\nSUCCESS: the kernels work here." if passed else "\nFAILED: see the kernel check above.")
    return 0 if passed else 1


def collect() -> dict[str, str]:
    """All facts of the report, name -> text. A probe that fails gives its reason as the text."""
    facts = {
        "flashcore-hf": _probe(_our_version),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
    }
    for name in PACKAGES:
        facts[name] = _probe(lambda name=name: version(name))
    facts["GPU"] = _probe(_gpu)
    facts["driver"] = _probe(_driver)
    facts["CUDA of torch"] = _probe(lambda: str(_import("torch").version.cuda))
    facts["way in"] = _probe(_way_in)
    facts["flashcore_hf"] = _probe(_enabled)
    facts.update(_status())
    names = sorted(name for name in os.environ if name.startswith(("FLASHCORE_", "TRITON_")))
    facts["variables"] = ", ".join(f"{name}={os.environ[name]}" for name in names) or "none set"
    return facts


def gpu_present() -> bool:
    """Whether PyTorch sees an NVIDIA GPU; False too where PyTorch cannot be imported."""
    try:
        torch = _import("torch")
        return torch.cuda.is_available() and not torch.version.hip
    except Exception:
        return False


def triton_present() -> bool:
    """Whether Triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def kernel_check() -> tuple[bool, str]:
    """Run `check_kernels` in a process of its own, in Triton's interpreter where there is no GPU.

    Returns:
        whether the kernels ran and were right, and a text that says how it went.
    """
    device = "cuda" if gpu_present() else "cpu"
    environment = dict(os.environ)
    if device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    else:
        environment.pop("TRITON_INTERPRET", None)
    # The folders that this process imports from: an installation is not the only way to be found.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    code = f"from flashcore_hf.environment import check_kernels; check_kernels({device!r})"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=CHECK_SECONDS
        )
    except subprocess.TimeoutExpired:
        return False, f"did not end within {CHECK_SECONDS} s"
    except OSError as error:
        return False, f"could not be started ({error})"
    try:
        results = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        tail = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return False, f"broke off: {tail[0]}"
    where = "on the GPU" if device == "cuda" else "in Triton's interpreter, on the CPU"
    lines = [
        f"{result['kernel']} {'right' if result['right'] else 'WRONG'}, error {result['error']:.1e} of at most "
        f"{result['tolerance']:.0e}"
        + ("" if result["kernel"].startswith("flashcore_") else f" (no kernel: {result['reason']})")
        for result in results
    ]
    passed = all(result["right"] and result["kernel"].startswith("flashcore_") for result in results)
    return passed, f"{'; '.join(lines)} ({where})"


def check_kernels(device: str) -> None:
    """Hold a prefill and a decode step with left padding against `naive`; print the results as one line of JSON.

    Args:
        device: "cpu" or "cuda".
    """
    torch = _import("torch")
    library = _import("flashcore_kernels")
    tolerance = 1e-5
    results = []
    for num_queries in (33, 1):
        generator = torch.Generator().manual_seed(num_queries)
        query = torch.randn(2, 4, num_queries, 32, generator=generator).to(device)  # [B, H, Q, D]
        key, value = (torch.randn(2, 2, 33, 32, generator=generator).to(device) for _ in range(2))  # [B, Hkv, K, D]
        first = torch.tensor([0, 5], device=device)
        key_range = library.make_key_range(2, 33, first=first, query_start=33 - num_queries, right=0)
        library.path_counts.clear()
        output = library.attention(query, key, value, key_range=key_range)
        expected, _ = library.naive_attention(query.double(), key.double(), value.double(), key_range=key_range)
        error = (output.double() - expected).abs().max().item()
        reason = library.explain(query, key, value, key_range=key_range)
        results.append(
            {
                "kernel": next(iter(library.path_counts)),
                "error": error,
                "tolerance": tolerance,
                "right": error <= tolerance,  # False for NaN
                "reason": str(reason),
            }
        )
    print(json.dumps(results))


def _probe(ask: Callable[[], str]) -> str:
    try:
        return str(ask())
    except PackageNotFoundError:
        return "not installed"
    except Exception as error:
        return f"not known ({type(error).__name__}: {error})"


def _import(name: str):
    return importlib.import_module(name)


def _our_version() -> str:
    import flashcore_hf

    return f"{flashcore_hf.__version__} ({os.path.dirname(flashcore_hf.__file__)})"


def _gpu() -> str:
    torch = _import("torch")
    if not torch.cuda.is_available():
        return "none that PyTorch can use"
    described = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        described.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return ", ".join(described)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return "none (no nvidia-smi)"
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else done.stderr.strip()


def _way_in() -> str:
    found = version("transformers")
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if numbers >= INTERFACE_SINCE:
        return 'attention interface: from_pretrained(..., attn_implementation="flashcore")'
    if numbers >= HELPER_SINCE:
        through = "the registry of attention functions" if numbers >= REGISTRY_SINCE else "the attention classes"
        return (
            "helper for older versions: flashcore_hf.replace_attention_with_flashcore(model), through "
            f"{through} of LLaMA, Mistral and Qwen2"
        )
    return f"none for transformers {found}: {'.'.join(map(str, HELPER_SINCE))} is the oldest that works"


def _enabled() -> str:
    import flashcore_hf

    return "imported" if flashcore_hf.import_error is None else f"NOT ENABLED: {flashcore_hf.import_error}"


def _status() -> dict[str, str]:
    """What `enable()` registered and patched, or why that cannot be said."""
    try:
        return dict(_import("flashcore_hf.backend").status())
    except Exception as error:
        return {"registered": f"not known ({type(error).__name__}: {error})"}
