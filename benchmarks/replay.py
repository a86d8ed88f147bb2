"""Samples taken earlier, handed to pytest-benchmark as if it had taken them."""

from __future__ import annotations

from collections.abc import Iterator


class ReplayTimer:
    """A timer for pytest-benchmark that reports samples taken earlier.

    pytest-benchmark reads its timer before and after each round; every second reading is the next
    sample.
    """

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, samples: list[float]) -> None:
        """Have the next rounds last as long as these samples."""
        self._readings = (reading for sample in samples for reading in (0.0, sample))

    def __call__(self) -> float:
        return next(self._readings)


def nothing() -> None:
    """The call that each replayed round stands for; it was made when the case was measured."""
