"""Everything that a machine with a GPU has to say, in one command: is it right, and how fast?

    python -m benchmarks.gpu_check                      # both parts, at most nine minutes
    python -m benchmarks.gpu_check --part parity --op lstm gru
    python -m benchmarks.gpu_check --part speed --budget 120 --save NAME

parity  Each op with its options on the Triton and CUDA kernels, results and gradients in each
        dtype, against the reference in float64: at most twice the error of plain PyTorch in that
        dtype (three times for gradients), and four roundings of the largest number.
speed   Each op, forward and backward, beside its peers, which must agree with it first.
recurrence  LSTM and GRU in CUDA C++ on a grid of sizes, beside cuDNN and FlashRNN, and under
        compute-sanitizer (benchmarks/gpu_recurrence.py).
generation  Searches on the GPU: the same tokens as on the CPU; a step, and a call beside
        transformers' (benchmarks/gpu_generation.py).

Writes benchmarks/results/<gpu>-<date>.json and .md. Without a GPU, `--device cpu` runs parity: of
Triton's kernels in its interpreter, of CUDA's where ENCDEC_FAST_CUDA_ON_CPU names a library that
runs them on the CPU (`make test` builds it).

Exit codes: 0, 1 if something is wrong, 2 wrong arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import gpu_generation, gpu_recurrence
from benchmarks.gpu_cases import GpuCase, on, parity_cases, speed_cases
from benchmarks.results import NAME, RESULTS
from benchmarks.tables import Grid, time_text
from encdec_fast import use_backend
from encdec_fast.backends import BackendRefused, library

PARTS = ("parity", "speed", "recurrence", "generation")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BUDGET_S = 480.0  # of both parts: with starting and compiling below nine minutes
ROUNDS = 5


@dataclass
class Line:
    """What one case gave in one dtype. errors: of ours, over what is allowed."""

    part: str
    case: str
    dtype: str
    worst: float | None = None  # error over what is allowed; right up to 1
    problem: str = ""
    seconds: dict[str, float] = field(default_factory=dict)  # medians; ours is "encdec_fast"
    bars: dict[str, tuple[float, float]] = field(default_factory=dict)  # wanted, found

    @property
    def right(self) -> bool:
        return not self.problem and (self.worst is None or self.worst <= 1)


def results(run: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    """Results and the gradients of all leaves, for seeds that are the same everywhere.

    Where the leaves ask for none, the results alone.
    """
    found = run(*leaves)
    outputs = list(found) if isinstance(found, (tuple, list)) else [found]
    if not leaves[0].requires_grad:
        return outputs
    seeds = [
        torch.cos(torch.arange(r.numel(), dtype=torch.float64)).view(r.shape).to(r.device, r.dtype)
        for r in outputs
    ]
    return outputs + list(torch.autograd.grad(outputs, leaves, seeds, allow_unused=True))


def _parity(case: GpuCase, dtype: torch.dtype, device: torch.device) -> float:
    """The largest error of ours over what is allowed."""
    leaves = [leaf.to(dtype).double() for leaf in case.leaves()]
    with use_backend("reference"):
        exact = results(case.run, on(leaves[0].device, torch.float64, leaves, case.trains))
        plain = results(case.run, on(device, dtype, leaves, case.trains))
    with use_backend(case.backend), case.around():
        ours = results(case.run, on(device, dtype, leaves, case.trains))
    worst, count = 0.0, len(exact) - (len(leaves) if case.trains else 0)
    sizes = [true.detach().abs().max().item() for true in exact]
    if case.op == "attention":
        # Where one key has all the weight, the scores' gradients are differences of equal numbers,
        # as large as the others: what rounding leaves of them has that size.
        sizes = [max(sizes)] * len(sizes)
    for i, (true, their, own) in enumerate(zip(exact, plain, ours, strict=True)):
        true = true.detach()
        floor = 4 * torch.finfo(dtype).eps * sizes[i]

        def error(found: Tensor, true: Tensor = true) -> float:
            return (found.detach().double().cpu() - true).abs().max().item()

        allowed = (2 if i < count else 3) * error(their) + floor
        ratio = error(own) / allowed if allowed > 0 else float(error(own) > 0)
        worst = max(worst, ratio if ratio == ratio else float("inf"))  # NaN is wrong
    return worst


def _agree(case: GpuCase, found: Sequence[Tensor], right: Sequence[Tensor], dtype: str) -> str:
    """Empty, or how a contender differs from the reference in the same dtype."""
    limit = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 5e-3}[dtype]
    for i, (own, true) in enumerate(zip(found, right, strict=True)):
        scale = true.double().square().mean().sqrt().clamp_min(1e-12)
        off = ((own.double() - true.double()).square().mean().sqrt() / scale).item()
        if not off <= limit:
            return f"result {i} is off by {off:.1e}, allowed {limit:.0e}"
    return ""


def times(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Medians in seconds, in rotating rounds of some milliseconds each."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    counts = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        counts[name] = max(1, int(5e-3 / max(1e-6, _timed(call, 1, device))))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name].append(_timed(call, counts[name], device))
    return {name: statistics.median(taken) for name, taken in samples.items()}


def _timed(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds of a call, from before the first to after the last on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3 / count


def _speed(case: GpuCase, dtype: str, device: torch.device) -> Line:
    line = Line("speed", case.id, dtype)
    leaves = on(device, DTYPES[dtype], case.leaves(device=device), case.trains)
    with use_backend(case.judge):
        right = [r.detach() for r in results(case.run, leaves)]

    def ours(*given: Tensor) -> Any:
        with use_backend(case.backend), case.around():
            return case.run(*given)

    calls: dict[str, Callable[[], object]] = {}
    for name, run in {"encdec_fast": ours, **case.peers}.items():
        try:
            wrong = _agree(case, results(run, leaves), right, dtype)
        except RuntimeError as error:  # a peer that has no such kernel says so
            if name == "encdec_fast":
                raise
            wrong = str(error).splitlines()[0][:80]
        if wrong and name == "encdec_fast":
            line.problem = wrong
            return line
        if not wrong:
            calls[name] = lambda run=run: results(run, leaves)  # type: ignore[misc]
    del right
    line.seconds = times(calls, device)
    own = line.seconds["encdec_fast"]
    for peer, wanted in case.bars:
        if peer == "copy":
            moved = case.numbers_moved * leaves[0].element_size()
            line.bars["of the bandwidth of a copy"] = wanted, moved / own / _copy_rate(device)
        elif peer.endswith(" alone"):  # where nothing else of its kind takes the call
            slow = peer.removesuffix(" alone")
            kind = [name for name in line.seconds if name.startswith(slow.split()[0])]
            if kind == [slow]:
                line.bars[f"over {slow}"] = wanted, line.seconds[slow] / own
        elif theirs := [t for name, t in line.seconds.items() if name.startswith(peer)]:
            line.bars[f"over {peer}"] = wanted, min(theirs) / own
    return line


def _copy_rate(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    block = torch.empty(1 << (28 if device.type == "cuda" else 24), device=device)
    to = torch.empty_like(block)
    seconds = times({"copy": lambda: to.copy_(block)}, device)["copy"]
    return 2 * block.numel() * block.element_size() / seconds


def _cases(part: str, device: torch.device) -> Iterator[GpuCase]:
    if part == "speed":
        yield from speed_cases()
        return
    yield from parity_cases()
    if device.type == "cuda" or not library.cuda_reasons("cpu", True):
        yield from gpu_recurrence.parity_cases()


def run(
    parts: Sequence[str],
    names: Sequence[str] | None,
    device: torch.device,
    budget_s: float,
    backend: str | None = None,
) -> Iterator[Line]:
    """Lines one by one; cases that the budget has no time for are left out, and say so."""
    end = time.monotonic() + budget_s
    for part in parts:
        if part in ("generation", "recurrence"):
            if not names or part in names:
                yield from (_generation if part == "generation" else _recurrence)(device, end)
            continue
        for case in _cases(part, device):
            if (names and case.op not in names) or backend not in (None, case.backend):
                continue
            dtypes = case.dtypes if part == "parity" else case.dtypes[:2]
            for dtype in dtypes:
                if time.monotonic() > end:
                    yield Line(part, case.id, dtype, problem=_NO_TIME)
                    continue
                try:
                    if part == "parity":
                        yield Line(part, case.id, dtype, _parity(case, DTYPES[dtype], device))
                    else:
                        yield _speed(case, dtype, device)
                except Exception as error:
                    yield Line(part, case.id, dtype, problem=_said(error))


def _recurrence(device: torch.device, end: float) -> Iterator[Line]:
    """The grid of recurrences, its means, and the sanitizer; on a GPU only."""
    if device.type != "cuda":
        return
    # First: the grid takes all the time that there is.
    for tool in gpu_recurrence.TOOLS if gpu_recurrence.has_sanitizer() else ():
        line = Line("parity", f"recurrence under compute-sanitizer {tool}", "all", worst=0.0)
        left = min(150.0, end - time.monotonic())
        line.problem = gpu_recurrence.sanitize(tool, left) if left > 30 else _NO_TIME
        yield line
    ratios = []
    for point in gpu_recurrence.points():
        line = Line("speed", point.case.id, point.dtype)
        if time.monotonic() > end:
            line.problem = _NO_TIME
            yield line
            continue
        try:
            try:
                line = _speed(point.case, point.dtype, device)
            except BackendRefused:  # the planner: what serves the call then is what counts
                line = _speed(replace(point.case, backend="triton"), point.dtype, device)
                line.case += " (Triton: the planner refuses)"
            if "torch" in line.seconds:
                own = line.seconds["encdec_fast"]
                ratios.append((point, line.seconds["torch"] / own))
                if point.is_step_bar:
                    wanted = gpu_recurrence.STEPS_A_SECOND
                    line.bars["steps a second"] = wanted, point.steps / own
        except Exception as error:
            line.problem = _said(error)
        yield line
    if ratios:
        name = f"recurrence, means of {len(ratios)} points"
        yield Line("speed", name, "all", bars=gpu_recurrence.means(ratios))


def _generation(device: torch.device, end: float) -> Iterator[Line]:
    """Searches: first whether they are right, then, on a GPU, how fast."""
    for case in gpu_generation.parity_cases():
        name = f"generation, {case.name}"
        if time.monotonic() > end:
            yield Line("parity", name, "float32", problem=_NO_TIME)
            continue
        try:
            yield Line("parity", name, "float32", case.check(device))
        except Exception as error:
            yield Line("parity", name, "float32", problem=_said(error))
    if device.type != "cuda":
        return
    for speed, dtype in itertools.product(gpu_generation.speed_cases(), ("float32", "bfloat16")):
        line = Line("speed", f"generation, {speed.name}", dtype)
        if time.monotonic() > end:
            line.problem = _NO_TIME
            yield line
            continue
        try:
            whole, step = speed.calls(device, DTYPES[dtype])
            line.seconds = times(whole, device)
            own = statistics.median(step() for _ in range(ROUNDS))
            line.seconds["a step"] = own
            bars = gpu_generation.OVER_TRANSFORMERS, gpu_generation.STEPS_A_SECOND
            found = line.seconds["transformers"] / line.seconds["encdec_fast"]
            line.bars["over transformers"] = bars[0], found
            if (speed.batch, speed.beams) == (1, 1):
                line.bars["steps a second"] = bars[1], 1 / own
        except Exception as error:
            line.problem = _said(error)
        yield line

    for rows, dtype in itertools.product((1, 4, 8), ("float32", "bfloat16")):
        line = Line("speed", f"generation, a step of two LSTM layers, {rows} rows", dtype)
        try:
            if time.monotonic() > end:
                line.problem = _NO_TIME
            else:
                line.seconds = gpu_generation.recurrent_steps(device, DTYPES[dtype], rows)
        except Exception as error:
            line.problem = _said(error)
        yield line


_NO_TIME = "no time was left for it"


def _said(error: Exception) -> str:
    """One broken kernel must not hide the others."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def grids(lines: Sequence[Line]) -> list[Grid]:
    """A table for each part."""
    parity = Grid("Parity", ["case", "dtype", "error over allowed", ""])
    speed = Grid(
        "Speed, forward and where there is one backward",
        ["case", "dtype", "encdec_fast", "peers", "bars"],
    )
    for line in lines:
        if line.part == "parity":
            worst = "-" if line.worst is None else f"{line.worst:.2f}"
            parity.rows.append([line.case, line.dtype, worst, line.problem])
            continue
        peers = ", ".join(
            f"{name} {time_text(t)} ({t / line.seconds['encdec_fast']:.2f}×)"
            for name, t in line.seconds.items()
            if name != "encdec_fast"
        )
        bars = "; ".join(
            f"{found:.2f} {name} (≥ {wanted:g})" for name, (wanted, found) in line.bars.items()
        )
        own = time_text(line.seconds["encdec_fast"]) if line.seconds else line.problem
        speed.rows.append([line.case, line.dtype, own, peers, bars])
    return [grid for grid in (parity, speed) if grid.rows]


def save(name: str, facts: dict[str, Any], lines: Sequence[Line]) -> list[str]:
    """Write NAME.json and NAME.md; the names of the files."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    whole = {**facts, "lines": [asdict(line) | {"right": line.right} for line in lines]}
    text = [f"# {name}", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    texts = {
        "json": json.dumps(whole, indent=1, ensure_ascii=False) + "\n",
        "md": "\n".join([*text, *(grid.markdown() for grid in grids(lines))]),
    }
    for kind, content in texts.items():
        (RESULTS / f"{name}.{kind}").write_text(content, encoding="utf-8")
    return [os.path.relpath(RESULTS / f"{name}.{kind}") for kind in texts]


def _facts(device: torch.device, arguments: Sequence[str]) -> dict[str, Any]:
    import triton

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "none: interpreter"
    return {
        "command": " ".join(["python -m benchmarks.gpu_check", *arguments]),
        "gpu": gpu,
        "versions": f"torch {torch.__version__}, triton {triton.__version__}",
        "TF32": f"matmul {torch.backends.cuda.matmul.allow_tf32}, "
        f"cuDNN {torch.backends.cudnn.allow_tf32}",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Are the kernels right on this GPU, and how fast beside their peers?",
        epilog="exit codes: 0 all right, 1 something is wrong, 2 wrong arguments, 130 interrupted",
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--op", nargs="+", help="only these ops")
    parser.add_argument("--backend", choices=("cuda", "triton"), help="only kernels of this one")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="S", help="seconds")
    parser.add_argument("--save", metavar="NAME", help="in place of <gpu>-<date>")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    known = {case.op for case in (*parity_cases(), *speed_cases())}
    known |= {"generation", "recurrence"}
    if unknown := set(options.op or ()) - known:
        parser.error(f"no such op: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if options.save and not NAME.fullmatch(options.save):
        parser.error(f"--save {options.save!r}: letters, digits, '.', '_' and '-' only")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu runs parity in Triton's interpreter")
    if options.device == "cpu" and options.part != ["speed"]:
        # An interpreter's time says nothing.
        options.part = [part for part in options.part if part != "speed"]
    # Both sides of every comparison in float32 proper: a peer's TF32 would be another computation.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device(options.device)
    lines: list[Line] = []
    console, code = Console(stderr=True), 0
    try:
        for line in run(options.part, options.op, device, options.budget, options.backend):
            lines.append(line)
            state = "right" if line.right else f"WRONG {line.problem or f'{line.worst:.1f}'}"
            said = f"{line.part:7} {line.case} {line.dtype}: {state}"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        code = 130
    facts = _facts(device, given)
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", str(facts["gpu"])).strip("-").lower()
    name = options.save or f"{gpu}-{datetime.now(timezone.utc):%Y-%m-%d}"
    if lines and (options.save or device.type == "cuda"):
        print("wrote", *save(name if code == 0 else f"{name}.partial", facts, lines))
    out = Console()
    for grid in grids(lines):
        out.print(grid.rich()) if out.is_terminal else print(grid.markdown())
    return code or int(not all(line.right for line in lines))


if __name__ == "__main__":
    # Triton reads this when it is imported.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.exit(main())
