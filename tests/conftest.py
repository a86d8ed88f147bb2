"""What every test shares: seeds, a fixed number of threads, and which backends can run here."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# CUDA kernels run on tensors of the CPU (tests/cpp/gpu_on_cpu.h), where that was built.
_BUILD = Path(__file__).resolve().parents[1] / f"build/cmake-{sys.implementation.cache_tag}"
CUDA_ON_CPU = _BUILD / "tests/cpp/libencdec_ops_cuda_on_cpu.so"
if not torch.cuda.is_available() and CUDA_ON_CPU.exists():
    os.environ.setdefault("ENCDEC_FAST_CUDA_ON_CPU", str(CUDA_ON_CPU))

from encdec_fast.backends import library, use_backend  # noqa: E402

# Triton's kernels run in its interpreter, on tensors of the CPU; Triton reads this when imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

NATIVE = not library.ops_reason()
# `make test` sets it: there a library that does not load, and a missing Triton, is a failure and no
# reason to skip.
REQUIRE_NATIVE = bool(os.environ.get("ENCDEC_FAST_REQUIRE_NATIVE"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of minutes first, so that no process is left with them when the others are done."""
    items.sort(key=lambda item: item.path.name != "test_triton_report.py")


@pytest.fixture(params=["cpu", "triton"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """This package's own kernels, for ops that have both: the whole test runs on them."""
    name = provided(request)
    with use_backend(name):
        yield name


@pytest.fixture(params=["cpu", "torch", "reference"])
def other_backend(request: pytest.FixtureRequest) -> str:
    """Every backend but Triton's, for what that has no kernel of."""
    name: str = request.param
    if name == "cpu":
        skip_without_native()
    return name


@pytest.fixture(params=["cpu", "triton", "torch", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of an op that has all of them."""
    return provided(request)


def provided(request: pytest.FixtureRequest) -> str:
    """The name of a backend that is a fixture's parameter, with what it needs."""
    needs = {"cuda": "cuda_kernels", "cpu": "native", "triton": "interpreter"}
    name: str = request.param
    if name in needs:
        request.getfixturevalue(needs[name])
    return name


@pytest.fixture
def cuda_kernels() -> None:
    """For tests of CUDA kernels, on a GPU or on the CPU."""
    reasons = library.cuda_reasons("cuda" if torch.cuda.is_available() else "cpu", True)
    if reasons and not REQUIRE_NATIVE:
        pytest.skip(f"{reasons[0]}; `make test` builds what runs CUDA kernels on the CPU")
    assert not reasons, reasons[0]


@pytest.fixture
def native() -> None:
    """For tests that need the compiled library."""
    skip_without_native()


def skip_without_native() -> None:
    if not NATIVE and not REQUIRE_NATIVE:
        pytest.skip(library.ops_reason())
    assert NATIVE, library.ops_reason()


def skip_without_triton() -> None:
    there = importlib.util.find_spec("triton") is not None
    if not there and not REQUIRE_NATIVE:
        pytest.skip("Triton is not installed")
    assert there, "Triton is not installed"


@pytest.fixture
def interpreter() -> None:
    """For tests of Triton's kernels."""
    skip_without_triton()
    assert torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """The same random numbers whatever ran before, and one thread unless a test asks for more."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
