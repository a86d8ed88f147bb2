"""Tiles of the Triton kernels by name: the default, a device's own, and those that are tried."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import skip_without_triton

from benchmarks import gpu_tune
from benchmarks.gpu_cases import GpuCase
from encdec_fast import ops, use_backend
from encdec_fast.ops import _triton

pytestmark = pytest.mark.usefixtures("interpreter")
H200 = torch.device("cuda", 0)


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The tiles of a device that is named, with an empty folder for what is found on it."""
    skip_without_triton()
    module = _triton.kernels("_tuning")
    monkeypatch.setattr(module, "TUNED", tmp_path)
    monkeypatch.setattr(module, "_name", lambda index: "NVIDIA H200 (test)")
    module._found.cache_clear()
    yield module
    module._found.cache_clear()


def test_every_tile_is_used_by_its_name() -> None:
    """Names, sizes that may change, and an op whose cases tune them."""
    tuning = _triton.kernels("_tuning")
    report = _triton.kernels("report")
    for _, name, default in gpu_tune.tiles():
        assert any(name.startswith(op) for op in gpu_tune.OPS)
        others = tuning.candidates(default)
        assert default not in others and len(others) >= 5
        assert all(own.keys() == default.keys() for own in others)
        assert len({json.dumps(own) for own in others}) == len(others)
        for own in others:
            sizes = {key: own[key] for key in own.keys() & tuning.LEAST.keys()}
            assert all(tuning.LEAST[key] <= size <= tuning.MOST for key, size in sizes.items())
    for family in report.FAMILIES:
        with tuning.listening() as asked:
            for dtype in report.TYPES:
                list(family.configurations(dtype))
        assert asked == set(getattr(family, "TILES", {})), family.__name__


def test_a_file_of_a_device(tuning: Any, tmp_path: Path) -> None:
    """What was found on it goes before the default, name by name, and only there."""
    default = {"ROWS": 32, "COLUMNS": 32, "num_warps": 4}
    assert tuning.tile("gated_bridge", default, H200) == default
    assert gpu_tune.write("NVIDIA H200 (test)", {"gated_bridge": {**default, "ROWS": 64}})
    assert gpu_tune.write("NVIDIA H200 (test)", {"other": default})
    (file,) = tmp_path.iterdir()
    assert file.name == "nvidia-h200-test.json"
    kept = json.loads(file.read_text())
    assert set(kept) == {"device", "versions", "command", "tiles"}
    assert set(kept["tiles"]) == {"gated_bridge", "other"}
    tuning._found.cache_clear()
    assert tuning.tile("gated_bridge", default, H200)["ROWS"] == 64
    assert tuning.tile("third", default, H200) == default
    assert tuning.tile("gated_bridge", default, torch.device("cpu")) == default
    assert tuning.tile("gated_bridge", default) == default


def bridge() -> torch.Tensor:
    torch.manual_seed(0)
    shapes = ((50, 40), (50, 24), (40, 64), (40, 24), (40,))
    found: torch.Tensor = ops.gated_bridge(*(torch.randn(shape) / 4 for shape in shapes))
    return found


def test_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers take what is tried, and right it is."""
    tuning, kernels = _triton.kernels("_tuning"), _triton.kernels("gated_bridge")
    grids: list[Any] = []
    kernel = kernels.forward_kernel

    class Listening:
        def __getitem__(self, grid: Any) -> Any:
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, "forward_kernel", Listening())
    with use_backend("triton"):
        expected = bridge()
        with tuning.trying("gated_bridge", {"ROWS": 16, "COLUMNS": 16, "num_warps": 4}):
            found = bridge()
        bridge()
    assert grids == [(2 * 2,), (3 * 4,), (2 * 2,)]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("faster", "kept"), [(0.5, True), (0.99, False)])
def test_tune(faster: float, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest candidate, where it is so by more than what one run differs from the next."""
    shapes = ((5, 16), (5, 16), (16, 32), (16, 16), (16,))
    case = GpuCase("gated_bridge", "small", shapes, ops.gated_bridge)
    default = _triton.kernels("gated_bridge").TILES["gated_bridge"]
    others = _triton.kernels("_tuning").candidates(default)[:3]
    monkeypatch.setattr(gpu_tune, "speed_cases", lambda: [case])
    monkeypatch.setattr(gpu_tune, "fitting", lambda *given: others)
    ran: list[int] = []

    def times(calls: dict[str, Any], device: torch.device) -> dict[str, float]:
        for call in calls.values():
            call()
        ran.append(len(calls))
        return {"0": 1.0, "1": 1.2, "2": faster, "3": 0.999}

    monkeypatch.setattr(gpu_tune, "times", times)
    best = gpu_tune.tune(0, "gated_bridge", default, torch.device("cpu"))
    assert ran == [4, 4] and best == (others[1] if kept else default)
    with pytest.raises(RuntimeError, match="no case"):
        gpu_tune.tune(0, "attention forward, half plain, 64", default, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_tune.main([])
    assert stopped.value.code == 2
    assert "there is no GPU here" in capfd.readouterr().err
