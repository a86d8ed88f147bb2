"""The command for a machine with a GPU, as far as the interpreter can run it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_cases, gpu_check, gpu_generation, gpu_recurrence
from benchmarks.gpu_cases import GpuCase
from encdec_fast.backends import library
from encdec_fast.ops import _recurrent_cuda, _triton


@pytest.fixture
def check(interpreter: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The command on the CPU; it writes into a directory of the test's."""
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    def run(*arguments: str) -> int:
        try:
            return gpu_check.main(["--device", "cpu", *arguments])
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags

    return run


def small(run: Callable[..., Any], *shapes: tuple[int, ...], **fields: Any) -> GpuCase:
    return GpuCase("additive_attention", "small", shapes, run, **fields)


def test_parity(check: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert check("--op", "gated_bridge", "cross_entropy") == 0
    shown = capfd.readouterr()
    assert shown.err.count(": right") == 9  # a bridge and two losses, in three dtypes
    assert "WRONG" not in shown.err and "Parity" in shown.out


def test_what_is_wrong_is_found(
    check: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    kernels = _triton.kernels("gated_bridge")
    forward = kernels.forward

    def wrong(*arguments: Any) -> list[Tensor]:
        result, *others = forward(*arguments)
        return [result * 1.05, *others]

    monkeypatch.setattr(kernels, "forward", wrong)
    assert check("--op", "gated_bridge", "cross_entropy", "--save", "found") == 1
    assert capfd.readouterr().err.count("WRONG") == 3
    found = json.loads((tmp_path / "found.json").read_text())
    assert [line["right"] for line in found["lines"]] == [False] * 3 + [True] * 6
    assert "interpreter" in found["gpu"] and "gated_bridge" in (tmp_path / "found.md").read_text()


def test_a_broken_kernel_hides_no_other(
    check: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(_triton.kernels("gated_bridge"), "forward", broken)
    assert check("--op", "gated_bridge", "cross_entropy") == 1
    shown = capfd.readouterr().err
    assert shown.count("no such instruction") == 3 and shown.count(": right") == 6


def test_speed(check: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Who agrees is timed and held to the bars; who does not, or cannot, is left out."""

    def refuses(x: Tensor, y: Tensor) -> Tensor:
        raise RuntimeError("no kernel found")

    def run(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    peers = {"torch": lambda x, y: y * x, "wrong": lambda x, y: x + y, "absent": refuses}
    bars = (("torch", 0.01), ("copy", 1e-9))
    case = small(run, (40, 30), (40, 30), peers=peers, bars=bars, numbers_moved=1)
    monkeypatch.setattr(gpu_check, "speed_cases", lambda: [case])
    assert check("--part", "speed", "--save", "speed") == 0
    lines = json.loads((tmp_path / "speed.json").read_text())["lines"]
    assert [line["dtype"] for line in lines] == ["float32", "bfloat16"]
    for line in lines:
        assert set(line["seconds"]) == {"encdec_fast", "torch"}
        assert all(seconds > 0 for seconds in line["seconds"].values())
        assert set(line["bars"]) == {"over torch", "of the bandwidth of a copy"}


@pytest.mark.parametrize("others", [False, True])
def test_a_bar_of_what_is_left(
    others: bool, check: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Over the slow path twice the speed is asked where no fast one takes the call."""

    def refuses(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel found")

    peers = {"SDPA math": lambda x: x * 2, "SDPA flash": (lambda x: x + x) if others else refuses}
    bars = (("SDPA", 0.9), ("SDPA math alone", 2.0))
    case = small(lambda x: x * 2, (40, 30), peers=peers, bars=bars)
    monkeypatch.setattr(gpu_check, "speed_cases", lambda: [case])
    check("--part", "speed", "--save", "alone")
    for line in json.loads((tmp_path / "alone.json").read_text())["lines"]:
        assert ("over SDPA math" in line["bars"]) != others
        assert line["bars"]["over SDPA"][0] == 0.9


def test_nothing_is_timed_that_is_wrong(
    check: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def run(x: Tensor) -> Tensor:  # another result on every call
        asked.append("")
        return x * len(asked)

    monkeypatch.setattr(gpu_check, "speed_cases", lambda: [small(run, (4, 5))])
    assert check("--part", "speed", "--save", "wrong") == 1
    lines = json.loads((tmp_path / "wrong.json").read_text())["lines"]
    assert all("off by" in line["problem"] and not line["seconds"] for line in lines)


def test_time_that_is_over_is_said(
    check: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert check("--op", "cross_entropy", "--budget", "0") == 1
    assert capfd.readouterr().err.count("no time was left for it") == 6


def test_generation(
    check: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    native: None,
) -> None:
    """A search on the kernels finds what the CPU's finds; where they are wrong, it is said."""
    cases = list(gpu_generation.parity_cases())
    in_one = sum(case.backend == "cuda" for case in cases)
    assert in_one == (0 if library.cuda_reasons("cpu", True) else 6)
    assert len({case.name for case in cases}) == len(cases) == 11 + in_one
    monkeypatch.setattr(gpu_generation, "parity_cases", lambda: cases[2:4])
    assert check("--part", "generation") == 0
    assert capfd.readouterr().err.count(": right") == 2
    kernels = _triton.kernels("log_softmax_topk")
    forward = kernels.forward

    def wrong(*arguments: Any) -> list[Tensor]:
        values, *others = forward(*arguments)
        return [values * 1.05, *others]

    monkeypatch.setattr(kernels, "forward", wrong)
    assert check("--part", "generation") == 1
    assert capfd.readouterr().err.count("WRONG") == 2
    assert check("--part", "generation", "--budget", "0") == 1
    assert capfd.readouterr().err.count("no time was left for it") == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--op", "lstms"], "no such op: lstms"),
        (["--save", "a/b"], "--save"),
        (["--part", "speeds"], "invalid choice"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    says: str,
    check: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        check(*arguments)
    assert stopped.value.code == 2
    assert says in capfd.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main([])
    assert stopped.value.code == 2
    assert "there is no GPU here" in capfd.readouterr().err


def test_recurrences(
    check: Callable[..., int],
    cuda_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The CUDA kernels in each form; a planner without clusters has none."""
    assert check("--part", "parity", "--backend", "cuda") == 0
    shown = capfd.readouterr().err
    assert shown.count(": right") == 2 * 2 * 4 * 3 and "WRONG" not in shown
    limits = _recurrent_cuda.limits(-1)
    assert max(limits.clusters) > 0
    with gpu_recurrence.without_clusters():
        assert _recurrent_cuda.limits(-1) == limits._replace(clusters=())
    monkeypatch.setattr(_recurrent_cuda, "_whole_quads", lambda weight: weight.flip(2))
    assert check("--part", "parity", "--backend", "cuda", "--op", "gru") == 1
    assert "WRONG" in capfd.readouterr().err


def test_points_of_the_grid() -> None:
    """Every size and dtype of the bars once; means are of what they say."""
    points = list(gpu_recurrence.points())
    assert len({(p.case.id, p.dtype) for p in points}) == len(points) == 2 * 2 * 3 * 3 * 4 * 5
    assert sum(p.is_step_bar for p in points) == 3  # one for each T
    found = gpu_recurrence.means([(p, 4.0 if p.backward else 2.0) for p in points])
    assert {name: value for name, (_, value) in found.items()} == pytest.approx(
        dict(zip(found, (2.0, 4.0, 2.0), strict=True))
    )


def test_every_op_is_there() -> None:
    """Each family of kernels has a case of parity."""
    ops = {case.op for case in gpu_cases.parity_cases()}
    assert ops == {
        "add_norm",
        "additive_attention",
        "attention",
        "cached_attention",
        "cross_entropy",
        "gated_bridge",
        "gru",
        "linear",
        "log_softmax_topk",
        "lstm",
        "rnn",
    }
    assert {case.op for case in gpu_cases.speed_cases()} == ops - {"rnn"}
    names = [case.id for case in (*gpu_cases.parity_cases(), *gpu_cases.speed_cases())]
    assert len(set(names)) == len(names)
