"""Tries the encdec_fast that is installed, beside torch on the CPU; a wheel is tried with it.

Says for each check whether it holds; exits with 1 where one does not. It needs no GPU: of a CUDA
wheel it asks whether the kernels load, or are refused in so many words by a torch without CUDA.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor


def close(found: Tensor, wanted: Tensor, what: str) -> None:
    torch.testing.assert_close(
        found, wanted, rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}"
    )


def imports() -> str:
    import encdec_fast

    where = Path(encdec_fast.__file__)
    assert where.is_relative_to(sys.prefix), f"{where} is not of this environment"
    version = metadata.version("encdec_fast")
    assert version.partition("+")[0] == encdec_fast.__version__, version
    return f"encdec_fast {version}, torch {torch.__version__}"


def info() -> str:
    """Its exit code is 1 where torch or the wheel has CUDA and the other one has not."""
    command = [sys.executable, "-I", "-m", "encdec_fast", "info", "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode in (0, 1), result.stderr
    reasons = {lib["name"]: lib["reason"] for lib in json.loads(result.stdout)["libraries"]}
    wheel_has, torch_has = "+cu" in metadata.version("encdec_fast"), torch.version.cuda is not None
    wanted: dict[str, str | None] = {"libencdec_ops": None, "encdec_fast._C": None}
    said = ""
    if wheel_has or torch_has:
        said = reasons.get("libencdec_ops_cuda") or ""
        if wheel_has and torch_has:
            wanted["libencdec_ops_cuda"] = None
        else:
            right = "is a build without CUDA" if wheel_has else "this build has no CUDA kernels"
            assert right in said and "\n" not in said, f"libencdec_ops_cuda: {said or 'loaded'}"
            wanted["libencdec_ops_cuda"] = said
    assert reasons == wanted, reasons
    assert result.returncode == (1 if said else 0), f"exit code {result.returncode}"
    return f"exit code {result.returncode}" + (f": {said}" if said else "")


def cuda_ops() -> str:
    from encdec_fast.backends import library

    if "+cu" not in metadata.version("encdec_fast") or torch.version.cuda is None:
        return "none to load here"
    for op in library._CUDA_OPS:
        name = f"encdec_fast_cuda::{op}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
    return f"registered for CUDA: {', '.join(library._CUDA_OPS)}"


def recurrent(name: str) -> Callable[[], str]:
    def check() -> str:
        import encdec_fast

        theirs = getattr(torch.nn, name)(12, 20, num_layers=2, bidirectional=True)
        ours = getattr(encdec_fast.nn, name)(12, 20, num_layers=2, bidirectional=True)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(7, 3, 12)
        with torch.no_grad():
            backend = encdec_fast.explain(ours, x).backend
            close(ours(x)[0], theirs(x)[0], "output")
        assert backend == "cpu", f"the backend is {backend}"
        for module in (ours, theirs):
            module(x)[0].square().sum().backward()
        wanted = dict(theirs.named_parameters())
        for key, parameter in ours.named_parameters():
            close(parameter.grad, wanted[key].grad, f"gradient of {key}")
        return "forward and backward agree with torch"

    return check


def attention() -> str:
    import encdec_fast

    query, key, value = tensors = [
        torch.randn(2, 4, length, 16, requires_grad=True) for length in (9, 13, 13)
    ]
    q, k, v = copies = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    found = encdec_fast.ops.attention(query, key, value)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    close(found, wanted, "output")
    for output in (found, wanted):
        output.square().sum().backward()
    for name, ours, theirs in zip(("query", "key", "value"), tensors, copies, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        close(ours.grad, theirs.grad, f"gradient of {name}")
    return "forward and backward agree with torch"


def optimize() -> str:
    import encdec_fast

    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), layer, torch.nn.Linear(32, 5)).eval()
    x = torch.randn(3, 11, 8)
    with torch.no_grad():
        wanted = model(x)
        found = encdec_fast.optimize(model)(x)
    assert isinstance(model[0], encdec_fast.nn.Linear), type(model[0])
    close(found, wanted, "output")
    return "an optimized model agrees with itself"


CHECKS: dict[str, Callable[[], str]] = {
    "import": imports,
    "info": info,
    "CUDA ops": cuda_ops,
    "LSTM": recurrent("LSTM"),
    "GRU": recurrent("GRU"),
    "attention": attention,
    "optimize": optimize,
}


def main() -> int:
    torch.manual_seed(0)
    failed = False
    for name, check in CHECKS.items():
        try:
            print(f"  ok      {name}: {check()}")
        except Exception as error:  # whatever it is, the other checks still tell something
            failed = True
            print(f"  FAILED  {name}: {type(error).__name__}: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
