"""One case from its weights to its times: prepare, compare, and only then sample."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from benchmarks import sampler, workload
from benchmarks.cases import DType, RnnCase, flops
from benchmarks.machine import Ceilings
from benchmarks.peers import Contender, Offer, Peer
from benchmarks.sampler import Stats

Caches = Literal["warm", "cold", "both"]
Status = Literal["timed", "wrong", "failed", "absent"]
# A best peer below this is judged by our microseconds, not by the ratio.
SMALL_CALL = 20e-6


@dataclass
class Entry:
    """What became of one contender in one case. `note` is the reason when it was not timed."""

    name: str
    peer: str
    dtype: DType
    role: str
    status: Status
    note: str = ""
    error: float | None = None
    tokens: int = 0
    warm: Stats | None = None
    cold: Stats | None = None
    samples: list[float] = field(default_factory=list, repr=False)

    @property
    def seconds(self) -> float | None:
        """The median of warm calls, or of cold ones where only those were taken."""
        stats = self.warm or self.cold
        return stats.median if stats else None


@dataclass
class CaseResult:
    """All entries of a case, and what is derived from them."""

    case: RnnCase
    entries: list[Entry]
    compute_bound: float | None = None
    read_bound: float | None = None
    barrier: float | None = None  # seconds that a meeting of the threads took behind the samples

    def entry(self, name: str) -> Entry | None:
        """The timed entry of this name."""
        return next((e for e in self.entries if e.name == name and e.status == "timed"), None)

    def seconds(self, name: str) -> float | None:
        """The time of a contender, None if it has none."""
        entry = self.entry(name)
        return entry.seconds if entry else None

    def seconds_per_token(self, name: str) -> float | None:
        """The time of a contender for each real time step."""
        entry = self.entry(name)
        return entry.seconds / entry.tokens if entry and entry.seconds else None

    @property
    def ours(self) -> float | None:
        """The time of our module; in the lengths suite with `lengths=`."""
        return self.seconds("encdec_fast") or self.seconds("encdec_fast lengths")

    @property
    def kernel(self) -> float | None:
        """The time of our C++ call."""
        return self.seconds("encdec_fast C++ call")

    def best_peer(self, dtype: DType | None = None) -> float | None:
        """The fastest peer in this dtype; in the lengths suite, on the same unequal lengths."""
        wanted = dtype or self.case.dtype
        times = [
            entry.seconds
            for entry in self.entries
            if entry.role == "peer"
            and entry.dtype == wanted
            and entry.seconds is not None
            # A full contender has computed the padding too: other work, other answer.
            and entry.tokens == self.case.tokens
        ]
        return min(times, default=None)

    def ratio(self, other: float | None) -> float | None:
        """How many times faster we are than `other` seconds."""
        return other / self.ours if other and self.ours else None

    @property
    def small(self) -> bool:
        """Whether the best peer is so fast that microseconds count, not ratios."""
        best = self.best_peer()
        return best is not None and best < SMALL_CALL

    @property
    def gflops(self) -> float | None:
        """Our rate in 1e9 operations per second."""
        return flops(self.case) / self.ours / 1e9 if self.ours else None

    @property
    def bound(self) -> float | None:
        """Seconds below which no call can be on this machine."""
        known = [b for b in (self.compute_bound, self.read_bound) if b is not None]
        return max(known, default=None)

    @property
    def share(self) -> float | None:
        """The ceiling's part of our time: 1 is the best that the machine allows."""
        return self.bound / self.ours if self.bound and self.ours else None

    @property
    def share_of_peak(self) -> float | None:
        """Our rate as a part of the peak of arithmetic."""
        return self.compute_bound / self.ours if self.compute_bound and self.ours else None


def _checked(contender: Contender, right: dict[bool, dict[str, Tensor]]) -> Entry:
    entry = Entry(
        name=contender.name,
        peer=contender.peer,
        dtype=contender.dtype,
        role=contender.role,
        status="timed",
        tokens=contender.tokens,
    )
    try:
        found = contender.outputs(contender.call())
        entry.error, problem = workload.judge(
            found,
            right[contender.full],
            contender.dtype,
        )
    except Exception as error:  # whatever a peer raises, the others can still be measured
        entry.status, entry.note = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
        return entry
    if problem:
        entry.status, entry.note = "wrong", problem
    return entry


def _offer(peer: Peer, work: workload.Workload, threads: int) -> Offer:
    try:
        return peer.offer(work, threads)
    except Exception as error:  # as above
        return Offer(absent={peer.name: f"failed: {type(error).__name__}: {error}".splitlines()[0]})


def measure(
    case: RnnCase,
    peers: Sequence[Peer],
    threads: int,
    budget_s: float,
    caches: Caches = "warm",
    ceilings: Ceilings | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> CaseResult:
    """Compare all contenders with the reference, then time those that are right.

    `budget_s` covers preparation, comparison and sampling; a minimum of samples is taken anyway.
    """
    end = clock() + budget_s
    work = workload.make(case)
    right: dict[bool, dict[str, Tensor]] = {False: workload.reference(work)}
    if case.lengths:
        right[True] = workload.reference(work, full=True)
    entries: list[Entry] = []
    calls: dict[str, Callable[[], object]] = {}
    for peer in peers:
        offer = _offer(peer, work, threads)
        for name, reason in offer.absent.items():
            role = "ours" if peer.name == "encdec_fast" else "peer"
            entries.append(Entry(name, peer.name, case.dtype, role, "absent", reason))
        for contender in offer.contenders:
            entry = _checked(contender, right)
            entries.append(entry)
            if entry.status == "timed":
                calls[entry.name] = contender.call
    if calls:
        left = max(0.0, end - clock())
        part = left / 2 if caches == "both" else left
        warm = sampler.sample_warm(calls, part) if caches != "cold" else {}
        cold = sampler.sample_cold(calls, part) if caches != "warm" else {}
        for entry in entries:
            if entry.name in calls:
                entry.samples = warm.get(entry.name) or cold[entry.name]
                entry.warm = Stats.of(warm[entry.name]) if warm else None
                entry.cold = Stats.of(cold[entry.name]) if cold else None
    result = CaseResult(case, entries)
    if ceilings is not None:
        result.barrier = ceilings.sample_barrier()
        result.compute_bound = ceilings.compute_bound(case)
        result.read_bound = ceilings.read_bound(case)
    return result


def expected_cost(case: RnnCase) -> float:
    """Seconds that a case wants beside the others: building the models, then some forty calls."""
    return 0.5 + 40 * flops(case) / 2e11
