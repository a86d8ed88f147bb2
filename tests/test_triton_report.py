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
from conftest import REQUIRE_NATIVE, skip_without_triton

CAPABILITIES = ("8.0", "9.0", "10.0", "12.0")
DTYPES = ("fp32", "bf16", "fp16")
FAMILIES = {
    "additive_attention",
    "attention",
    "attention_backward",
    "beam_search",
    "cached_attention",
    "cross_entropy",
    "gated_bridge",
    "linear",
    "log_softmax_topk",
    "recurrent",
}


def report(
    arguments: Sequence[str], cache: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    return python(["-m", "encdec_fast.triton_kernels.report", *arguments], cache, **variables)


def python(
    arguments: Sequence[str], cache: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one may run the kernels in the interpreter."""
    own = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), **variables}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=1800,
    )


def test_report(tmp_path: Path) -> None:
    """One test, so that everything is compiled once."""
    skip_without_triton()
    result = report(["--default", "--json"], tmp_path)
    assert result.returncode in (0, 1), result.stderr
    usages: list[dict[str, Any]] = json.loads(result.stdout)
    assert not [one for one in usages if one["problem"]]
    assert all(0 < one["registers"] <= 255 and one["spills"] == 0 for one in usages)
    names = {one["kernel"].split()[0] for one in usages}
    found = {(one["capability"], *one["kernel"].split()[:2]) for one in usages}
    assert found == {(c, name, dtype) for c in CAPABILITIES for name in names for dtype in DTYPES}
    assert {name.split(".")[0] for name in names} == FAMILIES

    result = report(["--default", "--capability", "9.0"], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["kernel", "for", "registers", "spills", "shared", "products"]
    assert len(lines) == 1 + len(usages) // len(CAPABILITIES)
    assert report(["--capability", "1.0"], tmp_path).returncode == 2


def test_report_with_the_oldest_triton(tmp_path: Path) -> None:
    """`make test` has it beside the environment's own, and says where."""
    where = os.environ.get("ENCDEC_FAST_OLDEST_TRITON")
    if not where and not REQUIRE_NATIVE:
        pytest.skip("ENCDEC_FAST_OLDEST_TRITON names no folder with Triton 3.6")
    assert where, "ENCDEC_FAST_OLDEST_TRITON names no folder with Triton 3.6"
    version = python(["-c", "import triton; print(triton.__version__)"], tmp_path, PYTHONPATH=where)
    assert version.stdout.startswith("3.6.")
    # Those whose registers decided the tiles.
    few = ["--capability", "8.0", "12.0"]
    result = report(["--default", "--json", *few], tmp_path, PYTHONPATH=where)
    assert result.returncode in (0, 1), result.stderr
    usages: list[dict[str, Any]] = json.loads(result.stdout)
    assert not [one for one in usages if one["problem"]]
    assert {one["kernel"].split(".")[0] for one in usages} == FAMILIES


SIZES_OF_ONE = """
from dataclasses import replace
from encdec_fast.triton_kernels import report

for family in report.FAMILIES:
    fullest = {}
    for one in family.configurations("bf16"):
        key = one.kernel.__name__, one.constants.get("CELL")
        if one.default and (key not in fullest or len(one.absent) < len(fullest[key].absent)):
            fullest[key] = one
    for one in fullest.values():
        ints = [name for name in one.kernel.arg_names if one.types.get(name) in ("i32", "i64")]
        constants = {**one.constants, **dict.fromkeys(ints, 1)}
        print(report.usage("", replace(one, constants=constants), "9.0").kernel)
"""


def test_sizes_of_one(tmp_path: Path) -> None:
    """Triton makes constants of numbers that are 1, and another kernel of each."""
    skip_without_triton()
    result = python(["-c", SIZES_OF_ONE], tmp_path)
    assert result.returncode == 0, result.stderr
    assert ".key_gradients_kernel bf16" in result.stdout
    assert result.stdout.count(".backward_kernel bf16") >= 4  # of each cell, at least
