"""What a call allocates: peak and held bytes, beside torch.

Two views, because each is blind to something. The profiler counts every byte that passes through
torch's allocator, exactly. The growth of the resident set sees buffers of other allocators as
well; it is taken in a fresh process without the benchmark's allocator settings, whose kept pages
would hide it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import workload
from benchmarks.allocator import ALLOCATOR
from benchmarks.cases import Cell, RnnCase
from benchmarks.peers import ours

CHUNK_BYTES = 16 << 20  # what the gate buffer may take
SLACK_BYTES = 2 << 20  # pages of heap bookkeeping and stacks in a resident set
SHAPES: tuple[tuple[Cell, int, int, int], ...] = (("lstm", 32, 200, 512), ("gru", 32, 200, 512))
CONTENDERS = ("torch", "encdec_fast")


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one contender in one shape; None where that view was not possible."""

    what: str
    cell: str
    batch: int
    time: int
    hidden: int
    contender: str
    bytes: int | None
    allowed: int | None = None
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the limit holds; None where there is none, or nothing was measured."""
        if self.bytes is None or self.allowed is None:
            return None
        return self.bytes <= self.allowed


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """torch's profiler writes lines of its own straight to the file descriptor."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _memory_events(work: Callable[[], object]) -> tuple[list[int], object]:
    """Allocations (positive) and frees (negative) in order, and the result, still alive."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _silent_stderr(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profile,
    ):
        result = work()
    kineto: Any = profile.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return [event.nbytes() for event in events], result


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that a call holds at any time through torch's allocator."""
    held = peak = 0
    for size in _memory_events(work)[0]:
        held += size
        peak = max(peak, held)
    return peak


def held_bytes(work: Callable[[], object]) -> int:
    """What a call still holds when it has returned, its result included."""
    sizes, _result = _memory_events(work)
    return sum(sizes)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def resident_growth(work: Callable[[], object]) -> int:
    """How far the resident set rises above its start during a call (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    work()
    return max(0, _status_bytes("VmHWM") - before)


def _module(contender: str, work: workload.Workload) -> nn.Module:
    module = work.module_in(work.case.dtype)
    if contender == "torch":
        return module
    reason = ours.why_absent()
    if reason:
        raise RuntimeError(reason)
    return ours.optimized(module, work.case.dtype)


def _case(cell: Cell, batch: int, time: int, hidden: int, training: bool = False) -> RnnCase:
    suite = "training" if training else "grid"
    return RnnCase(suite, cell, "float32", batch, time, hidden, hidden)  # type: ignore[arg-type]


def _inference(contender: str, case: RnnCase) -> Callable[[], object]:
    work = workload.make(case)
    module, x = _module(contender, work), work.x_in(case.dtype)

    def call() -> object:
        with torch.inference_mode():
            return module(x)

    return call


def _child(contender: str, cell: Cell, batch: int, time: int, hidden: int) -> int:
    """First-call growth of the resident set; run in a process of its own."""
    _inference(contender, _case(cell, 1, 1, 16))()  # loads libraries and starts threads
    return resident_growth(_inference(contender, _case(cell, batch, time, hidden)))


def _resident_in_child(contender: str, shape: tuple[Cell, int, int, int], threads: int) -> int:
    environment = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    command = [sys.executable, "-m", "benchmarks.memory", contender, *map(str, shape)]
    done = subprocess.run(
        [*command, "--threads", str(threads)],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"the process that measures the resident set ended badly: {last}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def _shape_rows(shape: tuple[Cell, int, int, int], contender: str, threads: int) -> list[MemoryRow]:
    cell, batch, time, hidden = shape
    case = _case(*shape)
    states = 2 if cell == "lstm" else 1
    outputs = 4 * batch * hidden * (time + states)
    first = outputs + 4 * case.weights + CHUNK_BYTES
    limited = contender == "encdec_fast"

    def row(what: str, size: int, allowed: int) -> MemoryRow:
        return MemoryRow(
            what, cell, batch, time, hidden, contender, size, allowed if limited else None
        )

    call = _inference(contender, case)
    rows = [
        row("inference, first call, peak in torch's allocator", peak_bytes(call), first),
        row(
            "inference, next call, peak in torch's allocator",
            peak_bytes(call),
            outputs + CHUNK_BYTES,
        ),
    ]
    resident = _resident_in_child(contender, shape, threads)
    rows.append(
        row("inference, first call, growth of the resident set", resident, first + SLACK_BYTES)
    )
    return rows


def _held_after_forward(shape: tuple[Cell, int, int, int], contender: str) -> int:
    work = workload.make(_case(*shape, training=True))
    module, x = _module(contender, work), work.x_in("float32").requires_grad_()
    module(x)  # what is made once and kept is not what a step stores
    return held_bytes(lambda: module(x)[0])


def measure(
    threads: int, shapes: tuple[tuple[Cell, int, int, int], ...] = SHAPES
) -> list[MemoryRow]:
    """Every row; a contender that cannot run gives one row with the reason."""
    rows: list[MemoryRow] = []
    for shape in shapes:
        held: dict[str, int] = {}
        for contender in CONTENDERS:
            try:
                rows += _shape_rows(shape, contender, threads)
                held[contender] = _held_after_forward(shape, contender)
            except Exception as error:  # an absent package or a failed probe is a reason
                note = str(error).splitlines()[0] if str(error) else type(error).__name__
                rows.append(MemoryRow("not measured", *shape, contender, None, None, note))
                continue
            limit = held["torch"] if contender == "encdec_fast" and "torch" in held else None
            what = "training, held after the forward pass"
            rows.append(MemoryRow(what, *shape, contender, held[contender], limit))
    return rows


def as_dicts(rows: list[MemoryRow]) -> list[dict[str, Any]]:
    """Rows for the results file."""
    return [{**asdict(row), "holds": row.holds} for row in rows]


def main() -> None:
    """Measure one contender's resident set and print the bytes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=main.__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("cell", choices=("lstm", "gru", "rnn"))
    parser.add_argument("shape", type=int, nargs=3, metavar=("B", "T", "H"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch, time, hidden = options.shape
    print(json.dumps(_child(options.contender, options.cell, batch, time, hidden)))


if __name__ == "__main__":
    main()
