"""The library of CUDA kernels as it was compiled: for which GPUs, and with what they need of one.

`make test` compiles it where there is an nvcc; neither a GPU nor a CUDA build of torch is needed.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from conftest import REQUIRE_NATIVE

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / f"build/cmake-{sys.implementation.cache_tag}/libencdec_ops_cuda.so"
BINARIES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
# A multiprocessor's registers, and the threads of a block in csrc/rnn/rnn_gpu.h: one block each.
REGISTERS, THREADS = 65536, 256
# Bytes of shared memory that a block may ask for: CUDA's programming guide, compute capabilities.
SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# LSTM and GRU, forward and backward, through L2 and clusters; float32 also as multiply-adds.
RECURRENCES = 2 * 2 * 2 * (3 + 1 + 1)


@pytest.fixture(autouse=True)
def compiled() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc in PATH, so no CUDA kernels were compiled")
    if not LIBRARY.exists() and not REQUIRE_NATIVE:
        pytest.skip("the CUDA kernels have not been compiled: `make test` does")
    assert LIBRARY.exists()


def _tool(name: str) -> str:
    """Of the CUDA toolkit; Triton's package carries them, too."""
    found = shutil.which(name)
    if found is None:
        spec = importlib.util.find_spec("triton")
        assert spec is not None and spec.submodule_search_locations
        found = str(Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin" / name)
    return found


@cache
def usage() -> dict[str, dict[str, dict[str, int]]]:
    """For each binary, what each kernel uses: REG, STACK, SHARED, LOCAL."""
    command = [_tool("cuobjdump"), "--dump-resource-usage", str(LIBRARY)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, dict[str, dict[str, int]]] = {}
    arch = kernel = ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            kernel = match[1]
        elif "REG:" in line:
            numbers = re.findall(r"(\w+):(\d+)", line)
            found.setdefault(arch, {})[kernel] = {name: int(value) for name, value in numbers}
    return found


def test_it_has_binaries_of_every_gpu() -> None:
    assert set(usage()) == set(BINARIES)
    for kernels in usage().values():
        assert sum("recurrence" in name for name in kernels) == RECURRENCES


def test_it_has_ptx_for_newer_gpus() -> None:
    command = [_tool("cuobjdump"), "--list-ptx", str(LIBRARY)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = Counter(re.findall(r"\.(sm_\w+)\.ptx", text))
    assert set(found) == {"sm_90"}


@pytest.mark.parametrize("arch", BINARIES)
def test_kernels_use_what_the_planner_counts_on(arch: str) -> None:
    """Nothing spills; a block of the planner's size has its registers; shared memory is its own."""
    for name, used in usage()[arch].items():
        assert used["STACK"] == used["LOCAL"] == 0, (name, used)
        assert used["REG"] * THREADS <= REGISTERS, (name, used)
        assert used["SHARED"] <= 1024, (name, used)  # of the system's own; ours is asked for


@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plans_fit(capability: int, backward: bool, dtype: str) -> None:
    """The planner cuts what it may to what a device has, and has a plan for usual sizes."""
    from encdec_fast import _C

    largest = {90: 16, 100: 16, 120: 8}.get(capability, 0)
    clusters = [108 // blocks for blocks in range(1, largest + 1)]
    for B in (1, 3, 16, 100):
        for H in (64, 256, 300, 512):
            limits = (capability, 108, SHARED[capability], clusters)
            sizes = (0, dtype, backward, B, H, 1, 1)
            numbers, exchange, _, text, slower = _C.rnn_gpu_plan(*sizes, *limits)
            assert numbers, text
            assert not slower or (B > 3 and "reads its weights again" in slower)
            blocks, row_groups, k_groups, slice_, launch = (numbers[i] for i in (2, 3, 4, 6, 7))
            assert 32 * row_groups * k_groups <= THREADS
            assert 16 * blocks * row_groups >= H
            assert int(re.search(r"(\d+) bytes of shared", text)[1]) <= SHARED[capability]  # type: ignore[index]
            if numbers[0]:
                assert blocks <= largest and exchange == 0
            else:
                assert blocks * -(-min(launch, B) // slice_) <= 108 and exchange > 0
