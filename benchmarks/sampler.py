"""Times of several contenders, taken so that they can be compared.

All contenders run in one process and take turns in blocks of calls, so that a change of clock
speed or a noisy neighbour meets all of them. Before a block the sampler waits until the workers of
the last contender sleep: a thread pool that spins after its call would steal a core from the
next. The first calls of a block, which wake threads and fill caches, are dropped. Warm samples
follow each other at once; before each cold sample a buffer larger than the caches is touched.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

Call = Callable[[], object]

BLOCK_SECONDS = 0.02  # long beside a scheduler's slice, short beside a change of clock speed
BLOCK_CALLS = (3, 200)  # bounds of the calls that a block keeps
DROP_SECONDS = 1e-3
DROP_CALLS = (1, 20)
SLOW_SECONDS = 0.3  # a call from here on is a block of its own, and its first is like the others
MIN_ROUNDS, MAX_ROUNDS = 3, 40
COLD_BYTES = 96 << 20
COLD_CALLS = (3, 20)


@dataclass(frozen=True)
class Stats:
    """Median and quartiles of one contender's samples, in seconds."""

    median: float
    q1: float
    q3: float
    count: int

    @staticmethod
    def of(samples: Sequence[float]) -> Stats:
        """The statistics of at least one sample."""
        if len(samples) == 1:
            return Stats(samples[0], samples[0], samples[0], 1)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return Stats(median, q1, q3, len(samples))


def running_threads() -> int:
    """How many other threads of this process run, or would if they had a core.

    CPU time will not tell: the kernel adds a running thread's up at its ticks, 4 or 10 ms apart.
    """
    own, running = threading.get_native_id(), 0
    for task in Path("/proc/self/task").iterdir():
        try:
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        running += state == "R" and int(task.name) != own
    return running


def wait_until_quiet(limit_s: float = 3.0, step_s: float = 1e-3) -> bool:
    """Sleep until no other thread of this process runs; False when `limit_s` is over.

    Two quiet looks in a row are asked for, because one may fall between two wake-ups.
    """
    quiet, deadline = 0, time.monotonic() + limit_s
    while time.monotonic() < deadline:
        time.sleep(step_s)
        quiet = 0 if running_threads() else quiet + 1
        if quiet == 2:
            return True
    return False


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def timed(call: Call) -> float:
    """Seconds of one call."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) * 1e-9


def _clamp(value: float, bounds: tuple[int, int]) -> int:
    return int(min(max(value, bounds[0]), bounds[1]))


@dataclass
class Block:
    """How many calls a contender makes in its turn, from an estimate of one call's time."""

    call: Call
    estimate: float
    block_s: float = BLOCK_SECONDS
    samples: list[float] = field(default_factory=list)

    @property
    def drop(self) -> int:
        """Calls that open a block and are not counted."""
        if self.estimate >= SLOW_SECONDS:
            return 0
        return _clamp(DROP_SECONDS / self.estimate, DROP_CALLS)

    @property
    def keep(self) -> int:
        """Calls of a block that are counted."""
        if self.estimate >= SLOW_SECONDS:
            return 1
        return _clamp(self.block_s / self.estimate, BLOCK_CALLS)

    @property
    def seconds(self) -> float:
        """The expected time of a block."""
        return (self.drop + self.keep) * self.estimate

    def run(self) -> None:
        """One turn. It is cut short where calls take far longer than estimated."""
        limit = time.monotonic() + 4 * max(self.block_s, self.seconds)
        for _ in range(self.drop):
            self.call()
            if time.monotonic() > limit:
                break
        for kept in range(self.keep):
            if kept >= min(BLOCK_CALLS[0], self.keep) and time.monotonic() > limit:
                break
            self.samples.append(timed(self.call))


def _blocks(calls: Mapping[str, Call], block_s: float) -> dict[str, Block]:
    blocks = {}
    for name, call in calls.items():
        wait_until_quiet()
        call()
        # The fastest of a few: the first may still be waking threads, or have met another process.
        times = [timed(call)]
        while len(times) < 5 and sum(times) < block_s:
            times.append(timed(call))
        blocks[name] = Block(call, max(1e-7, min(times)), block_s)
    return blocks


def sample_warm(
    calls: Mapping[str, Call], budget_s: float, block_s: float = BLOCK_SECONDS
) -> dict[str, list[float]]:
    """Samples in seconds of each call, in rotating blocks, for about `budget_s` seconds.

    Every contender gets the same number of blocks, at least MIN_ROUNDS however long they take.
    """
    end = time.monotonic() + budget_s
    with _no_garbage_collection():
        blocks = _blocks(calls, block_s)
        order = list(blocks.values())
        for round_number in range(MAX_ROUNDS):
            cost = sum(block.seconds for block in order)
            if round_number >= MIN_ROUNDS and time.monotonic() + cost > end:
                break
            for block in order:
                wait_until_quiet()
                block.run()
            order = order[1:] + order[:1]
    return {name: block.samples for name, block in blocks.items()}


def sample_cold(calls: Mapping[str, Call], budget_s: float) -> dict[str, list[float]]:
    """Samples of calls that find their weights in memory, not in a cache.

    All threads of torch touch the buffer, because only a core itself empties its private cache.
    """
    buffer = torch.zeros(COLD_BYTES // 4)
    end = time.monotonic() + budget_s
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with _no_garbage_collection():
        for call in calls.values():
            call()
        for round_number in range(COLD_CALLS[1]):
            if round_number >= COLD_CALLS[0] and time.monotonic() > end:
                break
            for name, call in calls.items():
                buffer.add_(1.0)
                wait_until_quiet()
                samples[name].append(timed(call))
    return samples
