"""pytest-benchmark suite over the recurrent cases, one test for each case and contender.

    pytest benchmarks/bench_rnn.py --quick
    pytest benchmarks/bench_rnn.py -k "grid-lstm-float32-B1 and T50" --benchmark-json out.json

The contenders of a case are sampled together, interleaved, when the first of its tests runs;
each test hands its own samples to pytest-benchmark. A contender whose outputs are wrong fails.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import allocator, cases, machine, measure
from benchmarks.cases import RnnCase
from benchmarks.measure import CaseResult, Entry
from benchmarks.peers import all_peers
from benchmarks.replay import ReplayTimer, nothing

QUICK = {("grid", 1, 50, 128), ("grid", 8, 20, 256), ("overhead", 1, 1, 16), ("fallback", 1, 1, 16)}
CONTENDERS = {
    "grid": ("torch", "onnxruntime", "openvino", "encdec_fast", "encdec_fast C++ call"),
    "overhead": ("torch", "onnxruntime", "openvino", "encdec_fast", "encdec_fast C++ call"),
    "lengths": (
        *("torch packed", "torch equal", "onnxruntime lengths", "openvino lengths"),
        *("encdec_fast lengths", "encdec_fast packed", "encdec_fast equal"),
    ),
    "training": ("torch", "encdec_fast"),
    "fallback": ("torch", "encdec_fast"),
}


replay = ReplayTimer()


class Runner:
    """Measures a case once and remembers the result for the case's other tests."""

    def __init__(self, budget_s: float, planned: list[RnnCase]) -> None:
        self.peers = all_peers()
        self.threads = torch.get_num_threads()
        self.ceilings = machine.Ceilings(self.threads)
        self.budget_s = budget_s
        self.cost = sum(measure.expected_cost(case) for case in planned)
        self.last: CaseResult | None = None

    def result(self, case: RnnCase) -> CaseResult:
        """The case's result; tests of one case follow each other, so one is enough to keep."""
        if self.last is None or self.last.case != case:
            share = self.budget_s * measure.expected_cost(case) / self.cost
            self.last = measure.measure(
                case, self.peers, self.threads, share, ceilings=self.ceilings
            )
        return self.last


def _budget(config: pytest.Config) -> float:
    given = config.getoption("--budget") or os.environ.get("BENCH_BUDGET_S")
    return float(given or (60.0 if config.getoption("--quick") else 900.0))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = [
        case
        for case in cases.RNN_CASES
        if not metafunc.config.getoption("--quick")
        or (case.suite, case.batch, case.time, case.hidden) in QUICK
    ]
    pairs = [(case, name) for case in wanted for name in CONTENDERS[case.suite]]
    ids = [f"{case.id}-{name.replace(' ', '_')}" for case, name in pairs]
    metafunc.parametrize(("case", "contender"), pairs, ids=ids)


@pytest.fixture(scope="module")
def runner(request: pytest.FixtureRequest) -> Runner:
    """One runner for the cases that this session selected."""
    if not allocator.is_set():
        settings = " ".join(f"{name}={value}" for name, value in allocator.ALLOCATOR.items())
        pytest.exit(f"start a benchmark with these in the environment: {settings}", returncode=4)
    planned = {
        item.callspec.params["case"] for item in request.session.items if hasattr(item, "callspec")
    }
    return Runner(_budget(request.config), list(planned))


def _entry(result: CaseResult, contender: str) -> Entry:
    entry = next((e for e in result.entries if e.name == contender), None)
    if entry is None:
        reasons = [e.note for e in result.entries if contender.startswith(e.peer) and e.note]
        pytest.skip(reasons[0] if reasons else f"{contender} is not offered")
    if entry.status == "absent":
        pytest.skip(entry.note)
    if entry.status in ("wrong", "failed"):
        pytest.fail(f"{entry.status}: {entry.note}", pytrace=False)
    return entry


@pytest.mark.benchmark(timer=replay, disable_gc=False, warmup=False)
def test_rnn(benchmark: BenchmarkFixture, runner: Runner, case: RnnCase, contender: str) -> None:
    result = runner.result(case)
    entry = _entry(result, contender)
    benchmark.group = case.id
    benchmark.extra_info.update(
        threads=runner.threads,
        torch=torch.__version__,
        gflops=cases.flops(case) / entry.seconds / 1e9 if entry.seconds else None,
        relative_error=entry.error,
    )
    if entry.role == "ours":
        benchmark.extra_info.update(
            over_best_peer=result.ratio(result.best_peer()),
            over_torch=result.ratio(result.seconds("torch")),
            share_of_ceiling=result.share,
        )
    replay.load(entry.samples)
    repeat: Any = benchmark.pedantic
    repeat(nothing, rounds=len(entry.samples))
