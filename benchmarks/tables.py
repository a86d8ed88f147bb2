"""Tables of results: built once as text, then shown by rich or written as markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.table import Table

from benchmarks.bars import BARS, Outcome, evaluate, geometric_mean, marks
from benchmarks.cases import SUITES, RnnCase
from benchmarks.measure import CaseResult, Entry
from benchmarks.memory import MemoryRow

SUITE_TITLES = {
    "grid": "Inference, one layer, one direction",
    "overhead": "The overhead of a call",
    "lengths": "Unequal lengths, uniform in 1..T: time per real token",
    "training": "Training, forward and backward",
    "fallback": "float64, which runs on torch's own kernels",
}
NOISY = 0.2  # a quartile range above this part of the median is marked
VERDICT_STYLE = {"reached": "green", "falls short": "bold red", "not measured": "dim"}
YES, NO, UNKNOWN = "✓", "✗", "-"


@dataclass
class Grid:
    """A table of text; a row of one cell is a heading inside the table."""

    title: str
    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The table as GitHub markdown."""
        lines = [f"### {self.title}", ""]
        lines.append("| " + " | ".join(self.header) + " |")
        lines.append("|" + "---|" * len(self.header))
        for row in self.rows:
            cells = [f"**{row[0]}**", *[""] * (len(self.header) - 1)] if len(row) == 1 else row
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        lines += [f"- {note}" for note in self.notes]
        return "\n".join(lines).rstrip() + "\n"

    def rich(self) -> Table:
        """The table for a terminal."""
        table = Table(title=self.title, title_justify="left", title_style="bold")
        table.box, table.pad_edge, table.padding = box.SIMPLE_HEAD, False, (0, 1, 0, 0)
        for index, name in enumerate(self.header):
            # The parts of a contender's name stand below each other, to keep the table narrow.
            heading = name if index == 0 else name.replace("encdec_fast ", "encdec_fast\n")
            heading = heading.replace(" lengths", "\nlengths").replace(" packed", "\npacked")
            heading = heading.replace(" equal", "\nequal")
            table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
        for row in self.rows:
            if len(row) == 1:
                table.add_section()
                table.add_row(f"[bold]{row[0]}[/bold]")
            else:
                table.add_row(*[_styled(cell) for cell in row])
        return table


def _styled(cell: str) -> str:
    if cell in VERDICT_STYLE:
        return f"[{VERDICT_STYLE[cell]}]{cell}[/]"
    style = {YES: "green", NO: "bold red", "wrong": "bold red", "failed": "bold red"}.get(cell)
    return f"[{style}]{cell}[/]" if style else cell


def time_text(seconds: float | None) -> str:
    """A time with three digits and its unit."""
    if seconds is None:
        return UNKNOWN
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit:
            value = seconds * factor
            return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"
    return f"{seconds:.2f} s"


def _number(value: float | None, pattern: str) -> str:
    return UNKNOWN if value is None else pattern.format(value)


def _entry_text(entry: Entry | None, per_token: bool) -> str:
    if entry is None or entry.status == "absent":
        return UNKNOWN
    if entry.status != "timed":
        return entry.status
    stats = entry.warm or entry.cold
    if stats is None:
        return UNKNOWN
    noisy = "~" if stats.q3 - stats.q1 > NOISY * stats.median else ""
    unit = entry.tokens if per_token else 1
    text = noisy + time_text(stats.median / unit)
    if entry.warm and entry.cold:
        text += f" ({time_text(entry.cold.median / unit)} cold)"
    return text


def _names(results: Sequence[CaseResult]) -> list[str]:
    """Contenders in the case's dtype that were present somewhere, in the order of their peers."""
    order: dict[str, None] = {}
    for result in results:
        for entry in result.entries:
            if entry.status != "absent" and entry.dtype == result.case.dtype:
                order.setdefault(entry.name)
    ours = [name for name in order if name.startswith("encdec_fast")]
    return [name for name in order if name not in ours] + ours


def shape_text(case: RnnCase) -> str:
    """B, T and H."""
    return f"{case.batch}, {case.time}, {case.hidden}"


def _mark(result: CaseResult) -> str:
    mark = marks(result)
    return UNKNOWN if mark is None else YES if mark else NO


def _case_row(result: CaseResult, names: Sequence[str]) -> list[str]:
    entries = {entry.name: entry for entry in result.entries}
    per_token = result.case.lengths is not None
    peer = result.seconds("torch") or result.seconds("torch packed")
    return [
        shape_text(result.case),
        *[_entry_text(entries.get(name), per_token) for name in names],
        _number(result.ratio(result.best_peer()), "{:.2f}"),
        _number(result.ratio(peer), "{:.2f}"),
        _number(result.gflops, "{:.1f}"),
        _number(100 * result.share if result.share else None, "{:.0f} %"),
        _mark(result),
    ]


def _mean_row(results: Sequence[CaseResult], columns: int) -> list[str]:
    best = [r for result in results if (r := result.ratio(result.best_peer())) is not None]
    torch_times = [result.seconds("torch") or result.seconds("torch packed") for result in results]
    over = [result.ratio(seconds) for result, seconds in zip(results, torch_times, strict=True)]
    known = [ratio for ratio in over if ratio is not None]
    means = [f"{geometric_mean(values):.2f}" if values else UNKNOWN for values in (best, known)]
    return ["mean (geometric)", *[""] * columns, *means, "", "", ""]


def suite_grid(suite: str, results: Sequence[CaseResult]) -> Grid:
    """One suite as a table, with a heading and geometric means for each cell and dtype."""
    names = _names(results)
    header = ["B, T, H", *names, "× best", "× torch", "GFLOP/s", "ceiling", "bar"]
    grid = Grid(SUITE_TITLES[suite], header)
    groups: dict[tuple[str, str], list[CaseResult]] = {}
    for result in results:
        groups.setdefault((result.case.cell, result.case.dtype), []).append(result)
    for (cell, dtype), group in groups.items():
        grid.rows.append([f"{cell.upper()} {dtype}"])
        grid.rows += [_case_row(result, names) for result in group]
        if len(group) > 1:
            grid.rows.append(_mean_row(group, len(names)))
    grid.notes = _notes(results)
    return grid


def _notes(results: Iterable[CaseResult]) -> list[str]:
    reasons: Counter[str] = Counter()
    notes = []
    for result in results:
        for entry in result.entries:
            if entry.status == "absent":
                reasons[f"{entry.name}: {entry.note}"] += 1
            elif entry.status != "timed":
                notes.append(f"{entry.name} is {entry.status} in {result.case.id}: {entry.note}")
            elif entry.dtype != result.case.dtype:
                notes.append(f"{entry.name} takes {time_text(entry.seconds)} in {result.case.id}")
    notes += [f"{reason} ({count} cases)" for reason, count in sorted(reasons.items())]
    return notes


def suite_grids(results: Sequence[CaseResult]) -> list[Grid]:
    """One table for each suite that has results."""
    grids = []
    for suite in SUITES:
        found = [result for result in results if result.case.suite == suite]
        if found:
            grids.append(suite_grid(suite, found))
    return grids


def outcomes(results: Sequence[CaseResult]) -> list[Outcome]:
    """Every bar's outcome."""
    return [evaluate(bar, results) for bar in BARS]


def bars_grid(found: Iterable[Outcome], everything: bool = False) -> Grid:
    """The bars that were measured, or all of them."""
    header = ["bar", "wanted", "found", "points", "missed", "worst at B, T, H", "verdict"]
    grid = Grid("Speeds to reach (a mean is a geometric mean)", header)
    for outcome in found:
        if outcome.value is None and not everything:
            continue
        grid.rows.append(
            [
                outcome.bar.name,
                outcome.bar.wanted,
                _number(outcome.value, "{:.2f}") + (outcome.bar.unit if outcome.value else ""),
                f"{outcome.measured} of {outcome.total}",
                "" if outcome.bar.geomean else str(outcome.missed),
                shape_text(outcome.worst) if outcome.worst else "",
                outcome.verdict,
            ]
        )
    return grid


def memory_grid(rows: Iterable[MemoryRow]) -> Grid:
    """Allocated bytes beside torch."""
    header = ["what", "cell", "B, T, H", "contender", "MB", "allowed", "bar"]
    grid = Grid("Memory, float32", header)
    for row in rows:
        if row.note:
            grid.notes.append(f"{row.contender}, {row.cell}: {row.note}")
            continue
        holds = row.holds
        grid.rows.append(
            [
                row.what,
                row.cell.upper(),
                f"{row.batch}, {row.time}, {row.hidden}",
                row.contender,
                _number(None if row.bytes is None else row.bytes / 1e6, "{:.1f}"),
                _number(None if row.allowed is None else row.allowed / 1e6, "{:.1f}"),
                UNKNOWN if holds is None else YES if holds else NO,
            ]
        )
    return grid
