"""Selection, explain, use_backend, the environment variable, and a package without its library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CUDA_ON_CPU, skip_without_native
from helpers import KINDS, OURS, THEIRS

import encdec_fast
from encdec_fast import BackendRefused, explain, use_backend
from encdec_fast.backends import Backend, library, requested_backend, select, status

PACKAGE = Path(encdec_fast.__file__).parent


def python(
    code: str, cwd: Path = PACKAGE.parent, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter, which finds the package in `cwd`."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def backend(name: str, *reasons: str) -> Backend:
    return Backend(name, lambda call: name, lambda call: list(reasons))


def test_the_first_that_accepts_runs() -> None:
    backends = (backend("cpu", "too large"), backend("torch"), backend("reference"))
    assert select(backends, "a call").name == "torch"


def test_a_request_never_falls_back() -> None:
    backends = (backend("cpu", "too large", "too odd"), backend("torch"))
    with use_backend("cpu"), pytest.raises(BackendRefused) as refused:
        select(backends, "a call")
    assert "too large; too odd" in str(refused.value)
    assert "a call" in str(refused.value)
    with use_backend("reference"), pytest.raises(BackendRefused, match="no such backend"):
        select(backends, "a call")
    assert isinstance(refused.value, RuntimeError)


def test_nobody_accepts() -> None:
    with pytest.raises(BackendRefused, match="no backend accepts"):
        select((backend("cpu", "a"), backend("torch", "b")), "a call")


def test_selection_is_memoised() -> None:
    asked = []
    counting = Backend("cpu", lambda call: None, lambda call: asked.append(call) or [])
    for _ in range(3):
        select((counting,), "the same call")
    assert asked == ["the same call"]


def test_use_backend_nests_and_is_undone() -> None:
    assert requested_backend() is None
    with use_backend("torch"):
        with use_backend("reference"):
            assert requested_backend() == "reference"
        with use_backend(None):
            assert requested_backend() is None
        assert requested_backend() == "torch"
    assert requested_backend() is None
    with pytest.raises(ValueError, match="unknown backend 'fast'"), use_backend("fast"):
        pass


def test_a_request_belongs_to_its_thread() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(requested_backend()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_environment_variable() -> None:
    code = (
        "import torch, encdec_fast as e; m = e.nn.LSTM(3, 4);"
        "print(e.explain(m, torch.randn(2, 2, 3)).backend)"
    )
    assert python(code, ENCDEC_FAST_BACKEND="reference").stdout.strip() == "reference"
    wrong = python(code, ENCDEC_FAST_BACKEND="fast")
    assert wrong.returncode != 0
    assert "ENCDEC_FAST_BACKEND: unknown backend 'fast'" in wrong.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_what_runs_where(kind: str) -> None:
    """The cpu backend takes what it is made for; the rest lands on torch's kernel, and says why."""
    skip_without_native()

    def lands(dtype: torch.dtype, grad: bool = False, **options: Any) -> tuple[str | None, str]:
        extra = {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {}
        module = OURS[kind](3, 5, **extra, **options).to(dtype)
        with torch.set_grad_enabled(grad):
            explanation = explain(module, torch.randn(4, 2, 3).to(dtype))
        return explanation.backend, str(explanation)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert lands(dtype)[0] == "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        assert lands(dtype, grad=True, num_layers=2, bidirectional=True)[0] == "cpu"
    backend, text = lands(torch.float64)
    assert backend == "torch"
    assert "float64" in text
    assert lands(torch.float16, grad=True)[0] == "torch"
    if kind == "lstm":
        assert lands(torch.float32, proj_size=2)[0] == "cpu"
        backend, text = lands(torch.float32, grad=True, proj_size=2)
        assert backend == "torch"
        assert "proj_size" in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_call_is_torchs_own(kind: str) -> None:
    """Bit for bit, gradients too: it is torch's kernel for the whole network."""
    extra = {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {}
    options = {"num_layers": 2, "bidirectional": True, **extra}
    theirs = THEIRS[kind](3, 5, **options).double()
    ours = OURS[kind](3, 5, **options).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    assert explain(ours, x).backend == "torch"
    results, expected = ours(x)[0], theirs(x)[0]
    assert torch.equal(results, expected)
    found = torch.autograd.grad(results.sum(), list(ours.parameters()))
    truth = torch.autograd.grad(expected.sum(), list(theirs.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_explain_prints_everything() -> None:
    skip_without_native()
    module = encdec_fast.nn.GRU(3, 5, bidirectional=True)
    with torch.no_grad():
        explanation = explain(module, torch.randn(4, 2, 3), lengths=[4, 1])
    text = str(explanation)
    assert "T=4 B=2 I=3 H=5" in text
    assert "cpu: yes <- runs" in text
    assert "plan: " in text
    for name in ("cuda", "triton"):
        assert len(explanation.reasons.pop(name)) == 1
    assert explanation.reasons == {"cpu": [], "torch": [], "reference": []}
    assert explanation.call.ragged == "lengths"
    with use_backend("cpu"):
        refused = explain(module.double(), torch.randn(4, 2, 3, dtype=torch.float64))
    assert refused.backend is None
    assert "raises BackendRefused" in str(refused)
    with pytest.raises(TypeError, match="neither an op nor a module"):
        explain(torch.nn.LSTM(3, 5), torch.randn(4, 2, 3))


def test_explain_sees_what_the_call_would_see() -> None:
    module = encdec_fast.nn.LSTM(3, 5)
    x = torch.randn(4, 2, 3)
    assert explain(module, x).call.training
    with torch.inference_mode():
        assert not explain(module, x).call.training
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    assert not explain(module, x).call.training


def test_backward_runs_where_forward_ran() -> None:
    """Asked for one backend forward and for another by the time of backward."""
    skip_without_native()
    found = []
    for forward, backward in (("cpu", "reference"), ("reference", "cpu"), ("reference", None)):
        torch.manual_seed(0)
        module = encdec_fast.nn.LSTM(3, 5, bidirectional=True)
        x = torch.randn(4, 2, 3)
        with use_backend(forward):
            output = module(x)[0]
        with use_backend(backward):
            found.append(torch.autograd.grad(output.square().sum(), list(module.parameters())))
    for grads in found[1:]:
        for a, b in zip(grads, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_status() -> None:
    names = [line.name for line in status()]
    cuda = ["libencdec_ops_cuda"] if torch.version.cuda or CUDA_ON_CPU.exists() else []
    assert names == ["libencdec_ops", "encdec_fast._C", *cuda]
    for line in status():
        assert line.loaded or (line.reason and line.hint)


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, the CUDA kernels name the driver that they need."""
    module = SimpleNamespace(build_info=lambda: {"cuda_version": "13.0"})
    loaded = library.LibraryStatus("libencdec_ops_cuda", "", True)
    monkeypatch.setattr(library, "extension", module)
    monkeypatch.setattr(library, "_cuda_status", loaded)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert library.needed_driver() == "CUDA 13.0 (driver 580 or newer)"
    for version, right in ((13000, True), (13020, True), (12080, False)):
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda v=version: v, raising=False)
        library._driver_reason.cache_clear()
        reasons = library.cuda_reasons("cuda", True)
        assert right == (not reasons)
        if not right:
            assert reasons == [
                "the GPU's driver is for CUDA 12.8, and the CUDA kernels need CUDA 13.0 "
                "(driver 580 or newer)"
            ]
    library._driver_reason.cache_clear()


@pytest.mark.parametrize("kind", ["missing", "foreign", "other ops"])
def test_without_its_library(tmp_path: Path, kind: str) -> None:
    """The package works on torch's own kernels, trains, and says what is missing."""
    copy = tmp_path / "encdec_fast"
    shutil.copytree(
        PACKAGE, copy, ignore=shutil.ignore_patterns("lib", "_C*.so", "__pycache__", "*.pyi")
    )
    target = copy / "lib" / "libencdec_ops.so"
    target.parent.mkdir()
    # An editable install would find the right one, were there none here.
    (copy / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(
        b"\x7fELF, but of no machine"
    )
    if kind == "foreign":
        target.write_bytes(b"\x7fELF, but of no machine that there is")
    elif kind == "other ops":
        # A library that loads and defines something else.
        shutil.copy(Path(torch.__file__).parent / "lib" / "libshm.so", target)
    code = """
import torch, encdec_fast
from encdec_fast.backends import status
for line in status():
    assert not line.loaded and line.reason and line.hint, line
    print(line.reason)
ours = encdec_fast.nn.LSTM(3, 5, bidirectional=True)
theirs = torch.nn.LSTM(3, 5, bidirectional=True)
theirs.load_state_dict(ours.state_dict())
x = torch.randn(4, 2, 3)
explanation = encdec_fast.explain(ours, x)
assert explanation.backend == "torch", explanation
assert "libencdec_ops" in str(explanation)
assert torch.equal(ours(x)[0], theirs(x)[0])
ours(x)[0].sum().backward()
ours(x, lengths=[1, 4])
with torch.no_grad():
    encdec_fast.optimize(ours, weight_dtype="int8")(x)
    encdec_fast.nn.GRUCell(3, 5)(x[0])
"""
    result = python(code, tmp_path, ENCDEC_FAST_CUDA_ON_CPU="")
    assert result.returncode == 0, result.stderr


def test_cuda_kernels_beside_a_torch_without_cuda(tmp_path: Path) -> None:
    """The CUDA wheel beside a torch without CUDA: one clear line, and all else works."""
    skip_without_native()
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    copy = tmp_path / "encdec_fast"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "lib" / "libencdec_ops_cuda.so").write_bytes(b"never to be opened")
    code = """
import torch, encdec_fast
from encdec_fast.backends import status
assert encdec_fast.__file__.startswith(%r)
cuda = status()[-1]
assert cuda.name == "libencdec_ops_cuda" and not cuda.loaded
assert f"torch {torch.__version__} is a build without CUDA" in cuda.reason, cuda
assert "CUDA build of torch" in cuda.hint
explanation = encdec_fast.explain(encdec_fast.nn.LSTM(3, 5), torch.randn(4, 2, 3))
assert explanation.backend == "cpu" and cuda.reason in explanation.reasons["cuda"][0]
"""
    result = python(code % str(tmp_path), tmp_path, ENCDEC_FAST_CUDA_ON_CPU="")
    assert result.returncode == 0, result.stderr
