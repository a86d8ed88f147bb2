"""The suites of the ops beside the recurrent ones: measured, held to their bars, written down."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks import machine, sampler, workload
from benchmarks.machine import Ceilings
from benchmarks.op_case import OpCase
from benchmarks.op_cases import MAKERS, SUITES
from benchmarks.report import INTERRUPTED
from benchmarks.results import NAME, RESULTS
from benchmarks.sampler import Stats
from benchmarks.tables import NOISY, Grid, geometric_mean, time_text

AXES = {
    "linear": "M, N, K",
    "additive_attention": "B, Tq, S, A",
    "attention": "B, H, Tq, S, D",
    "transformer_encoder": "B, T",
    "attention_decoder": "B, Tq, S, H",
    "gated_bridge": "B, H",
    "translation": "B, beams",
    "recurrent_translation": "B, beams",
    "pronunciation": "B, beams",
}
OURS, KERNEL = "encdec_fast", "encdec_fast C++ call"


@dataclass
class OpResult:
    """What a case gave. problems: the contenders that were wrong, and how."""

    case: OpCase
    samples: dict[str, list[float]]
    problems: dict[str, str] = field(default_factory=dict)
    peak: float | None = None  # operations a second
    bandwidth: float | None = None  # bytes a second, reading the weight again and again

    @cached_property
    def stats(self) -> dict[str, Stats]:
        """Median and quartiles of each contender."""
        return {name: Stats.of(taken) for name, taken in self.samples.items()}

    def seconds(self, name: str) -> float | None:
        """The median time of a contender."""
        return self.stats[name].median if name in self.stats else None

    def over(self, peer: str) -> float | None:
        """How many times faster we are than a peer."""
        ours, theirs = self.seconds(OURS), self.seconds(peer)
        return theirs / ours if ours and theirs else None

    def over_best(self, name: str) -> float | None:
        """How many times faster we are than the fastest peer whose name begins with this."""
        ratios = [self.over(peer) for peer in self.samples if peer.startswith(name)]
        return min((ratio for ratio in ratios if ratio), default=None)

    @property
    def share_of_peak(self) -> float | None:
        """Our rate as a part of the peak of arithmetic."""
        ours = self.seconds(OURS)
        return self.case.flops / ours / self.peak if ours and self.peak else None

    @property
    def kernel_over_reading(self) -> float | None:
        """The C++ call's time in units of the time that reading the weight takes."""
        kernel = self.seconds(KERNEL)
        if not kernel or not self.bandwidth:
            return None
        return kernel * self.bandwidth / self.case.weight_bytes

    @property
    def python(self) -> float | None:
        """Microseconds of a call beside those of the C++ call."""
        ours, kernel = self.seconds(OURS), self.seconds(KERNEL)
        return 1e6 * (ours - kernel) if ours and kernel else None


@dataclass(frozen=True)
class OpBar:
    """What every case that it applies to must reach: at least `least` or at most `most`."""

    name: str
    applies: Callable[[OpCase], bool]
    value: Callable[[OpResult], float | None]
    least: float | None = None
    most: float | None = None

    def holds(self, value: float) -> bool:
        return value >= self.least if self.least is not None else value <= (self.most or 0.0)

    @property
    def wanted(self) -> str:
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}"


def _additive(training: bool, *shapes: tuple[int, ...]) -> Callable[[OpCase], bool]:
    return lambda c: c.op == "additive_attention" and c.training == training and c.shape in shapes


def _attention(dtype: str, variants: tuple[str, ...], one: bool) -> Callable[[OpCase], bool]:
    return lambda c: (
        c.op == "attention"
        and c.dtype == dtype
        and c.variant in variants
        and (c.shape[2] == 1) == one
    )


def _encoder(dtype: str, padded: bool) -> Callable[[OpCase], bool]:
    return lambda c: (
        c.op == "transformer_encoder" and c.dtype == dtype and (c.variant == "padded") == padded
    )


def _linear(dtype: str, rows: Callable[[int], bool]) -> Callable[[OpCase], bool]:
    return lambda c: c.op == "linear" and c.dtype == dtype and not c.training and rows(c.shape[0])


def _generates(op: str, dtype: str, one: bool) -> Callable[[OpCase], bool]:
    """one: a batch of one, and of translation one beam."""
    single = {"translation": (1, 1), "recurrent_translation": (1, 5), "pronunciation": (1, 1)}
    return lambda c: c.op == op and c.dtype == dtype and (c.shape == single[op]) == one


def _generation_bars() -> Iterator[OpBar]:
    best: Callable[[OpResult], float | None] = lambda r: r.over_best("CTranslate2")  # noqa: E731
    for dtype, one, wanted in (
        ("int8", True, 4),
        ("bfloat16", True, 2.2),
        ("int8", False, 2.5),
        ("bfloat16", False, 1.8),
    ):
        name = f"translation {dtype}, " + ("B 1, beam 1" if one else "other sizes")
        yield OpBar(
            f"{name}, over CTranslate2's best mode",
            _generates("translation", dtype, one),
            best,
            wanted,
        )
    yield OpBar(
        "translation float32, B 1, beam 1, over CTranslate2 float32",
        _generates("translation", "float32", True),
        lambda r: r.over("CTranslate2 float32"),
        1.8,
    )
    yield OpBar(
        "translation int8, over transformers",
        lambda c: c.op == "translation" and c.dtype == "int8",
        lambda r: r.over("transformers"),
        5,
    )
    for op, dtype, one, wanted in (
        ("recurrent_translation", "float32", True, 3),
        ("recurrent_translation", "bfloat16", True, 6),
        ("recurrent_translation", "int8", True, 12),
        ("recurrent_translation", "float32", False, 1.8),
        ("recurrent_translation", "bfloat16", False, 3),
        ("recurrent_translation", "int8", False, 5),
        ("pronunciation", "float32", True, 15),
        ("pronunciation", "float32", False, 4),
    ):
        name = f"{op.replace('_', ' ')} {dtype}, " + ("B 1" if one else "batches")
        yield OpBar(f"{name}, over a torch loop", _generates(op, dtype, one), _FROM_TORCH, wanted)


_ONE, *_LARGE = ((32, 1, 50, 512), (32, 50, 50, 512), (8, 128, 512, 512))
_FROM_TORCH: Callable[[OpResult], float | None] = lambda r: r.over("torch")  # noqa: E731
BARS = (
    OpBar("one query, over torch", _additive(False, _ONE), _FROM_TORCH, 6),
    OpBar("many queries, over torch", _additive(False, *_LARGE), _FROM_TORCH, 25),
    OpBar(
        "many queries, over torch.compile",
        _additive(False, *_LARGE),
        lambda r: r.over("torch.compile"),
        12,
    ),
    OpBar("forward and backward, over torch", _additive(True, *_LARGE), _FROM_TORCH, 12),
    *(
        OpBar(
            f"attention {dtype}" + (", one query" if one else "") + ", over torch",
            _attention(dtype, ("", "padded"), one),
            _FROM_TORCH,
            wanted,
        )
        for dtype, one, wanted in (
            ("float32", False, 1.5),
            ("float32", True, 1.5),
            ("bfloat16", False, 3),
            ("bfloat16", True, 8),
        )
    ),
    *(
        OpBar(
            f"attention {dtype} with weights, over MultiheadAttention",
            _attention(dtype, ("weights",), False),
            _FROM_TORCH,
            3,
        )
        for dtype in ("float32", "bfloat16")
    ),
    *(
        OpBar(
            f"attention {dtype} backward, over torch",
            _attention(dtype, ("backward",), False),
            _FROM_TORCH,
            wanted,
        )
        for dtype, wanted in (("float32", 1.3), ("bfloat16", 2))
    ),
    *(
        OpBar(
            f"Transformer encoder {dtype}" + (", padded" if padded else "") + ", over torch",
            _encoder(dtype, padded),
            _FROM_TORCH,
            wanted,
        )
        for dtype, padded, wanted in (
            ("float32", False, 1.6),
            ("float32", True, 1.6),
            ("bfloat16", False, 1.1),
            ("bfloat16", True, 2),
            ("int8", False, 1.4),
            ("int8", True, 2.5),
        )
    ),
    OpBar(
        "attention decoder float32, forward and backward, over a torch loop",
        lambda c: c.op == "attention_decoder" and c.dtype == "float32" and not c.variant,
        _FROM_TORCH,
        4,
    ),
    *_generation_bars(),
    OpBar("float32, over torch", _linear("float32", lambda m: True), _FROM_TORCH, 1.7),
    OpBar("bfloat16, over torch", _linear("bfloat16", lambda m: m > 8), _FROM_TORCH, 1.0),
    OpBar("bfloat16, M ≤ 8, over torch", _linear("bfloat16", lambda m: m <= 8), _FROM_TORCH, 1.5),
    OpBar(
        "int8, M ≥ 128, part of the peak",
        _linear("int8", lambda m: m >= 128),
        lambda r: r.share_of_peak,
        0.6,
    ),
    *(
        OpBar(
            f"{dtype}, M = 1, C++ call over reading",
            _linear(dtype, lambda m: m == 1),
            lambda r: r.kernel_over_reading,
            most=1.5,
        )
        for dtype in ("float32", "bfloat16", "int8")
    ),
    OpBar(
        "M = 1, Python's part in µs",
        lambda c: c.op == "linear" and c.shape[0] == 1 and not c.training,
        lambda r: r.python,
        most=8,
    ),
)


def _versions() -> dict[str, str]:
    """Of the packages that contenders come from, so far as they were loaded."""
    names = ("torch", "transformers", "ctranslate2")
    return {name: sys.modules[name].__version__ for name in names if name in sys.modules}


def measure(case: OpCase, budget_s: float, ceilings: Ceilings) -> OpResult:
    """Compare the contenders of a case with the reference, then time those that are right."""
    work = MAKERS[case.op](case)
    calls, problems = {}, {}
    for contender in work.contenders:
        found = contender.results(contender.call())
        _, problem = workload.judge(found, work.right, case.dtype)
        if problem:
            problems[contender.name] = problem
        else:
            calls[contender.name] = contender.call
    result = OpResult(case, sampler.sample_warm(calls, budget_s), problems)
    ceilings.sample_barrier()
    result.peak = ceilings.peak(case.dtype)
    if case.op == "linear":
        result.bandwidth = ceilings.read_bandwidth(case.weight_bytes // ceilings.threads)
    return result


def _time(stats: Stats | None, problem: str | None) -> str:
    if stats is None:
        return "wrong" if problem else "-"
    return ("~" if stats.q3 - stats.q1 > NOISY * stats.median else "") + time_text(stats.median)


def grids(results: Sequence[OpResult]) -> list[Grid]:
    """One table for each op and kind of call, and one of the bars."""
    found = []

    def kind_of(r: OpResult) -> tuple[str, str, bool, str]:
        return r.case.op, r.case.dtype, r.case.training, r.case.variant

    for kind in dict.fromkeys(map(kind_of, results)):
        own = [r for r in results if kind_of(r) == kind]
        names = list(dict.fromkeys(name for r in own for name in (*r.stats, *r.problems)))
        peers = [name for name in names if not name.startswith(OURS)]
        op, dtype, training, variant = kind
        axes = AXES[op]
        title = f"{op} {dtype}, " + ("forward and backward" if training else "inference")
        title += f", {variant}" if variant else ""
        grid = Grid(title, [axes, *names, *(f"× {peer}" for peer in peers), "Gop/s", "peak"])
        for r in own:
            row = [", ".join(map(str, r.case.shape))]
            row += [_time(r.stats.get(name), r.problems.get(name)) for name in names]
            row += [_ratio(r.over(peer)) for peer in peers]
            ours, share = r.seconds(OURS), r.share_of_peak
            row.append(f"{r.case.flops / ours / 1e9:.0f}" if ours else "-")
            row.append(f"{100 * share:.0f} %" if share else "-")
            grid.rows.append(row)
            grid.notes += [f"{r.case.id}: {n}: {p}" for n, p in r.problems.items()]
        for peer in peers:
            known = [ratio for r in own if (ratio := r.over(peer))]
            if known:
                grid.notes.append(f"geometric mean over {peer}: {geometric_mean(known):.2f}")
        found.append(grid)
    return [*found, bars_grid(results)]


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def outcomes(results: Sequence[OpResult]) -> list[dict[str, Any]]:
    """Each bar that some result speaks of, with the result that is worst for it."""
    found = []
    for bar in BARS:
        values = [
            (v, r) for r in results if bar.applies(r.case) and (v := bar.value(r)) is not None
        ]
        if not values:
            continue
        pick = min if bar.least is not None else max
        worst, result = pick(values, key=lambda pair: pair[0])
        missed = sum(not bar.holds(value) for value, _ in values)
        found.append(
            {
                "name": bar.name,
                "wanted": bar.wanted,
                "worst": float(f"{worst:.4g}"),
                "at": result.case.id,
                "points": len(values),
                "missed": missed,
                "verdict": "falls short" if missed else "reached",
            }
        )
    return found


def bars_grid(results: Sequence[OpResult]) -> Grid:
    """The table of the bars."""
    grid = Grid("Speeds to reach", ["bar", "wanted", "worst", "at", "points", "missed", "verdict"])
    for o in outcomes(results):
        grid.rows.append(
            [
                str(o[key])
                for key in ("name", "wanted", "worst", "at", "points", "missed", "verdict")
            ]
        )
    return grid


def save(name: str, facts: dict[str, Any], results: Sequence[OpResult]) -> list[str]:
    """Write NAME.json and NAME.md."""
    cases = [
        {
            "id": r.case.id,
            "flops": r.case.flops,
            "seconds": {
                n: {"median": s.median, "q1": s.q1, "q3": s.q3, "samples": s.count}
                for n, s in r.stats.items()
            },
            "problems": r.problems,
        }
        for r in results
    ]
    whole = {**facts, "bars": outcomes(results), "cases": cases}
    lines = [f"# {name}", ""]
    lines += [f"- {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()]
    lines += [
        "",
        "Medians of warm calls, interleaved in one process. `~`: the quartiles are more",
        "than 20% of the median apart. `peak`: of the machine's rate in this dtype.",
        "",
    ]
    lines += [grid.markdown() for grid in grids(results)]
    RESULTS.mkdir(parents=True, exist_ok=True)
    texts = {"json": json.dumps(whole, indent=1, ensure_ascii=False) + "\n", "md": "\n".join(lines)}
    for kind, text in texts.items():
        (RESULTS / f"{name}.{kind}").write_text(text, encoding="utf-8")
    return [os.path.relpath(RESULTS / f"{name}.{kind}") for kind in texts]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a suite."""
    parser.add_argument("--dtype", nargs="+", help="only these dtypes")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds for the whole run")
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.*")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar falls short")
    parser.add_argument("--list", action="store_true", help="name the cases and measure nothing")


def main(
    suite: str, options: argparse.Namespace, arguments: Sequence[str], console: Console
) -> int:
    """Run a suite; returns the exit code."""
    cases = [c for c in SUITES[suite] if not options.dtype or c.dtype in options.dtype]
    if options.save and not NAME.fullmatch(options.save):
        console.print("a name is letters, digits, '.', '_' and '-'", style="red")
        return 2
    if options.list or not cases:
        console.print("\n".join(c.id for c in cases) or "No case matches.", highlight=False)
        return 0 if cases else 2
    ceilings = Ceilings(torch.get_num_threads())
    budget, results = options.budget or 120.0, list[OpResult]()
    end, interrupted = time.monotonic() + budget, False
    try:
        for case in track(cases, suite, console=console, transient=True, auto_refresh=False):
            left = max(0.0, end - time.monotonic()) / (len(cases) - len(results))
            results.append(measure(case, left, ceilings))
    except KeyboardInterrupt:
        interrupted = True
        console.print(f"Interrupted after {len(results)} of {len(cases)} cases.", style="yellow")
    for grid in grids(results) if results else []:
        console.print(grid.rich())
        for note in grid.notes:
            console.print(f"  {note}", style="dim", highlight=False, markup=False)
    facts = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", "benchmarks.report", *arguments]),
        "threads": ceilings.threads,
        "machine": machine.describe_cpu(),
        "versions": {**machine.describe_versions([]), **_versions()},
        "ceilings": ceilings.as_dict(),
    }
    if options.save and not interrupted:
        for path in save(options.save, facts, results):
            console.print(f"wrote {path}", highlight=False)
    if interrupted:
        return INTERRUPTED
    wrong = any(OURS in r.problems or KERNEL in r.problems for r in results)
    short = any(o["missed"] for o in outcomes(results))
    return 1 if wrong or (options.check and short) else 0
