"""Are the libraries of this checkout fit for the torch of the Python that runs this?

usage: check_abi.py LIBRARY     LIBRARY: libencdec_ops_cuda.so, built against whatever torch

Each question is put to a process of its own: where an ABI differs, one may crash.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TORCH = """
import torch
assert torch.version.cuda is not None, f"torch {torch.__version__} is a build without CUDA"
print(f"torch {torch.__version__} of CUDA {torch.version.cuda}")
"""
CUDA_LIBRARY = """
import sys, torch
torch.ops.load_library(sys.argv[1])  # all symbols are looked up here, not at the first call
prefix = "encdec_fast_cuda::"
found = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)]
ops = sorted(name.removeprefix(prefix) for name in found)
assert {"rnn_forward", "rnn_backward"} <= set(ops), f"of its ops there are only {ops}"
for op in ops:
    getattr(torch.ops.encdec_fast_cuda, op)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(prefix + op, "CUDA"), f"no kernel: {op}"
print("loads, and registers for CUDA:", ", ".join(ops))
"""
CPU_LIBRARY = """
from encdec_fast.backends import library
for lib in library.status():
    assert lib.loaded or lib.name == "libencdec_ops_cuda", f"{lib.name}: {lib.reason}"
print("loads, and so does _C")
"""
LSTM = """
import torch, encdec_fast
torch.manual_seed(0)
ours = encdec_fast.nn.LSTM(12, 20, num_layers=2, bidirectional=True)
theirs = torch.nn.LSTM(12, 20, num_layers=2, bidirectional=True)
theirs.load_state_dict(ours.state_dict())
x = torch.randn(7, 3, 12)
backend = encdec_fast.explain(ours, x).backend
assert backend == "cpu", f"the backend is {backend}"
for module in (ours, theirs):
    module(x)[0].square().sum().backward()
torch.testing.assert_close(ours(x)[0], theirs(x)[0], rtol=1e-4, atol=1e-5)
for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
print("forward and backward agree with torch on the CPU")
"""
QUESTIONS = {
    "torch": TORCH,
    "libencdec_ops_cuda": CUDA_LIBRARY,
    "libencdec_ops": CPU_LIBRARY,
    "LSTM": LSTM,
}


def verdict(code: int, output: str, errors: str) -> tuple[bool, str]:
    """Whether a process that ended so found no fault, and in one line what it said."""
    if code == 0:
        return True, output.strip()
    if code < 0:
        return False, f"the process was ended by signal {-code}"
    # The first exception of a chain: torch only adds that it could not load the library.
    exception = re.search(r"^[\w.]*(Error|Exception)\b.*$", errors, re.MULTILINE)
    return False, exception[0] if exception else f"exit code {code}"


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    library = Path(arguments[0]).absolute()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    sound = True
    for name, code in QUESTIONS.items():
        command = [sys.executable, "-c", code, str(library)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        holds, said = verdict(result.returncode, result.stdout, result.stderr)
        print(f"{'ok' if holds else 'FAILED':<8}{name}: {said}", flush=True)
        sound = sound and holds
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
