"""The files in benchmarks/results/: one JSON with everything, one markdown to read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import memory, tables
from benchmarks.bars import marks
from benchmarks.cases import flops
from benchmarks.machine import Ceilings
from benchmarks.measure import CaseResult, Entry
from benchmarks.memory import MemoryRow

RESULTS = Path(__file__).parent / "results"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass
class Run:
    """One run of the report: what was asked, where it ran, and what came out."""

    command: str
    threads: int
    caches: str
    budget_s: float
    machine: dict[str, Any]
    versions: dict[str, str]
    ceilings: Ceilings
    planned: int
    results: list[CaseResult] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    interrupted: bool = False

    @property
    def complete(self) -> bool:
        """Whether every planned case was measured."""
        return not self.interrupted and len(self.results) == self.planned


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def _entry(entry: Entry) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": entry.name,
        "peer": entry.peer,
        "dtype": entry.dtype,
        "role": entry.role,
        "status": entry.status,
    }
    if entry.note:
        found["note"] = entry.note
    if entry.error is not None:
        found["relative_error"] = _rounded(entry.error)
    for caches, stats in (("warm", entry.warm), ("cold", entry.cold)):
        if stats:
            found[f"{caches}_seconds"] = {
                "median": _rounded(stats.median),
                "q1": _rounded(stats.q1),
                "q3": _rounded(stats.q3),
                "samples": stats.count,
            }
    return found


def _case(result: CaseResult) -> dict[str, Any]:
    return {
        **asdict(result.case),
        "id": result.case.id,
        "flops": flops(result.case),
        "over_best_peer": _rounded(result.ratio(result.best_peer())),
        "over_torch": _rounded(result.ratio(result.seconds("torch"))),
        "gflops": _rounded(result.gflops),
        "compute_bound_seconds": _rounded(result.compute_bound),
        "read_bound_seconds": _rounded(result.read_bound),
        "share_of_ceiling": _rounded(result.share),
        "barrier_seconds": _rounded(result.barrier),
        "holds_bars": marks(result),
        "contenders": [_entry(entry) for entry in result.entries],
    }


def as_dict(run: Run) -> dict[str, Any]:
    """Everything about a run that may be published: no host name, no path."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": run.command,
        "complete": run.complete,
        "cases_measured": len(run.results),
        "cases_planned": run.planned,
        "threads": run.threads,
        "caches": run.caches,
        "budget_seconds": run.budget_s,
        "machine": run.machine,
        "versions": run.versions,
        "ceilings": run.ceilings.as_dict(),
        "bars": [
            {
                "name": outcome.bar.name,
                "wanted": outcome.bar.wanted,
                "found": _rounded(outcome.value),
                "points": outcome.measured,
                "points_in_registry": outcome.total,
                "missed": outcome.missed,
                "worst": outcome.worst.id if outcome.worst else None,
                "verdict": outcome.verdict,
            }
            for outcome in tables.outcomes(run.results)
        ],
        "memory": memory.as_dicts(run.memory),
        "cases": [_case(result) for result in run.results],
    }


def _facts(run: Run) -> list[str]:
    machine, versions = run.machine, run.versions
    caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items())
    flags = " ".join(machine["flags"])
    lines = [
        f"- command: `{run.command}`, {run.threads} threads, {run.caches} caches",
        f"- machine: {machine['cpu']} ({machine['architecture']}), {machine['cores']} cores, "
        f"{caches}, {flags}",
        "- versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    ceilings = run.ceilings.as_dict()
    peaks = [f"{kind} {rate:.0f} Gop/s" for kind, rate in ceilings["peak_gops"].items()]
    reads = [f"{rate:.0f} GB/s at {size}" for size, rate in ceilings["read_gb_per_s"].items()]
    if peaks or reads:
        lines.append("- ceilings of this run: " + ", ".join([*peaks, *reads]))
    if barrier := ceilings["barrier_ns"]:
        lines.append(
            f"- a meeting of the threads: {barrier['least']:.0f} to {barrier['most']:.0f} ns, "
            f"in the median {barrier['median']:.0f}"
        )
    if not run.complete:
        lines.append(f"- **incomplete: {len(run.results)} of {run.planned} cases**")
    return lines


def as_markdown(run: Run) -> str:
    """The tables of a run with what is needed to read them."""
    parts = [
        "# Recurrent layers beside their peers",
        "",
        *_facts(run),
        "",
        "Medians of warm calls, interleaved in one process. `× best` and `× torch`: how many times",
        "faster encdec_fast is than the best peer and than torch. `ceiling`: the part of the time",
        "that the machine's own limits (arithmetic, reading the weights) account for. `~`: the",
        "quartiles are more than 20% of the median apart. `bar`: every limit on this single point",
        "holds.",
        "",
        tables.bars_grid(tables.outcomes(run.results), everything=True).markdown(),
    ]
    parts += [grid.markdown() for grid in tables.suite_grids(run.results)]
    if run.memory:
        parts.append(tables.memory_grid(run.memory).markdown())
    return "\n".join(parts)


def save(run: Run, name: str, folder: Path | None = None) -> Sequence[Path]:
    """Write NAME.json and NAME.md; an incomplete run is NAME.partial, and replaces nothing else."""
    if not NAME.fullmatch(name):
        raise ValueError(f"a result's name is letters, digits, '.', '_' and '-': {name!r}")
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    stem = name if run.complete else f"{name}.partial"
    text = json.dumps(as_dict(run), indent=1, ensure_ascii=False)
    paths = (folder / f"{stem}.json", folder / f"{stem}.md")
    paths[0].write_text(text + "\n", encoding="utf-8")
    paths[1].write_text(as_markdown(run), encoding="utf-8")
    return paths
