"""The command line of the report: which cases to measure, what to show, what to save."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks import cases, machine, measure, memory, op_cases, op_suite, results, tables
from benchmarks.cases import RnnCase
from benchmarks.peers import Peer, all_peers
from benchmarks.report import INTERRUPTED
from benchmarks.results import Run

# The columns of the widest table; a narrower terminal would cut numbers off.
WIDTH = 140
QUICK_SHAPES = ((1, 32), (1, 50), (128, 512))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def _name(text: str) -> str:
    if not results.NAME.fullmatch(text):
        raise argparse.ArgumentTypeError("a name is letters, digits, '.', '_' and '-'")
    return text


def _environment_budget() -> float | None:
    text = os.environ.get("BENCH_BUDGET_S")
    if not text:
        return None
    try:
        return _seconds(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise SystemExit(f"BENCH_BUDGET_S={text}: give a positive number of seconds") from None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.report",
        description="Measure encdec_fast beside its peers and print one table.",
    )
    kinds = top.add_subparsers(dest="kind", required=True)
    rnn = kinds.add_parser("rnn", help="LSTM, GRU and RNN beside torch, ONNX Runtime and OpenVINO")
    suites = (*cases.SUITES, "memory", "all")
    default = "default: all, or the grid alone where cells, dtypes or shapes are given"
    rnn.add_argument("--suite", nargs="+", choices=suites, help=default)
    rnn.add_argument("--cell", nargs="+", choices=cases.CELLS)
    rnn.add_argument("--dtype", nargs="+", choices=(*cases.DTYPES, "float64"))
    for name in ("batch", "time", "hidden"):
        rnn.add_argument(f"--{name}", nargs="+", type=_positive, metavar="N")
    peers = [peer.name for peer in all_peers()]
    rnn.add_argument("--peers", nargs="+", choices=peers, help="default: all that are installed")
    rnn.add_argument("--threads", type=_positive, help="default: torch's number of threads")
    rnn.add_argument("--caches", choices=("warm", "cold", "both"), default="warm")
    rnn.add_argument("--budget", type=_seconds, metavar="S", help="seconds for the whole run")
    rnn.add_argument("--quick", action="store_true", help="a few shapes, in about a minute")
    rnn.add_argument("--save", type=_name, metavar="NAME", help="write benchmarks/results/NAME.*")
    rnn.add_argument("--check", action="store_true", help="exit with 1 if a bar falls short")
    rnn.add_argument("--list", action="store_true", help="name the cases and measure nothing")
    for suite in op_cases.SUITES:
        op_suite.add_arguments(kinds.add_parser(suite, help=f"{suite} beside torch"))
    return top


def chosen_suites(options: argparse.Namespace) -> tuple[str, ...]:
    """The suites that the options ask for, "memory" among them."""
    filters = (options.cell, options.dtype, options.batch, options.time, options.hidden)
    default = ["grid"] if options.quick or any(filters) else ["all"]
    asked = options.suite or default
    return (*cases.SUITES, "memory") if "all" in asked else tuple(asked)


def chosen_cases(options: argparse.Namespace) -> list[RnnCase]:
    """The cases that the options ask for; the grid takes shapes outside the registry as well."""
    suites = chosen_suites(options)
    shapes = (options.batch, options.time, options.hidden)
    quick = QUICK_SHAPES if options.quick else (cases.BATCHES, cases.TIMES, cases.HIDDEN)
    found: list[RnnCase] = []
    if "grid" in suites:
        grid_dtypes = [d for d in options.dtype or cases.DTYPES if d in cases.DTYPES]
        sizes = [given or default for given, default in zip(shapes, quick, strict=True)]
        found += cases.custom_grid(options.cell or cases.CELLS, grid_dtypes, *sizes)
    others = [suite for suite in suites if suite != "grid"]
    return found + cases.select(others, options.cell, options.dtype, *shapes)


def _progress(console: Console) -> Progress:
    # Refreshed by hand between cases: a refreshing thread would disturb what is being timed.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
    )


def measure_all(
    run: Run, wanted: Sequence[RnnCase], peers: Sequence[Peer], progress: Progress
) -> None:
    """Measure case after case into `run`, each with its part of what is left of the budget."""
    end = time.monotonic() + run.budget_s
    costs = [measure.expected_cost(case) for case in wanted]
    task = progress.add_task("", total=len(wanted))
    for index, case in enumerate(wanted):
        progress.update(task, description=case.id)
        progress.refresh()
        part = max(0.0, end - time.monotonic()) * costs[index] / sum(costs[index:])
        caches: measure.Caches = run.caches  # type: ignore[assignment]
        result = measure.measure(case, peers, run.threads, part, caches, run.ceilings)
        run.results.append(result)
        progress.advance(task)
    progress.refresh()


def show(run: Run, console: Console) -> None:
    """Print every table of a run."""
    grids = tables.suite_grids(run.results)
    if run.memory:
        grids.append(tables.memory_grid(run.memory))
    bars = tables.bars_grid(tables.outcomes(run.results))
    if bars.rows:
        grids.append(bars)
    for grid in grids:
        console.print(grid.rich())
        for note in grid.notes:
            console.print(f"  {note}", style="dim", highlight=False, markup=False)
        console.print()


def exit_code(run: Run, check: bool) -> int:
    """130 after Ctrl-C; 1 for a wrong result of ours or, with --check, a bar that falls short."""
    if run.interrupted:
        return INTERRUPTED
    entries = [entry for result in run.results for entry in result.entries]
    bad = any(e.peer == "encdec_fast" and e.status in ("wrong", "failed") for e in entries)
    short = any(outcome.verdict == "falls short" for outcome in tables.outcomes(run.results))
    short = short or any(row.holds is False for row in run.memory)
    return 1 if bad or (check and short) else 0


def main(arguments: Sequence[str], console: Console | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(arguments)
    console = console or Console()
    if console.width < WIDTH:
        console = Console(width=WIDTH, file=console.file, force_terminal=console.is_terminal)
    if options.kind != "rnn":
        return op_suite.main(options.kind, options, arguments, console)
    wanted = chosen_cases(options)
    with_memory = "memory" in chosen_suites(options)
    if options.list:
        for case in wanted:
            console.print(case.id, highlight=False)
        return 0
    if not wanted and not with_memory:
        console.print("No case matches these options; --list shows what there is.", style="red")
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    threads = torch.get_num_threads()
    peers = [peer for peer in all_peers() if not options.peers or peer.name in options.peers]
    run = Run(
        command=shlex.join(["python", "-m", "benchmarks.report", *arguments]),
        threads=threads,
        caches=options.caches,
        budget_s=options.budget or _environment_budget() or (60.0 if options.quick else 900.0),
        machine=machine.describe_cpu(),
        versions=machine.describe_versions(peers),
        ceilings=machine.Ceilings(threads),
        planned=len(wanted),
    )
    try:
        with _progress(console) as progress:
            measure_all(run, wanted, peers, progress)
            if with_memory:
                progress.update(progress.add_task("memory", total=None), refresh=True)
                run.memory = memory.measure(threads)
    except KeyboardInterrupt:
        run.interrupted = True
    show(run, console)
    name = options.save or ("rnn" if run.interrupted and run.results else None)
    if run.interrupted:
        console.print(
            f"Interrupted after {len(run.results)} of {run.planned} cases.", style="yellow"
        )
    if name:
        for path in results.save(run, name):
            console.print(f"wrote {os.path.relpath(path)}", highlight=False)
    return exit_code(run, options.check)
