"""The benchmarks' own machinery: cases, comparison, sampling, verdicts, and the report."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("rich")

from rich.console import Console

from benchmarks import (
    allocator,
    bars,
    cases,
    command,
    machine,
    measure,
    memory,
    report,
    results,
    sampler,
    workload,
)
from benchmarks.cases import RnnCase
from benchmarks.measure import CaseResult, Entry
from benchmarks.peers import Contender, Offer, Peer, all_peers
from benchmarks.peers.ours import EncdecFast
from benchmarks.peers.torch_eager import TorchEager
from benchmarks.sampler import Stats


def tiny(cell: str = "lstm", dtype: str = "float32", suite: str = "grid") -> RnnCase:
    lengths = (3, 1) if suite == "lengths" else None
    return RnnCase(suite, cell, dtype, 2, 3, 8, 8, lengths)  # type: ignore[arg-type]


def result_of(case: RnnCase, **seconds: float) -> CaseResult:
    """A case whose contenders took these times."""
    entries = [
        Entry(
            name=name.replace("_call", " C++ call").replace("__", " "),
            peer=name,
            dtype=case.dtype,
            role={"encdec_fast": "ours", "encdec_fast_call": "kernel"}.get(name, "peer"),
            status="timed",
            tokens=case.tokens,
            warm=Stats(value, value, value, 1),
        )
        for name, value in seconds.items()
    ]
    return CaseResult(case, entries)


class FakePeer:
    """A peer that offers one contender, made from torch's."""

    def __init__(self, name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        self.name = name
        self.change = change

    def version(self) -> str | None:
        return None

    def offer(self, work: workload.Workload, threads: int) -> Offer:
        real = TorchEager().offer(work, threads).contenders[0]
        return Offer(
            [
                Contender(
                    peer=self.name,
                    dtype=real.dtype,
                    call=real.call,
                    outputs=lambda value: self.change(real.outputs(value)),
                    tokens=real.tokens,
                )
            ]
        )


class BrokenPeer(FakePeer):
    def offer(self, work: workload.Workload, threads: int) -> Offer:
        raise OSError("no such library")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_kernel_call(cell: str, dtype: str) -> None:
    """The C++ call is measured beside the module, and says the same."""
    offer = EncdecFast().offer(workload.make(tiny(cell, dtype)), 1)
    assert not offer.absent
    module, kernel = offer.contenders
    assert (module.role, kernel.role) == ("ours", "kernel")
    expected, found = (one.outputs(one.call()) for one in offer.contenders)
    assert set(expected) <= set(found)
    for name, value in expected.items():
        assert torch.equal(found[name], value)


class TestCases:
    def test_ids_are_unique(self) -> None:
        ids = [case.id for case in cases.RNN_CASES]
        assert len(ids) == len(set(ids))

    def test_grid_is_complete(self) -> None:
        assert len(cases.select(("grid",))) == 5 * 4 * 4 * 3 * 3

    def test_costs(self) -> None:
        case = tiny("gru", "bfloat16")
        assert case.weights == 3 * 8 * 16
        assert cases.flops(case) == 2 * 6 * case.weights
        assert cases.recurrent_bytes(case) == 2 * 3 * 8 * 8
        assert cases.streamed_bytes(case) == 2 * 3 * 8 * 8 * (1 + 3)
        assert cases.flops(tiny(suite="training")) == 3 * cases.flops(tiny())

    def test_lengths(self) -> None:
        for case in cases.select(("lengths",)):
            assert case.lengths is not None
            assert len(case.lengths) == case.batch
            assert min(case.lengths) >= 1
            assert max(case.lengths) == case.time
            assert case.tokens == sum(case.lengths) < case.batch * case.time

    def test_select(self) -> None:
        found = cases.select(("grid",), ["lstm"], ["int8"], [1, 8], [50], [512])
        assert [case.id for case in found] == [
            "grid-lstm-int8-B1-T50-H512",
            "grid-lstm-int8-B8-T50-H512",
        ]


class TestComparison:
    def test_workload_is_exact_in_its_dtype(self) -> None:
        work = workload.make(tiny(dtype="bfloat16"))
        for tensor in (work.x, *work.module.parameters()):
            assert torch.equal(tensor, tensor.bfloat16().float())

    @pytest.mark.parametrize("wrong", ["row", "nan", "size", "missing"])
    def test_wrong_outputs_are_found(self, wrong: str) -> None:
        right = {"output": torch.randn(50, 8, 16)}
        found = {"output": right["output"].clone()}
        if wrong == "row":
            found["output"][7, 3] = 0
        elif wrong == "nan":
            found["output"][7, 3, 0] = float("nan")
        elif wrong == "size":
            found["output"] = found["output"][:-1]
        else:
            del found["output"]
        assert workload.judge(right, right, "float32")[1] is None
        assert workload.judge(found, right, "float32")[1] is not None

    @pytest.mark.parametrize("peer", all_peers(), ids=lambda peer: peer.name)
    @pytest.mark.parametrize("cell", cases.CELLS)
    @pytest.mark.parametrize(
        ("suite", "dtype"),
        [
            *[("grid", dtype) for dtype in cases.DTYPES],
            ("lengths", "float32"),
            ("training", "float32"),
            ("training", "bfloat16"),
            ("fallback", "float64"),
        ],
    )
    def test_peers_are_right_or_say_why_not(
        self, peer: Peer, cell: str, suite: str, dtype: str
    ) -> None:
        case = tiny(cell, dtype, suite)
        found = measure.measure(case, [peer], torch.get_num_threads(), 0.0)
        assert found.entries
        for entry in found.entries:
            if entry.status == "absent":
                assert entry.note
                assert "failed" not in entry.note
            else:
                assert entry.status == "timed", f"{entry.name}: {entry.note}"
                assert entry.warm is not None


class TestMeasure:
    def test_wrong_and_broken_get_no_time(self) -> None:
        def zeros(found: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: torch.zeros_like(tensor) for name, tensor in found.items()}

        def raises(found: dict[str, Tensor]) -> dict[str, Tensor]:
            raise ValueError("no result")

        peers = [
            FakePeer("right", lambda found: found),
            FakePeer("wrong", zeros),
            FakePeer("raises", raises),
            BrokenPeer("broken", zeros),
        ]
        found = measure.measure(tiny(), peers, 1, 0.0)
        status = {entry.name: (entry.status, entry.warm is None) for entry in found.entries}
        assert status == {
            "right": ("timed", False),
            "wrong": ("wrong", True),
            "raises": ("failed", True),
            "broken": ("absent", True),
        }
        assert found.best_peer() == found.seconds("right")
        assert "no such library" in found.entries[3].note

    def test_cold_and_warm_are_apart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sampler, "COLD_BYTES", 1 << 12)
        entry = measure.measure(tiny(), [TorchEager()], 1, 0.0, "both").entries[0]
        assert entry.warm is not None
        assert entry.cold is not None
        assert entry.cold.count == sampler.COLD_CALLS[0]

    def test_another_amount_of_work_is_no_best_peer(self) -> None:
        found = result_of(tiny(suite="lengths"), torch__packed=2.0, torch__equal=1.0)
        found.entries[1].tokens = 6
        assert found.best_peer() == 2.0
        assert found.seconds_per_token("torch equal") == pytest.approx(1 / 6)


class TestSampler:
    def test_blocks_rotate_and_drop(self) -> None:
        order: list[str] = []

        def call(name: str) -> Callable[[], object]:
            return lambda: (order.append(name), time.sleep(1e-3))

        samples = sampler.sample_warm({"a": call("a"), "b": call("b")}, 0.0, block_s=2e-3)
        assert len(samples["a"]) == len(samples["b"])
        assert len(samples["a"]) >= sampler.MIN_ROUNDS * sampler.BLOCK_CALLS[0]
        assert order.count("a") > len(samples["a"])  # estimates and dropped calls
        assert all(sample >= 1e-3 for sample in samples["a"])

    def test_a_slow_call_is_a_block(self) -> None:
        slow = sampler.Block(lambda: None, sampler.SLOW_SECONDS)
        fast = sampler.Block(lambda: None, sampler.SLOW_SECONDS / 2)
        assert (slow.drop, slow.keep) == (0, 1)
        assert (fast.drop, fast.keep) == (sampler.DROP_CALLS[0], sampler.BLOCK_CALLS[0])

    def test_quiet(self) -> None:
        stop = threading.Event()

        def spin() -> None:
            while not stop.is_set():
                pass

        spinner = threading.Thread(target=spin)
        spinner.start()
        try:
            assert not sampler.wait_until_quiet(limit_s=0.05)
        finally:
            stop.set()
            spinner.join()
        assert sampler.wait_until_quiet(limit_s=5.0)

    def test_stats(self) -> None:
        assert Stats.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Stats(3.0, 2.0, 4.0, 5)


class TestBars:
    bar = bars.Bar("a", lambda case: True, bars._best, 1.2, geomean=True)

    def test_geometric_mean(self) -> None:
        fast = result_of(tiny(), torch=4e-3, encdec_fast=1e-3)
        slow = result_of(tiny(), torch=1e-3, encdec_fast=1e-3)
        outcome = bars.evaluate(self.bar, [fast, slow], [tiny()] * 3)
        assert outcome.value == pytest.approx(2.0)
        assert (outcome.measured, outcome.total, outcome.missed) == (2, 3, 1)
        assert outcome.verdict == "reached"

    def test_every_point(self) -> None:
        bar = bars.Bar("b", lambda case: True, bars._best, 0.97)
        found = [result_of(tiny(), torch=t, encdec_fast=1e-3) for t in (2e-3, 0.9e-3)]
        outcome = bars.evaluate(bar, found)
        assert outcome.value == pytest.approx(0.9)
        assert outcome.verdict == "falls short"
        assert bars.evaluate(bar, []).verdict == "not measured"

    def test_small_calls_count_in_microseconds(self) -> None:
        case = cases.RNN_CASES[0]
        small = result_of(case, torch=10e-6, encdec_fast=12e-6, encdec_fast_call=7e-6)
        assert bars.evaluate(self.bar, [small]).verdict == "not measured"
        assert bars._over_kernel(small) == pytest.approx(5.0)
        assert bars.marks(small) is True

    def test_every_bar_applies_somewhere(self) -> None:
        for bar in bars.BARS:
            assert any(bar.applies(case) for case in cases.RNN_CASES), bar.name


class TestMemory:
    def test_peak_and_held(self) -> None:
        size = 4 * 250_000

        def work() -> Tensor:
            return torch.ones(250_000) + 1

        # torch makes a scalar or two beside the tensors.
        assert 0 <= memory.peak_bytes(work) - 2 * size < 1000
        assert 0 <= memory.held_bytes(work) - size < 1000


TINY_RUN = [
    *("rnn", "--cell", "rnn", "--dtype", "float32", "--batch", "1", "2"),
    *("--time", "1", "--hidden", "8", "--budget", "0.1", "--peers", "torch"),
]


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class TestReport:
    def test_run_and_save(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(results, "RESULTS", tmp_path)
        shown = console()
        assert command.main([*TINY_RUN, "--save", "try"], shown) == 0
        assert "RNN float32" in printed(shown)
        text = (tmp_path / "try.json").read_text(encoding="utf-8")
        saved = json.loads(text)
        assert saved["complete"] is True
        assert [case["batch"] for case in saved["cases"]] == [1, 2]
        assert saved["cases"][0]["contenders"][0]["warm_seconds"]["samples"] > 0
        markdown = (tmp_path / "try.md").read_text(encoding="utf-8")
        assert "| 2, 1, 8 |" in markdown
        for private in (socket.gethostname(), os.getcwd(), str(Path.home())):
            assert len(private) < 4 or private not in text + markdown

    def test_interrupt_saves_what_there_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, calls = measure.measure, []

        def interrupted(*arguments: object) -> CaseResult:
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(results, "RESULTS", tmp_path)
        monkeypatch.setattr(measure, "measure", interrupted)
        shown = console()
        assert command.main([*TINY_RUN, "--save", "try"], shown) == 130
        assert "Interrupted after 1 of 2 cases" in printed(shown)
        assert not (tmp_path / "try.json").exists()
        saved = json.loads((tmp_path / "try.partial.json").read_text(encoding="utf-8"))
        assert (saved["complete"], saved["cases_measured"]) == (False, 1)

    def test_list(self) -> None:
        shown = console()
        assert command.main(["rnn", "--suite", "overhead", "--list"], shown) == 0
        assert printed(shown).split() == [f"overhead-{c}-float32-B1-T1-H16" for c in cases.CELLS]
        assert command.main(["rnn", "--suite", "training", "--cell", "rnn"], console()) == 2

    @pytest.mark.parametrize(
        "bad",
        [["--batch", "0"], ["--budget", "-1"], ["--save", "../x"], ["--cell", "mamba"]],
        ids=" ".join,
    )
    def test_bad_options(self, bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stopped:
            command.main(["rnn", *bad])
        assert stopped.value.code == 2
        assert bad[0] in capsys.readouterr().err

    def test_bad_budget_in_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BENCH_BUDGET_S", "soon")
        arguments = [a for a in TINY_RUN if a not in ("--budget", "0.1")]
        with pytest.raises(SystemExit, match="BENCH_BUDGET_S=soon"):
            command.main(arguments, console())

    def test_wrong_result_of_ours_fails(self) -> None:
        found = result_of(tiny(), encdec_fast=1.0)
        found.entries[0].status = "wrong"
        run = results.Run("", 1, "warm", 1.0, {}, {}, machine.Ceilings(1), 1, [found])
        assert command.exit_code(run, check=False) == 1

    def test_restarts_with_the_allocator_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        started: list[dict[str, str]] = []
        monkeypatch.setattr(os, "execve", lambda path, argv, env: started.append(env))
        for name in allocator.ALLOCATOR:
            monkeypatch.delenv(name, raising=False)
        report.with_allocator_settings()
        assert allocator.ALLOCATOR.items() <= started[0].items()
        for name, value in allocator.ALLOCATOR.items():
            monkeypatch.setenv(name, value)
        report.with_allocator_settings()
        assert len(started) == 1


class TestMachine:
    def test_without_probes_there_are_no_shares(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(machine, "_probe", lambda name: None)
        ceilings = machine.Ceilings(2)
        assert ceilings.bound(tiny()) is None
        assert result_of(tiny(), encdec_fast=1.0).share is None

    def test_bounds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        probes = {
            "measure_peak": lambda kind, threads: 1.0,
            "measure_read_bandwidth": lambda size, threads: 1.0,
            "measure_barrier": lambda threads: next(meetings),
        }
        meetings = iter([300.0, 40.0, 50.0])
        monkeypatch.setattr(machine, "_probe", probes.get)
        ceilings, case = machine.Ceilings(2), tiny()
        assert ceilings.compute_bound(case) == cases.flops(case) / 1e9
        assert ceilings.read_bound(case) == cases.streamed_bytes(case) / 1e9
        assert ceilings.read_bound(tiny(suite="training")) is None
        assert ceilings.as_dict()["barrier_ns"] == {}
        assert [round(1e9 * (ceilings.sample_barrier() or 0)) for _ in range(3)] == [300, 40, 50]
        found = ceilings.as_dict()["barrier_ns"]
        assert [round(found[name]) for name in ("least", "median", "most")] == [40, 50, 300]
        assert machine.Ceilings(1).sample_barrier() is None
