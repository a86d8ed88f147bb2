"""The machine and its ceilings, measured in the run that quotes them.

Ceilings come from `encdec_fast._C`, which has all probes or has not:

    measure_peak(format: str, threads: int) -> float                            Gop/s
    measure_read_bandwidth(bytes_per_thread: int, threads: int) -> float        GB/s
    measure_barrier(threads: int) -> float                                      ns

Without a probe every share of a ceiling is None, shown as "-".
The last is no ceiling. On a virtual machine it changes from second to second, and with it the time
of kernels whose threads meet in every step; so it is measured behind each case.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import DType, RnnCase, flops, recurrent_bytes, streamed_bytes
from benchmarks.peers.base import Peer
from benchmarks.sampler import wait_until_quiet

PROBED: tuple[DType, ...] = ("float32", "bfloat16", "int8")
PROBE_REPEATS = 3
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


def _cpuinfo(key: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else None


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text(encoding="utf-8").strip()
                for name in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def describe_cpu() -> dict[str, Any]:
    """Model, cores, flags that matter here, and cache sizes; nothing that names the host."""
    model = " ".join(
        part
        for part in (
            _cpuinfo("model name") or platform.processor() or "unknown",
            f"family {_cpuinfo('cpu family')} model {_cpuinfo('model')}",
        )
        if "None" not in part
    )
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return {
        "cpu": model,
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "caches": _caches(),
    }


def describe_versions(peers: list[Peer]) -> dict[str, str]:
    """Python and every peer; an absent peer is "not installed"."""
    found = {"python": platform.python_version()}
    for peer in peers:
        found[peer.name] = peer.version() or "not installed"
    return found


def _probe(name: str) -> Any:
    try:
        return getattr(importlib.import_module("encdec_fast._C"), name, None)
    except ImportError:
        return None


def _best(name: str, *arguments: str | int) -> float | None:
    """The highest of a few readings, as whatever disturbs a probe only lowers it."""
    probe = _probe(name)
    if probe is None:
        return None
    readings = []
    for _ in range(PROBE_REPEATS):
        wait_until_quiet()
        readings.append(float(probe(*arguments)))
    return 1e9 * max(readings)


@dataclass
class Ceilings:
    """Peaks and read bandwidths of this machine, each measured when first asked for."""

    threads: int = field(default_factory=torch.get_num_threads)
    peaks: dict[str, float | None] = field(default_factory=dict)
    bandwidths: dict[int, float | None] = field(default_factory=dict)
    barriers: list[float] = field(default_factory=list)

    def peak(self, dtype: DType) -> float | None:
        """Operations per second of the fastest multiply-add in this dtype."""
        if dtype not in PROBED:
            return None
        if dtype not in self.peaks:
            self.peaks[dtype] = _best("measure_peak", dtype, self.threads)
        return self.peaks[dtype]

    def read_bandwidth(self, bytes_per_thread: int) -> float | None:
        """Bytes per second that all threads read together, each from its own buffer."""
        size = max(4096, bytes_per_thread)
        if size not in self.bandwidths:
            self.bandwidths[size] = _best("measure_read_bandwidth", size, self.threads)
        return self.bandwidths[size]

    def sample_barrier(self) -> float | None:
        """Seconds that a meeting of the threads takes now; None for one thread."""
        probe = _probe("measure_barrier")
        if probe is None or self.threads < 2:
            return None
        wait_until_quiet()
        self.barriers.append(1e-9 * float(probe(self.threads)))
        return self.barriers[-1]

    def compute_bound(self, case: RnnCase) -> float | None:
        """Seconds that the products of a call need at the peak."""
        peak = self.peak(case.dtype)
        return flops(case) / peak if peak else None

    def read_bound(self, case: RnnCase) -> float | None:
        """Seconds that reading the weights of an inference needs, from where they fit."""
        if case.training:
            return None
        # What is read again and again: the recurrent weights; in a single step, all weights.
        again = recurrent_bytes(case) if case.time > 1 else streamed_bytes(case)
        bandwidth = self.read_bandwidth(again // self.threads)
        return streamed_bytes(case) / bandwidth if bandwidth else None

    def bound(self, case: RnnCase) -> float | None:
        """Seconds below which no call can be: the larger bound, as the two may overlap."""
        bounds = [self.compute_bound(case), self.read_bound(case)]
        known = [bound for bound in bounds if bound is not None]
        return max(known) if known else None

    def as_dict(self) -> dict[str, Any]:
        """What was measured, for the results file."""
        return {
            "peak_gops": {kind: peak / 1e9 for kind, peak in self.peaks.items() if peak},
            "read_gb_per_s": {
                f"{size >> 10} KiB per thread": bandwidth / 1e9
                for size, bandwidth in sorted(self.bandwidths.items())
                if bandwidth
            },
            "barrier_ns": {
                name: 1e9 * pick(self.barriers)
                for name, pick in (("least", min), ("median", statistics.median), ("most", max))
                if self.barriers
            },
        }
