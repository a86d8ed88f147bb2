"""Python threads, thread counts, fork, and calls from inside a parallel region."""

from __future__ import annotations

import copy
import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import KINDS, OURS, Case, assert_as_good, call, gradients, make_data, make_modules
from torch import Tensor, nn

from encdec_fast import ops, use_backend

LIMIT = 120.0  # seconds after which a test counts as hanging, on a machine that may pause it
CORES = len(os.sched_getaffinity(0))
THREADS = sorted({1, 2, 3, CORES, 2 * CORES, 4 * CORES})
FORMATS: dict[str, tuple[torch.dtype, Any]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16 weights": (torch.float32, torch.bfloat16),
    "int8 weights": (torch.float32, "int8"),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH_FORMAT = pytest.mark.parametrize("name", FORMATS)

pytestmark = pytest.mark.usefixtures("native")


def new_module(kind: str, I: int, H: int, name: str = "float32", **options: Any) -> Any:
    dtype, weight_dtype = FORMATS[name]
    extra = {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {}
    module = OURS[kind](I, H, **extra, **options).to(dtype)
    module.weight_dtype = weight_dtype
    return module


def tensors_of(results: Any) -> list[Tensor]:
    output, states = results
    return [output, *(states if isinstance(states, tuple) else (states,))]


def infer(module: Any, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(module(x))


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """The results of the jobs, each in a thread of its own, started together."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], Any]) -> Any:
        start.wait(LIMIT)
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        return [future.result(LIMIT) for future in futures]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for result, true in zip(found, expected, strict=True):
        assert torch.equal(result, true)


@EACH_FORMAT
@EACH_KIND
def test_two_threads_share_a_module(kind: str, name: str) -> None:
    """Both pack it, both run it; their results are the serial ones bit for bit."""
    torch.set_num_threads(2)
    for _ in range(3):
        module = new_module(kind, 24, 96, name, bidirectional=True)
        inputs = [torch.randn(t, b, 24).to(FORMATS[name][0]) for t, b in ((20, 3), (7, 17))]
        expected = [infer(module, x) for x in inputs]
        ops.repack(module)

        def job(x: Tensor, module: Any = module) -> list[list[Tensor]]:
            return [infer(module, x) for _ in range(10)]

        found = at_once(lambda: job(inputs[0]), lambda: job(inputs[1]))  # noqa: B023
        for results, true in zip(found, expected, strict=True):
            for result in results:
                assert_same(result, true)


@EACH_KIND
def test_two_threads_share_gradients(kind: str) -> None:
    torch.set_num_threads(2)
    module = new_module(kind, 8, 40, num_layers=2)
    inputs = [torch.randn(9, 4, 8), torch.randn(12, 21, 8)]

    def job(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))

    expected = [job(x) for x in inputs]
    for _ in range(5):
        found = at_once(lambda: job(inputs[0]), lambda: job(inputs[1]))
        for results, true in zip(found, expected, strict=True):
            assert_same(results, true)


def train(module: Any, x: Tensor, steps: int = 8) -> list[Tensor]:
    """The parameters after some steps."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        module(x)[0].square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in module.parameters()]


@EACH_KIND
def test_one_thread_trains_while_another_infers(kind: str) -> None:
    """Neither the trained parameters nor the results depend on who else is at work."""
    torch.set_num_threads(2)
    shared, student = new_module(kind, 16, 128), new_module(kind, 12, 48, bidirectional=True)
    twin = copy.deepcopy(student)
    x, y = torch.randn(10, 4, 16), torch.randn(11, 8, 12)
    expected, trained = infer(shared, x), train(twin, y)
    found, parameters = at_once(
        lambda: [infer(shared, x) for _ in range(30)], lambda: train(student, y)
    )
    assert_same(parameters, trained)
    for results in found:
        assert_same(results, expected)
    assert_same(infer(student, y), infer(twin, y))


COUNTED = {
    "one sequence": Case(T=6, B=1, I=64, H=200),
    "wide": Case(T=5, B=37, I=20, H=70, options={"bidirectional": True}),
    "ragged": Case(T=8, B=9, I=6, H=40, ragged="lengths", options={"num_layers": 2}),
}


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("case", COUNTED.values(), ids=COUNTED)
@EACH_KIND
def test_thread_counts(kind: str, case: Case, threads: int) -> None:
    """From one thread to four times the cores: the float64 result, and its gradients."""
    truth, theirs, ours = make_modules(kind, case, torch.float32)
    data = make_data(kind, case, torch.float32, grad=True)
    exact = data.to(torch.float64)
    with torch.no_grad():
        expected, torchs = call(truth, case, exact), call(theirs, case, data)
    seeds = [torch.randn(result.shape) for result in expected]
    of_truth = gradients(truth, case, exact, seeds)
    of_torch = gradients(theirs, case, data, seeds)
    torch.set_num_threads(threads)
    with use_backend("cpu"):
        with torch.no_grad():
            results = call(ours, case, data)
        found = gradients(ours, case, data, seeds)
    assert_as_good(results, torchs, expected, 2.0)
    assert_as_good(found, of_torch, of_truth, 3.0)


def test_two_threads_with_more_threads_than_cores() -> None:
    torch.set_num_threads(4 * CORES)
    module = new_module("gru", 32, 160)
    x = torch.randn(30, 2, 32)
    expected = infer(module, x)
    found = at_once(*[lambda: [infer(module, x) for _ in range(5)]] * 2)
    for results in (*found[0], *found[1]):
        assert_same(results, expected)


CHANGES: dict[str, Callable[[nn.Parameter, Tensor], Any]] = {
    "copy_": lambda parameter, value: parameter.copy_(value),
    "data.copy_": lambda parameter, value: parameter.data.copy_(value),
    "data =": lambda parameter, value: setattr(parameter, "data", value),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["float32", "int8 weights"])
def test_weights_change_while_another_thread_packs_them(change: str, name: str) -> None:
    """Once the change is done, no call gives the result of the weights before it."""
    module = new_module("lstm", 400, 400, name)
    x = torch.randn(2, 1, 400)
    parameter = module.weight_hh_l0

    def pack_again() -> float:
        start = time.perf_counter()
        ops.repack(module)
        infer(module, x)
        return time.perf_counter() - start

    duration = min(pack_again() for _ in range(5))
    held = []  # memory that `data =` would free under the other thread, in torch's kernels too
    for turn in range(60):
        held.append(parameter.data)
        value = torch.randn_like(parameter) * 0.05

        def write(delay: float = turn / 60 * duration, value: Tensor = value) -> None:
            time.sleep(delay)  # the turns sweep over the time that packing takes
            with torch.no_grad():
                CHANGES[change](parameter, value)

        at_once(write, pack_again)
        assert torch.equal(parameter, value)
        assert_same(infer(module, x), infer(copy.deepcopy(module), x))


def run_script(script: str, kind: str = "LSTM", dtype: str = "float32", weights: str = "") -> str:
    """What a script prints, run by a Python of its own; fails if it fails or hangs."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT_HEAD + script, kind, dtype, weights],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# The parent has used its pool of threads for inference. `work` gives results of inference and, for
# the plain formats, gradients; `agrees` compares them to the parent's, which more threads made.
SCRIPT_HEAD = """
import multiprocessing, os, signal, sys, threading
import torch
import encdec_fast
from encdec_fast.ops import _packing

kind, dtype, weight_dtype = sys.argv[1:]
torch.manual_seed(0)
torch.set_num_threads(2)
module = getattr(encdec_fast.nn, kind)(32, 64, bidirectional=True).to(getattr(torch, dtype))
module.weight_dtype = weight_dtype or None
x = torch.randn(20, 8, 32).to(getattr(torch, dtype))
with torch.no_grad():
    expected = module(x)[0]

def agrees(found):
    return bool((found.float() - expected.float()).abs().max() < 0.02)

def work():
    with torch.no_grad():
        good = agrees(module(x)[0])
        fresh = type(module)(32, 64, bidirectional=True).to(x.dtype)  # nobody has packed it yet
        fresh.load_state_dict(module.state_dict())
        good = good and agrees(fresh(x)[0])
    if not weight_dtype:
        output = fresh(x)[0]
        grads = torch.autograd.grad(output.float().sum(), list(fresh.parameters()))
        good = good and agrees(output) and all(g.isfinite().all() for g in grads)
    return good

def wait_for(pid):
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print("child", status)

def child(function):
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(100)  # a child that hangs ends, and so fails the test, before the script does
    code = 1
    try:
        code = 0 if function() else 2
    finally:
        os._exit(code)
"""

AFTER_USE = """
def more():
    good = work()
    for threads in (1, 2, 4 * len(os.sched_getaffinity(0))):
        torch.set_num_threads(threads)
        good = good and work()
    return good and more_children()

def more_children():  # and a child of the child
    status = os.waitpid(child(work), 0)[1]
    return status == 0

wait_for(child(more))
print("parent", work())
"""

OTHER_THREADS = """
def fork_in_thread(found):
    found.append(child(work))

stop = threading.Event()
def busy():
    while not stop.is_set():
        encdec_fast.ops.repack(module)
        with torch.no_grad():
            module(x)

threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()
try:
    for _ in range(10):
        wait_for(child(work))
    found = []
    forking = threading.Thread(target=fork_in_thread, args=(found,))
    forking.start()
    forking.join()
    wait_for(found[0])
finally:
    stop.set()
    for thread in threads:
        thread.join()
with _packing._packing.current:  # as if another thread were packing at this moment
    pid = child(work)
wait_for(pid)
"""

WORKERS = """
context = multiprocessing.get_context("fork")

def task(seed):
    torch.set_num_threads(1 + seed)
    return work()

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        with torch.no_grad():
            return module(x)[0]

with context.Pool(2) as pool:
    print("pool", all(pool.map(task, range(6))))
loader = torch.utils.data.DataLoader(Items(), num_workers=2, multiprocessing_context=context)
print("loader", all(agrees(batch[0]) for batch in loader))
"""


@pytest.mark.parametrize(
    ("kind", "name"), [("LSTM", "float32"), ("GRU", "bfloat16"), ("RNN", "int8 weights")]
)
def test_fork_after_use(kind: str, name: str) -> None:
    """The child runs what the parent has run, with any number of threads, and never hangs."""
    dtype, weight_dtype = FORMATS[name]
    printed = run_script(AFTER_USE, kind, str(dtype).removeprefix("torch."), weight_dtype or "")
    assert printed.split("\n")[:2] == ["child 0", "parent True"]


def test_fork_while_other_threads_run() -> None:
    assert run_script(OTHER_THREADS).split("\n")[:-1] == ["child 0"] * 12


def test_workers_that_were_forked() -> None:
    assert run_script(WORKERS).split("\n")[:-1] == ["pool True", "loader True"]


def openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime of this process, as the kernels and torch use it."""
    with open("/proc/self/maps") as maps:
        paths = {line.split()[-1] for line in maps if "libgomp" in line}
    return ctypes.CDLL(paths.pop()) if len(paths) == 1 else None


@EACH_FORMAT
@EACH_KIND
def test_call_inside_a_parallel_region(kind: str, name: str) -> None:
    """Every member of somebody else's team calls the module, which then runs single-threaded."""
    library = openmp()
    if library is None:
        pytest.skip("not exactly one libgomp is loaded")
    torch.set_num_threads(2)
    module = new_module(kind, 24, 96, name)
    x = torch.randn(6, 5, 24).to(FORMATS[name][0])
    expected = infer(module, x)
    found: list[list[Tensor]] = []
    troubles: list[BaseException] = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_: Any) -> None:
        try:
            for _turn in range(3):
                found.append(infer(module, x))
            ops.repack(module)
            found.append(infer(module, x))
        except BaseException as trouble:
            troubles.append(trouble)

    library.GOMP_parallel(body, None, 3, 0)
    assert not troubles
    assert len(found) == 3 * 4
    for results in found:
        for result, true in zip(results, expected, strict=True):
            bound = 1e-5 if FORMATS[name][0] == torch.float32 else 1e-2
            torch.testing.assert_close(result, true, rtol=bound, atol=bound)
