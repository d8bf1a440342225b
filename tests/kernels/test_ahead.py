"""What is compiled in the background for a generation's steps: the very kernels that they launch. No GPU is needed."""

import contextlib
import threading

import pytest
import torch
from flashcore_kernels import ahead, launch, op
from flashcore_kernels.key_range import make_key_range, sequence_width
from flashcore_kernels.plan import Device, Plan, plan
from flashcore_kernels.problem import check_problem, with_alignment

pytest.importorskip("triton")

H200 = Device("cuda", 90, triton=(3, 6))
GPU = torch.device("cuda", 0)


@pytest.fixture
def keys(monkeypatch):
    """The keys of compiled kernels that launches ask for; nothing is compiled or launched."""
    from flashcore_kernels import decode, key_range_kernel, kv_write_kernel

    pytest.importorskip("flashcore_kernels.hopper.decode_run")
    asked = set()

    def only_ask(kernel, programs, arguments, scalars, constants, plan, **options):
        asked.add(launch._key(kernel, arguments, constants, plan))

    for module in (decode, key_range_kernel, kv_write_kernel):
        monkeypatch.setattr(module, "launch", only_ask)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU's device
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(op, "device_of", lambda device: H200)
    monkeypatch.setattr(ahead, "THREADS_MAY_PARSE", True)
    monkeypatch.setattr(ahead, "HEAD_START", 0.0)
    return asked


def prompt(sinks=None, softcap=None):
    query, key, value = (torch.randn(2, 100, heads, 64, dtype=torch.bfloat16).transpose(1, 2) for heads in (8, 2, 2))
    key_range = make_key_range(2, 100, right=0)
    return check_problem(query, key, value, key_range, softcap=softcap, sinks=sinks)


def step(problem, sinks, fp8, capacity, softcap):
    """The launches of one layer of a step: of `FlashCoreLayer` in a graph, of the mask, of attention."""
    from flashcore_kernels.key_range_kernel import run_key_range
    from flashcore_kernels.kv_write_kernel import run_write

    stored = torch.float8_e4m3fn if fp8 else torch.bfloat16
    buffers = torch.zeros(2, 2, 2, capacity, problem.head_dim, dtype=torch.bfloat16).to(stored)
    query, new_key, new_value = (
        torch.randn(2, 1, heads * problem.head_dim, dtype=torch.bfloat16).view(2, 1, heads, -1).transpose(1, 2)
        for heads in (8, 2, 2)
    )
    query, new_key = query * 1.0, new_key * 1.0  # rotated
    scales = (torch.ones(2, 2), torch.ones(2, 2)) if fp8 else (None, None)
    run_write(*buffers, new_key, new_value, torch.zeros((), dtype=torch.int64)[None], 0, *scales)
    words = torch.empty(2, sequence_width(capacity), dtype=torch.int32)
    mask = torch.ones(2, capacity + 9, dtype=torch.bool)[:, :capacity]
    run_key_range(words, mask, torch.zeros((), dtype=torch.int64) - 0, -1, 0, 6)
    key_range = words[:, None, None]
    scales = scales if fp8 else ()
    asked = check_problem(query, *buffers, key_range, None, False, None, None, softcap, sinks, *scales)
    chosen = plan(with_alignment(asked, query, *buffers), H200)
    output, _ = op._empty_outputs(query, new_value, False)
    op._launch(chosen, asked, query, *buffers, key_range, None, sinks, output, None, *scales)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("features", [{}, {"sinks": torch.zeros(8), "softcap": 30.0}])
def test_the_kernels_are_those_of_a_step(keys, fp8, features):
    problem, sinks = prompt(**features), features.get("sinks")
    step(problem, sinks, fp8, 1024, features.get("softcap"))
    asked = set(keys)
    assert len(asked) == 3
    keys.clear()
    ahead.begin(GPU)
    wait()
    assert len(keys) == 1 and keys < asked, "that of KeyRanges, which all models share"
    ahead.compile_steps(problem, sinks, H200, fp8)
    assert keys == asked
    keys.clear()
    ahead.compile_steps(problem, sinks, H200, not fp8)
    assert len(keys) == 2 and not keys & asked, "a cache of another dtype has other kernels"


@pytest.fixture
def begun(monkeypatch):
    """What was begun in the background."""
    calls = []
    monkeypatch.setattr(ahead, "THREADS_MAY_PARSE", True)
    monkeypatch.setattr(op, "device_of", lambda device: H200)
    monkeypatch.setattr(ahead, "_in_background", lambda *args, **kwargs: calls.append((args, kwargs)))
    return calls


def wait():
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(5)


def test_only_where_steps_follow(begun):
    problem = prompt()
    ahead.prompt_compiles(problem, None, GPU)
    with ahead.steps_follow(fp8=True):
        for _ in range(3):
            ahead.prompt_compiles(problem, None, GPU)
    ahead.prompt_compiles(problem, None, GPU)
    assert begun == [((GPU, ahead.compile_steps, problem, None, H200), {"fp8": True})], "once a prompt"


def test_what_is_not_compiled_ahead(begun, monkeypatch):
    def ask(layout="sequence"):
        ahead.begin(GPU)
        with ahead.steps_follow():
            ahead.prompt_compiles(prompt()._replace(range_layout=layout), None, GPU)
        return len(begun)

    assert ask(layout=None) == 1, "a model with dense masks: Triton is started, and that is all"
    monkeypatch.setattr(ahead, "THREADS_MAY_PARSE", False)
    assert ask() == 1
    monkeypatch.setattr(ahead, "THREADS_MAY_PARSE", True)
    for kind in (Device("interpreter"), Device("torch"), Device("cuda", 90, triton=(3, 4))):
        monkeypatch.setattr(op, "device_of", lambda device, kind=kind: kind)
        assert ask() == 1
    monkeypatch.setattr(op, "device_of", lambda device: H200)
    assert ask() == 3


def test_a_failure_is_the_steps_own_to_report(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda error: pytest.fail(f"{error.exc_value} in the background"))
    reached = threading.Event()

    def fail():
        reached.set()
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    ahead._in_background(GPU, fail)
    wait()
    assert reached.is_set()


class Kernel:
    """A jitted function that counts how often it is compiled, and what is launched."""

    def __init__(self):
        self.compiled, self.launched, self.may_go_on = 0, [], threading.Event()

    def warmup(self, *arguments, grid, num_warps, num_stages):
        self.may_go_on.wait(5)
        self.compiled += 1
        return Compiled(self)

    def __getitem__(self, grid):
        def call(*arguments, num_warps, num_stages):
            self.compiled += 1
            self.launched.append(arguments)
            return Compiled(self)

        return call


class Compiled:
    run = "loaded"

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append(arguments)


class OnAGpu:
    """Of a tensor, what `launch` looks at."""

    dtype, device = torch.float16, torch.device("cuda", 0)

    @staticmethod
    def data_ptr():
        return 32


def test_meta_tensors_compile_and_launch_nothing(monkeypatch):
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_specialization", lambda argument: argument.dtype)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    kernel, chosen = Kernel(), Plan("a kernel", "")
    meta = torch.empty(4, dtype=torch.float16, device="meta")
    thread = threading.Thread(target=launch.launch, args=(kernel, 1, (meta,), (), (), chosen))
    thread.start()
    # A call that needs the kernel meanwhile waits for it.
    other = threading.Thread(target=launch.launch, args=(kernel, 1, (OnAGpu,), (), (), chosen))
    other.start()
    other.join(0.1)
    assert other.is_alive() and not kernel.launched
    kernel.may_go_on.set()
    thread.join(5), other.join(5)
    launch.launch(kernel, 1, (OnAGpu,), (), (), chosen)
    assert kernel.compiled == 1 and kernel.launched == [(OnAGpu,), (OnAGpu,)]
