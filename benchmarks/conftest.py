"""Options of the pytest-benchmark suites."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("encdec_fast benchmarks")
    group.addoption(
        "--quick", action="store_true", help="a few shapes of each suite, in about two minutes"
    )
    group.addoption(
        "--budget",
        type=float,
        default=None,
        metavar="S",
        help="seconds for all cases together (default: BENCH_BUDGET_S, or 900; 60 with --quick)",
    )
