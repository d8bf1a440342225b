"""What is compiled in the background for a generation: the very kernels that it launches. No GPU is needed."""

import contextlib
import threading

import pytest
import torch
from flashcore_kernels import precompile
from flashcore_kernels.choose import choose
from flashcore_kernels.device import Device
from flashcore_kernels.dispatch import empty_outputs, serve
from flashcore_kernels.key_range import as_key_range, make_key_range, sequence_width
from flashcore_kernels.problem import Inputs, check_problem, with_alignment
from flashcore_kernels.runtime import launch

pytest.importorskip("triton")

H200 = Device("cuda", 90, triton=(3, 6))
GPU = torch.device("cuda", 0)


@pytest.fixture
def keys(monkeypatch):
    """The keys of compiled kernels that launches ask for; nothing is compiled or launched."""
    from flashcore_kernels.portable import key_range_kernel, kv_write_kernel

    pytest.importorskip("flashcore_kernels.hopper.decode.launch")
    asked = set()

    def only_ask(kernel, programs, arguments, scalars, constants, *, num_warps=4, num_stages=1, **options):
        asked.add(launch._key(kernel, arguments, constants, num_warps, num_stages))

    for module in (launch, key_range_kernel, kv_write_kernel):
        monkeypatch.setattr(module, "launch", only_ask)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU's device
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(precompile, "device_of", lambda device: H200)
    monkeypatch.setattr(precompile, "THREADS_MAY_PARSE", True)
    monkeypatch.setattr(precompile, "HEAD_START", 0.0)
    return asked


def prompt(sinks=None, softcap=None):
    query, key, value = (torch.randn(2, 100, heads, 64, dtype=torch.bfloat16).transpose(1, 2) for heads in (8, 2, 2))
    key_range = make_key_range(2, 100, right=0)
    return check_problem(Inputs(query, key, value, key_range, sinks=sinks), softcap=softcap)


def step(problem, sinks, fp8, capacity, softcap):
    """The launches of one layer of a step: of `FlashCoreLayer` in a graph, of the mask, of attention."""
    from flashcore_kernels.portable.key_range_kernel import run_key_range
    from flashcore_kernels.portable.kv_write_kernel import run_write

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
    key_range = as_key_range(words, capacity)
    inputs = Inputs(query, *buffers, key_range, None, sinks, *scales)
    asked = check_problem(inputs, softcap=softcap)
    output, _ = empty_outputs(query, new_value, False)
    serve(choose(with_alignment(asked, inputs), H200), asked, inputs, output, None)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("features", [{}, {"sinks": torch.zeros(8), "softcap": 30.0}])
def test_the_kernels_are_those_of_a_step(keys, fp8, features):
    problem, sinks = prompt(**features), features.get("sinks")
    step(problem, sinks, fp8, 1024, features.get("softcap"))
    asked = set(keys)
    assert len(asked) == 3
    keys.clear()
    precompile.begin_compiling(GPU)
    wait()
    assert len(keys) == 1 and keys < asked, "that of KeyRanges, which all models share"
    precompile.compile_step(precompile.step_after(problem, fp8), sinks, H200)
    assert keys == asked
    keys.clear()
    precompile.compile_step(precompile.step_after(problem, not fp8), sinks, H200)
    assert len(keys) == 3 and len(keys & asked) == 1, (
        "a cache of another dtype has other kernels, but that of KeyRanges"
    )


@pytest.mark.parametrize("shape", [(1, 2048, 32, 8), (3, 17, 4, 4), (2, 5000, 7, 1)])
@pytest.mark.parametrize("value_dim, softcap, sinks", [(128, None, None), (192, 30.0, torch.bfloat16)])
def test_the_prompts_kernel_is_told_by_a_layer(keys, shape, value_dim, softcap, sinks):
    batch_size, length, num_heads, num_kv_heads = shape
    sizes = ((num_heads, 192), (num_kv_heads, 192), (num_kv_heads, value_dim))
    query, key, value = (torch.zeros(batch_size, length, *size, dtype=torch.bfloat16).transpose(1, 2) for size in sizes)
    key_range = make_key_range(batch_size, length, right=0)
    logits = None if sinks is None else torch.zeros(num_heads, dtype=sinks)
    inputs = Inputs(query, key, value, key_range, sinks=logits)
    problem = check_problem(inputs, softcap=softcap)
    chosen = choose(with_alignment(problem, inputs), H200)
    assert chosen.kernel == "flashcore_hopper"
    serve(chosen, problem, inputs, empty_outputs(query, value, False)[0], None)
    asked = set(keys)
    keys.clear()
    prompt = precompile.Prompt(192, value_dim, torch.bfloat16, softcap is not None, sinks)
    precompile.begin_compiling(GPU, prompt)
    wait()
    assert keys == asked and len(keys) == 1
    for other in (
        prompt._replace(dtype=torch.float16), prompt._replace(softcap=not prompt.softcap),
        prompt._replace(head_dim=64, value_dim=64), prompt._replace(sinks=torch.float32),
    ):  # fmt: skip
        keys.clear()
        precompile.compile_first(other, H200)
        assert len(keys) == 1 and keys != asked, "another model's prompt has another kernel"


@pytest.mark.parametrize("prompt, kind", [
    (precompile.Prompt(128, 128, torch.float32, False, None), H200),
    (precompile.Prompt(128, 128, torch.bfloat16, False, None), Device("cuda", 80, triton=(3, 6))),
])  # fmt: skip
def test_kernels_of_more_than_that_wait_for_their_prompt(keys, monkeypatch, prompt, kind):
    precompile.compile_key_range()
    small = set(keys)
    keys.clear()
    precompile.compile_first(prompt, kind)
    assert keys == small, "Triton is started, and that is all"


@pytest.fixture
def begun(monkeypatch):
    """What was begun in the background."""
    calls = []
    monkeypatch.setattr(precompile, "THREADS_MAY_PARSE", True)
    monkeypatch.setattr(precompile, "device_of", lambda device: H200)
    monkeypatch.setattr(precompile, "_in_background", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(precompile, "_begun", set())
    return calls


def wait():
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(5)


def test_only_where_steps_follow(begun):
    problem = prompt()
    precompile.prompt_attends(problem, None, GPU, False)
    with precompile.steps_follow(fp8=True):
        for _ in range(3):
            precompile.prompt_attends(problem, None, GPU, False)
    precompile.prompt_attends(problem, None, GPU, False)
    step = precompile.step_after(problem, True)
    assert begun == [((GPU, precompile.compile_step, step, None, H200, precompile.HEAD_START), {})], "once a prompt"
    with precompile.steps_follow(fp8=True):
        precompile.prompt_attends(problem._replace(num_queries=31, num_keys=31, query_start=0), None, GPU, True)
    assert len(begun) == 1, "prompts of any length have the same steps"
    with precompile.steps_follow(fp8=False):
        precompile.prompt_attends(problem, None, GPU, True)
    assert begun[1][0][-1] == 0.0, "the prompt's own kernel is there: nothing to wait for"
    with precompile.steps_follow(fp8=True):
        precompile.prompt_attends(problem._replace(batch_size=3), None, GPU, True)
    assert len(begun) == 3


def test_what_is_not_compiled_ahead(begun, monkeypatch):
    pytest.importorskip("flashcore_kernels.hopper.decode.launch")  # which `begin` imports for a Hopper GPU

    def ask(layout="sequence"):
        precompile.begin_compiling(GPU)
        with precompile.steps_follow():
            precompile.prompt_attends(prompt()._replace(range_layout=layout), None, GPU, False)
        return len(begun)

    assert ask(layout=None) == 1, "a model with dense masks: Triton is started, and that is all"
    monkeypatch.setattr(precompile, "THREADS_MAY_PARSE", False)
    assert ask() == 1
    monkeypatch.setattr(precompile, "THREADS_MAY_PARSE", True)
    for kind in (Device("interpreter"), Device("torch"), Device("cuda", 90, triton=(3, 4))):
        monkeypatch.setattr(precompile, "device_of", lambda device, kind=kind: kind)
        assert ask() == 1
    monkeypatch.setattr(precompile, "device_of", lambda device: H200)
    assert ask() == 3


def test_a_failure_is_the_steps_own_to_report(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda error: pytest.fail(f"{error.exc_value} in the background"))
    reached = threading.Event()

    def fail():
        reached.set()
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    precompile._in_background(GPU, fail)
    wait()
    assert reached.is_set()


@pytest.mark.parametrize("failing", [False, True])
def test_a_servers_kernels(failing, monkeypatch):
    """In the background, first what is needed first; a call that fails ahead will say so itself."""
    monkeypatch.setattr(precompile, "device_of", lambda device: H200)
    monkeypatch.setattr(precompile, "THREADS_MAY_PARSE", True)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_specialization", lambda argument: argument.dtype)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    urgent, other, seen = Kernel(), Kernel(), []
    other.may_go_on.set()
    meta = torch.empty(4, dtype=torch.float16, device="meta")

    def call(*kernels):
        for kernel in kernels:
            launch.launch(kernel, 1, (meta,), (), ())
            seen.append(kernel)
        if failing:
            raise ValueError("no such call")

    told = precompile.Ahead(
        GPU, {"urgent": lambda: call(urgent)}, {"later": lambda: call(urgent, other), "none": lambda: None}
    )
    assert seen == [urgent, urgent, other] and not launch._compiled, "nothing is compiled by whoever tells"
    assert not told.ready("urgent") and not told.ready("later") and told.ready("none")
    assert other.compiled == 0, "it waits for what is urgent"
    urgent.may_go_on.set()
    told.wait()
    assert told.ready("urgent") and told.ready("later")
    assert urgent.compiled == other.compiled == 1 and not urgent.launched
    again = precompile.Ahead(GPU, {"urgent": lambda: call(urgent)}, {})
    assert again.ready("urgent")
    again.wait()
    assert urgent.compiled == 1


def test_a_server_where_nothing_is_compiled_ahead(monkeypatch):
    """Its batches wait for nothing, and no call is made."""
    monkeypatch.setattr(precompile, "device_of", lambda device: Device("interpreter"))
    told = precompile.Ahead(GPU, {"urgent": lambda: pytest.fail("a call")}, {})
    told.wait()
    assert told.ready("urgent")


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
    kernel = Kernel()
    meta = torch.empty(4, dtype=torch.float16, device="meta")
    thread = threading.Thread(target=launch.launch, args=(kernel, 1, (meta,), (), ()))
    thread.start()
    # A call that needs the kernel meanwhile waits for it.
    other = threading.Thread(target=launch.launch, args=(kernel, 1, (OnAGpu,), (), ()))
    other.start()
    other.join(0.1)
    assert other.is_alive() and not kernel.launched
    kernel.may_go_on.set()
    thread.join(5), other.join(5)
    launch.launch(kernel, 1, (OnAGpu,), (), ())
    assert kernel.compiled == 1 and kernel.launched == [(OnAGpu,), (OnAGpu,)]
