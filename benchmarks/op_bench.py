"""A suite of ops under pytest-benchmark: one test for each case and contender.

The contenders of a case are sampled together, interleaved, when the first of its tests runs; each
test hands its own samples to pytest-benchmark. A contender whose results are wrong fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import allocator, op_suite
from benchmarks.machine import Ceilings
from benchmarks.op_case import OpCase
from benchmarks.op_cases import SUITES
from benchmarks.replay import ReplayTimer, nothing

CONTENDERS = {
    "additive_attention": ("torch", "torch.compile", "encdec_fast"),
    "attention": ("torch", "encdec_fast"),
    "linear": ("torch", "encdec_fast", "encdec_fast C++ call"),
    "transformer_encoder": ("torch", "encdec_fast"),
    "attention_decoder": ("torch", "encdec_fast"),
    "gated_bridge": ("torch", "encdec_fast"),
    "recurrent_translation": ("torch", "encdec_fast"),
    "pronunciation": ("torch", "encdec_fast"),
    "translation": ("transformers", "CTranslate2 float32", "CTranslate2 int8", "encdec_fast"),
}


def make_test(suite: str) -> Callable[..., None]:
    """The test function of a suite."""
    pairs = [
        (case, name)
        for case in SUITES[suite]
        for name in CONTENDERS[case.op]
        if not (case.training and name.endswith("C++ call"))
    ]
    ids = [f"{case.id}-{name.replace(' ', '_')}" for case, name in pairs]
    replay, known = ReplayTimer(), dict[OpCase, op_suite.OpResult]()

    @pytest.mark.benchmark(timer=replay, disable_gc=False, warmup=False)
    @pytest.mark.parametrize(("case", "contender"), pairs, ids=ids)
    def test(
        benchmark: BenchmarkFixture, request: pytest.FixtureRequest, case: OpCase, contender: str
    ) -> None:
        if not allocator.is_set():
            settings = " ".join(f"{name}={value}" for name, value in allocator.ALLOCATOR.items())
            pytest.exit(f"start a benchmark with these in the environment: {settings}", 4)
        if case not in known:
            budget = float(request.config.getoption("--budget") or 120.0) / len(SUITES[suite])
            known[case] = op_suite.measure(case, budget, Ceilings(torch.get_num_threads()))
        result = known[case]
        if contender in result.problems:
            pytest.fail(f"wrong: {result.problems[contender]}", pytrace=False)
        samples = result.samples[contender]
        benchmark.group = case.id
        benchmark.extra_info.update(torch=torch.__version__, over_torch=result.over("torch"))
        replay.load(samples)
        repeat: Any = benchmark.pedantic
        repeat(nothing, rounds=len(samples))

    return test
