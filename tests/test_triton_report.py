"""Every Triton kernel, compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import skip_without_triton

# One process compiles all of it, once.
pytestmark = pytest.mark.xdist_group("triton-report")
CAPABILITIES = ("8.0", "9.0", "10.0", "12.0")


def report(arguments: Sequence[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one may run the kernels in the interpreter."""
    return subprocess.run(
        [sys.executable, "-m", "encdec_fast.triton_kernels.report", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def usages(cache: Path) -> list[dict[str, Any]]:
    skip_without_triton()
    result = report(["--json"], cache)
    assert result.returncode in (0, 1), result.stderr
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def test_every_kernel_fits(usages: list[dict[str, Any]]) -> None:
    assert {one["capability"] for one in usages} == set(CAPABILITIES)
    assert not [one for one in usages if one["problem"]]
    assert all(0 < one["registers"] <= 255 and one["spills"] == 0 for one in usages)


def test_every_dtype_is_compiled(usages: list[dict[str, Any]]) -> None:
    kernels = {one["kernel"].split()[0] for one in usages}
    found = {tuple(one["kernel"].split()[:2]) for one in usages}
    assert found == {(kernel, dtype) for kernel in kernels for dtype in ("fp32", "bf16", "fp16")}


def test_the_table(usages: list[dict[str, Any]], cache: Path) -> None:
    result = report(["--capability", "9.0"], cache)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["kernel", "for", "registers", "spills", "shared", "products"]
    assert len(lines) == 1 + len(usages) // len(CAPABILITIES)
    assert report(["--capability", "1.0"], cache).returncode == 2
