"""What `gpu_check` asks of the recurrences in CUDA C++ (csrc/rnn/recurrence.cuh).

parity     LSTM and GRU with their options, through a cluster and through L2, whatever the planner
           would choose.
speed      Whole layers beside cuDNN, and FlashRNN where it is installed, on a grid of sizes,
           forward alone and with backward; then the means over the grid.
sanitizer  The parity cases again under NVIDIA's compute-sanitizer: reads and writes out of bounds,
           and threads of a block that race.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_cases import GpuCase, lengths_of, recurrent
from encdec_fast.ops import _recurrent_cuda

TOOLS = ("memcheck", "racecheck", "synccheck")
B, T, H = (1, 8, 16, 64, 128), (64, 512, 1024), (256, 512, 768, 1024)
DTYPES = ("bfloat16", "float16", "float32")
# Over cuDNN, or the peer that is named: at every point, and in the geometric mean.
FORWARD, FORWARD_MEAN, BACKWARD_MEAN, GRU_MEAN, FLASH_RNN = 1.0, 1.5, 1.2, 2.0, 2.0
STEPS_A_SECOND = 1e6  # of an LSTM in bfloat16, 16 sequences, 512 hidden units


def parity_cases() -> Iterator[GpuCase]:
    """At sizes that fill no tile and at some that do, with every option; each form by itself."""
    sizes: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((5, 3, 4, 33, False), {"states": False}),
        ((6, 19, 16, 64, True), {"states": True, "lengths": lengths_of(6, 19)}),
        ((4, 1, 8, 72, True), {"states": True}),
        ((3, 40, 8, 136, False), {"states": True, "lengths": lengths_of(3, 40)}),
    ]
    for kind, clusters, (size, options) in itertools.product(("lstm", "gru"), (True, False), sizes):
        case = recurrent(kind, *size, **options)
        form = "clusters" if clusters else "L2"
        yield replace(
            case,
            name=f"CUDA through {form}, {case.name}",
            backend="cuda",
            around=contextlib.nullcontext if clusters else without_clusters,
        )


@contextlib.contextmanager
def without_clusters() -> Iterator[None]:
    """The planner is told that the device has none."""
    real = _recurrent_cuda.limits
    with mock.patch.object(
        _recurrent_cuda, "limits", lambda device: real(device)._replace(clusters=())
    ):
        yield


@dataclass(frozen=True)
class Point:
    """A layer of the grid: what is timed, and in which dtype."""

    case: GpuCase
    dtype: str
    kind: str
    backward: bool
    is_step_bar: bool
    steps: int


def points() -> Iterator[Point]:
    """The grid, in an order that gives each dtype and size something early."""
    for t, dtype, backward, kind in itertools.product(T, DTYPES, (False, True), ("lstm", "gru")):
        for h, b in itertools.product(H, B):
            case = recurrent(kind, t, b, h, h, False, states=False)
            bars = () if backward else (("torch", FORWARD),)
            if kind == "lstm" and not backward:
                bars += (("FlashRNN", FLASH_RNN),)
            case = replace(
                case,
                name=f"{'with backward' if backward else 'forward'}, T={t} B={b} I=H={h}",
                backend="cuda",
                bars=bars,
                trains=backward,
                # A loop over a thousand steps would take longer than all that is measured.
                judge="reference" if t == T[0] else "torch",
            )
            is_step_bar = (kind, dtype, b, h, backward) == ("lstm", "bfloat16", 16, 512, False)
            yield Point(case, dtype, kind, backward, is_step_bar, t)


def means(found: Sequence[tuple[Point, float]]) -> dict[str, tuple[float, float]]:
    """(wanted, found) of geometric means over points; found: ratios over cuDNN."""
    groups = {
        "forward, geometric mean over cuDNN": (FORWARD_MEAN, lambda p: not p.backward),
        "with backward, geometric mean over cuDNN": (BACKWARD_MEAN, lambda p: p.backward),
        "GRU forward, geometric mean over cuDNN": (
            GRU_MEAN,
            lambda p: p.kind == "gru" and not p.backward,
        ),
    }
    result = {}
    for name, (wanted, takes) in groups.items():
        ratios = [ratio for point, ratio in found if takes(point)]
        if ratios:
            result[name] = wanted, math.exp(sum(map(math.log, ratios)) / len(ratios))
    return result


def sanitize(tool: str, seconds: float) -> str:
    """Run the parity cases under a tool of compute-sanitizer; empty, or what it found."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "7"]
    command += ["--kernel-name", "kns=recurrence", sys.executable, "-m", "benchmarks.gpu_check"]
    command += ["--part", "parity", "--backend", "cuda", "--save", f"sanitizer-{tool}"]
    try:
        # Blocks of torch's own allocator lie side by side: past the end of one is the next.
        env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env=env
        )
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    if done.returncode == 0:
        return ""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "=====" in line]
    return (lines[0] if lines else done.stderr.strip()[-200:]) or f"exit code {done.returncode}"


def has_sanitizer() -> bool:
    return shutil.which("compute-sanitizer") is not None and torch.cuda.is_available()
