"""The benchmark suites of the ops: what is compared, what is refused, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import op_cases, op_suite
from benchmarks.command import main
from benchmarks.machine import Ceilings
from benchmarks.op_case import Contender, OpCase, Work

LINEAR = OpCase("linear", "float32", (3, 17, 19))
SMALL = [
    LINEAR,
    OpCase("linear", "bfloat16", (3, 17, 20)),
    OpCase("linear", "int8", (3, 17, 20)),
    OpCase("attention", "float32", (2, 2, 5, 7, 8)),
    OpCase("attention", "float32", (2, 2, 5, 7, 8), variant="padded"),
    OpCase("attention", "bfloat16", (2, 2, 5, 5, 8), variant="weights"),
    OpCase("additive_attention", "float32", (2, 3, 5, 16)),
    OpCase("additive_attention", "float32", (2, 3, 5, 16), training=True),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_every_contender_of_a_case_is_right(case: OpCase, native: None) -> None:
    work = op_cases.MAKERS[case.op](case)
    assert {"torch", "encdec_fast"} <= {contender.name for contender in work.contenders}
    for contender in work.contenders:
        found = contender.results(contender.call())
        _, problem = op_suite.workload.judge(found, work.right, case.dtype)
        assert problem is None, (contender.name, problem)


def test_a_wrong_contender_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.randn(4, 5)

    def make(case: OpCase) -> Work:
        answers = {"torch": right.float(), "encdec_fast": right.float() + 0.1}
        contenders = [
            Contender(name, lambda y=answer: y, lambda y: {"output": y})
            for name, answer in answers.items()
        ]
        return Work(contenders, {"output": right.double()})

    monkeypatch.setitem(op_cases.MAKERS, "linear", make)
    result = op_suite.measure(LINEAR, 0.05, Ceilings(1))
    assert set(result.samples) == {"torch"}
    assert "error" in result.problems["encdec_fast"]
    assert result.over("torch") is None


def result(case: OpCase, **seconds: float) -> op_suite.OpResult:
    names = {"torch": "torch", "ours": "encdec_fast", "kernel": "encdec_fast C++ call"}
    found = op_suite.OpResult(case, {names[name]: [s] * 3 for name, s in seconds.items()})
    found.peak, found.bandwidth = 5e11, 2e11
    return found


def test_bars() -> None:
    case = OpCase("linear", "float32", (1, 512, 512))
    slow = op_suite.outcomes([result(case, torch=20e-6, ours=18e-6, kernel=6e-6)])
    verdicts = {o["name"]: o["verdict"] for o in slow}
    assert verdicts["float32, over torch"] == "falls short"
    assert verdicts["M = 1, Python's part in µs"] == "falls short"
    assert verdicts["float32, M = 1, C++ call over reading"] == "reached"  # 6 of 1.5 x 5.2
    fast = op_suite.outcomes([result(case, torch=40e-6, ours=18e-6, kernel=11e-6)])
    verdicts = {o["name"]: o["verdict"] for o in fast}
    assert verdicts["float32, over torch"] == "reached"
    assert verdicts["M = 1, Python's part in µs"] == "reached"
    assert verdicts["float32, M = 1, C++ call over reading"] == "falls short"


def test_costs() -> None:
    assert OpCase("linear", "float32", (2, 3, 5)).flops == 60
    assert OpCase("linear", "bfloat16", (2, 3, 5)).weight_bytes == 30
    assert OpCase("attention", "float32", (1, 2, 3, 4, 5)).flops == 4 * 2 * 3 * 4 * 5


def test_command_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    native: None,
) -> None:
    monkeypatch.setitem(op_cases.SUITES, "linear", [LINEAR])
    monkeypatch.setattr(op_suite, "RESULTS", tmp_path)
    console = Console(width=160)
    assert main(["linear", "--list"], console) == 0
    assert LINEAR.id in capsys.readouterr().out
    assert main(["linear", "--dtype", "int8"], console) == 2
    assert main(["linear", "--budget", "0.1", "--save", "../x"], console) == 2
    assert main(["linear", "--budget", "0.1", "--save", "mine"], console) == 0
    saved: Any = json.loads((tmp_path / "mine.json").read_text())
    assert saved["cases"][0]["id"] == LINEAR.id
    assert saved["cases"][0]["seconds"]["encdec_fast"]["samples"] > 0
    assert "linear float32" in (tmp_path / "mine.md").read_text()
