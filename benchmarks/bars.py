"""The speeds to reach, each as a rule over measured cases, and the verdict on them.

A bar is not relaxed by leaving cases out: its outcome says how many of the registry's cases it
was judged on. Ratios leave out the points where the best peer takes less than 20 µs; those have a
bar of their own in microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.cases import RNN_CASES, RnnCase
from benchmarks.measure import CaseResult

Verdict = Literal["reached", "falls short", "not measured"]


@dataclass(frozen=True)
class Bar:
    """A limit on a value: of every case it applies to, or of their geometric mean."""

    name: str
    applies: Callable[[RnnCase], bool]
    value: Callable[[CaseResult], float | None]
    limit: float
    geomean: bool = False
    at_most: bool = False
    unit: str = "×"

    def holds(self, value: float) -> bool:
        """Whether a value is on the right side of the limit."""
        return value <= self.limit if self.at_most else value >= self.limit

    @property
    def wanted(self) -> str:
        """The limit in words; a mean is a geometric mean."""
        sign = "≤" if self.at_most else "≥"
        kind = "mean" if self.geomean else "each"
        return f"{kind} {sign} {self.limit:.3g}{self.unit}"


@dataclass(frozen=True)
class Outcome:
    """A bar's value (geometric mean, or the worst point), on how many cases, and the verdict."""

    bar: Bar
    value: float | None
    measured: int
    total: int
    missed: int
    worst: RnnCase | None

    @property
    def verdict(self) -> Verdict:
        """Reached only if there was something to judge."""
        if self.value is None:
            return "not measured"
        return "reached" if self.bar.holds(self.value) else "falls short"


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of positive numbers."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def evaluate(
    bar: Bar, results: Iterable[CaseResult], registry: Iterable[RnnCase] = RNN_CASES
) -> Outcome:
    """Judge a bar on the cases that were measured."""
    found = [(result, bar.value(result)) for result in results if bar.applies(result.case)]
    values = [(value, result.case) for result, value in found if value is not None]
    total = sum(bar.applies(case) for case in registry)
    if not values:
        return Outcome(bar, None, 0, total, 0, None)
    worst, where = (max if bar.at_most else min)(values, key=lambda pair: pair[0])
    missed = sum(not bar.holds(value) for value, _ in values)
    value = geometric_mean([value for value, _ in values]) if bar.geomean else worst
    return Outcome(bar, value, len(values), total, missed, where)


def marks(result: CaseResult) -> bool | None:
    """Whether a case holds every bar that judges it as a single point; None if none does."""
    verdicts = [
        bar.holds(value)
        for bar in BARS
        if not bar.geomean and bar.applies(result.case)
        for value in [bar.value(result)]
        if value is not None
    ]
    return all(verdicts) if verdicts else None


def _best(result: CaseResult) -> float | None:
    return None if result.small else result.ratio(result.best_peer())


def _torch(result: CaseResult) -> float | None:
    return None if result.small else result.ratio(result.seconds("torch"))


def _torch_always(result: CaseResult) -> float | None:
    return result.ratio(result.seconds("torch"))


def _best_float32(result: CaseResult) -> float | None:
    return result.ratio(result.best_peer("float32"))


def _over_kernel(result: CaseResult) -> float | None:
    if not result.small or result.ours is None or result.kernel is None:
        return None
    return (result.ours - result.kernel) * 1e6


def _kernel_over_read_bound(result: CaseResult) -> float | None:
    read, compute = result.read_bound, result.compute_bound
    if read is None or compute is None or result.kernel is None or compute > read:
        return None
    return result.kernel / read


def _percent_of_peak(result: CaseResult) -> float | None:
    return 100 * result.share_of_peak if result.share_of_peak else None


def _per_token(slow: str, fast: str) -> Callable[[CaseResult], float | None]:
    """Time of one contender for each real token, over that of another."""

    def value(result: CaseResult) -> float | None:
        over, under = result.seconds_per_token(slow), result.seconds_per_token(fast)
        return over / under if over and under else None

    return value


# Shapes that somebody asked for beyond the grid are measured, but no bar speaks of them.
_GRID = frozenset(case for case in RNN_CASES if case.suite == "grid")


def _grid(cell: str, dtype: str) -> Callable[[RnnCase], bool]:
    return lambda case: (case.cell, case.dtype) == (cell, dtype) and case in _GRID


def _at(
    base: Callable[[RnnCase], bool], where: Callable[[RnnCase], bool]
) -> Callable[[RnnCase], bool]:
    return lambda case: base(case) and where(case)


def _suite(suite: str, cell: str | None = None) -> Callable[[RnnCase], bool]:
    return lambda case: case.suite == suite and cell in (None, case.cell)


def _training(
    cell: str, dtype: str, where: Callable[[RnnCase], bool] = lambda case: True
) -> Callable[[RnnCase], bool]:
    return lambda case: (
        (case.suite, case.cell, case.dtype) == ("training", cell, dtype) and where(case)
    )


def _float32_bars() -> list[Bar]:
    lstm = _grid("lstm", "float32")
    one = _at(lstm, lambda case: case.batch == 1)
    large = _at(lstm, lambda case: case.batch >= 8 and case.time >= 20 and case.hidden >= 256)
    bars = [
        Bar("float32 LSTM, best peer", lstm, _best, 0.97),
        Bar(
            "float32 LSTM, small calls, over the C++ call",
            lstm,
            _over_kernel,
            8.0,
            False,
            True,
            " µs",
        ),
        Bar("float32 LSTM, best peer", lstm, _best, 1.2, geomean=True),
        Bar("float32 LSTM at B=1, best peer", one, _best, 1.3, geomean=True),
        Bar(
            "float32 LSTM at B=1, C++ call over the read bound",
            one,
            _kernel_over_read_bound,
            1.25,
            at_most=True,
        ),
        Bar("float32 LSTM at B=1, torch", one, _torch, 1.5, geomean=True),
        Bar(
            "float32 LSTM at B≥8 T≥20 H≥256, share of peak",
            large,
            _percent_of_peak,
            80.0,
            unit=" %",
        ),
    ]
    for cell in ("gru", "rnn"):
        of_cell, name = _grid(cell, "float32"), f"float32 {cell.upper()}"
        bars.append(Bar(f"{name}, torch", of_cell, _torch, 2.5, geomean=True))
        bars.append(Bar(f"{name}, best peer", of_cell, _best, 1.2, geomean=True))
    return bars


def _low_precision_bars() -> list[Bar]:
    bars = []
    for cell in ("lstm", "gru"):
        bf16, name = _grid(cell, "bfloat16"), f"bfloat16 {cell.upper()}"
        bars.append(Bar(f"{name}, best peer", bf16, _best, 0.97))
        bars.append(Bar(f"{name}, best peer", bf16, _best, 1.25, geomean=True))
    for cell in ("lstm", "gru"):
        int8, name = _grid(cell, "int8"), f"int8 {cell.upper()}"
        large = _at(int8, lambda case: case.batch >= 32 and case.hidden == 1024)
        other = _at(int8, lambda case: not (case.batch >= 32 and case.hidden == 1024))
        point = _at(int8, lambda case: (case.batch, case.time, case.hidden) == (1, 50, 512))
        bars.append(Bar(f"{name} at B≥32 H=1024, torch", large, _torch_always, 1.3))
        bars.append(Bar(f"{name} elsewhere, torch", other, _torch_always, 1.5))
        bars.append(Bar(f"{name}, torch", int8, _torch_always, 2.5, geomean=True))
        bars.append(Bar(f"{name} at (1, 50, 512), best float32 peer", point, _best_float32, 4.0))
    return bars


def _other_bars() -> list[Bar]:
    lengths, equal = _suite("lengths"), _per_token("encdec_fast lengths", "encdec_fast equal")
    packed = _per_token("encdec_fast packed", "encdec_fast lengths")
    over_torch = _per_token("torch packed", "encdec_fast lengths")
    at_8 = lambda case: case.batch == 8  # noqa: E731
    not_8 = lambda case: case.batch != 8  # noqa: E731
    return [
        Bar("LSTM call at (1, 1, 16), torch", _suite("overhead", "lstm"), _torch_always, 3.0),
        Bar("unequal lengths, per token over equal lengths", lengths, equal, 1.2, at_most=True),
        Bar("unequal lengths LSTM, torch packed", _suite("lengths", "lstm"), over_torch, 2.6),
        Bar("unequal lengths GRU, torch packed", _suite("lengths", "gru"), over_torch, 2.5),
        # Equal within the noise of a median.
        Bar("PackedSequence over lengths=", lengths, packed, 1.05, at_most=True),
        Bar(
            "training float32 LSTM at B=8, torch",
            _training("lstm", "float32", at_8),
            _torch_always,
            1.2,
        ),
        Bar(
            "training float32 LSTM elsewhere, torch",
            _training("lstm", "float32", not_8),
            _torch_always,
            1.0,
        ),
        Bar("training float32 GRU, torch", _training("gru", "float32"), _torch_always, 2.2),
        Bar(
            "training bfloat16 LSTM at B=8, torch",
            _training("lstm", "bfloat16", at_8),
            _torch_always,
            1.15,
        ),
        Bar(
            "training bfloat16 LSTM elsewhere, torch",
            _training("lstm", "bfloat16", not_8),
            _torch_always,
            1.0,
        ),
        Bar("training bfloat16 GRU, torch", _training("gru", "bfloat16"), _torch_always, 1.8),
        Bar("fallback in float64, torch", _suite("fallback"), _torch_always, 1 / 1.1),
    ]


BARS: tuple[Bar, ...] = (*_float32_bars(), *_low_precision_bars(), *_other_bars())
