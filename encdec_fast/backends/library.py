"""Loads the compiled libraries, and remembers what came of it.

Without them the package works on torch's own kernels; `status()` and `python -m encdec_fast info`
say what is missing and why.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch  # first: the libraries take libgomp and the C++ runtime from the copies it loaded

_PACKAGE = Path(__file__).resolve().parent.parent
_OPS = (
    "rnn_pack",
    "rnn_forward",
    "rnn_backward",
    "additive_forward",
    "additive_backward",
    "attention_forward",
    "attention_backward",
    "attention_decoder_forward",
    "attention_decoder_backward",
    "varlen_attention",
    "linear_pack",
    "linear_forward",
    "linear_product",
    "linear_backward",
    "bridge_pack",
    "bridge_forward",
)
_CUDA_OPS = ("rnn_max_clusters", "rnn_forward", "rnn_backward", "decode_step")
# A build of csrc/*_cuda.cu for the CPU, for tests (tests/cpp/gpu_on_cpu.h).
_CUDA_ON_CPU = os.environ.get("ENCDEC_FAST_CUDA_ON_CPU")
# The oldest driver for binaries of a CUDA toolkit's major version, as CUDA's release notes have it.
_DRIVERS = {12: 525, 13: 580}
_REBUILD = "build it with `make build` in a checkout, or `pip install --force-reinstall` the wheel"


@dataclass(frozen=True)
class LibraryStatus:
    """One compiled library: where it was looked for, whether it loaded, why not, what to do."""

    name: str
    path: str
    loaded: bool
    reason: str = ""
    hint: str = ""


def _load(name: str, path: Path, namespace: str, ops: Sequence[str]) -> LibraryStatus:
    """Load a library of ops, which must be there, and look for the ops that this version has."""
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        # torch only says that it could not load it; why comes before that.
        reason = str(error.__cause__ or error).strip()
        hint = f"it was made for another system, compiler or torch (here {torch.__version__}): "
        return LibraryStatus(name, str(path), False, reason, hint + _REBUILD)
    missing = [op for op in ops if not hasattr(getattr(torch.ops, namespace), op)]
    if missing:
        reason = f"it lacks {', '.join(missing)}: it is of another version of this package"
        return LibraryStatus(name, str(path), False, reason, _REBUILD)
    return LibraryStatus(name, str(path), True)


def _load_ops(path: Path) -> LibraryStatus:
    name = "libencdec_ops"
    if not path.exists():
        return LibraryStatus(name, str(path), False, "the file does not exist", _REBUILD)
    return _load(name, path, "encdec_fast_cpu", _OPS)


def _load_cuda(path: Path) -> LibraryStatus | None:
    """None where nobody would expect it: no file, and a torch without CUDA."""
    name = "libencdec_ops_cuda"
    if not path.exists():
        if torch.version.cuda is None:
            return None
        hint = "install the CUDA wheel, or build with ENCDEC_FAST_CMAKE_ARGS=-DENCDEC_CUDA=ON; "
        hint += "until then Triton and torch serve the GPU"
        return LibraryStatus(name, str(path), False, "this build has no CUDA kernels", hint)
    if torch.version.cuda is None and not _CUDA_ON_CPU:
        reason = f"torch {torch.__version__} is a build without CUDA, which these kernels need"
        hint = "install a CUDA build of torch, or the CPU wheel of encdec_fast"
        return LibraryStatus(name, str(path), False, reason, hint)
    return _load(name, path, "encdec_fast_cuda", _CUDA_OPS)


def _load_extension() -> tuple[ModuleType | None, LibraryStatus]:
    name = "encdec_fast._C"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        path = str(_PACKAGE / "_C")
        return None, LibraryStatus(name, path, False, str(error), _REBUILD)
    return module, LibraryStatus(name, str(module.__file__), True)


_ops_status = _load_ops(_PACKAGE / "lib" / "libencdec_ops.so")
extension, _extension_status = _load_extension()
_cuda_status = _load_cuda(Path(_CUDA_ON_CPU or _PACKAGE / "lib" / "libencdec_ops_cuda.so"))


def ops_reason() -> str:
    """Why the library of compiled ops is not there; empty where it is."""
    return "" if _ops_status.loaded else f"{_ops_status.name} is not loaded: {_ops_status.reason}"


def needed_driver() -> str:
    """What a machine needs to run the CUDA kernels, in words; empty for a build without them."""
    version = "" if extension is None else extension.build_info()["cuda_version"]
    if not version:
        return ""
    driver = _DRIVERS.get(int(version.split(".")[0]))
    return f"CUDA {version}" + (f" (driver {driver} or newer)" if driver else "")


@cache
def _driver_reason() -> str:
    """Why this machine's driver cannot run the CUDA kernels; asked at the first call on a GPU."""
    version = "" if extension is None else extension.build_info()["cuda_version"]
    if not version or not torch.cuda.is_available():
        return ""
    found: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    major = int(version.split(".")[0])
    if found // 1000 >= major:
        return ""
    has = f"CUDA {found // 1000}.{found % 1000 // 10}"
    return f"the GPU's driver is for {has}, and the CUDA kernels need {needed_driver()}"


def cuda_reasons(device: str, requested: bool) -> list[str]:
    """Why no CUDA kernel runs for tensors of this device; requested: the backend was asked for."""
    if _cuda_status is None:
        return ["libencdec_ops_cuda is not there: torch is a build without CUDA"]
    if not _cuda_status.loaded:
        return [f"{_cuda_status.name} is not loaded: {_cuda_status.reason}"]
    if extension is None:
        return [f"{_extension_status.name} is not loaded: {_extension_status.reason}"]
    if device == "cpu" and _CUDA_ON_CPU:
        return [] if requested else ["the kernels' tests run only where this backend is asked for"]
    if device != "cuda":
        return [f"the tensors are on {device}"]
    return [_driver_reason()] if _driver_reason() else []


def status() -> list[LibraryStatus]:
    """The state of every compiled library of the package that this installation should have."""
    return [s for s in (_ops_status, _extension_status, _cuda_status) if s is not None]
