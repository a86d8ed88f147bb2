"""The checks that lstm, gru and rnn share; each file of theirs calls them with its kind."""

from __future__ import annotations

import torch
from helpers import (
    Case,
    assert_as_good,
    call,
    gradients,
    make_data,
    make_modules,
    poison,
)

from encdec_fast import use_backend


def check_forward(kind: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    """Inference is as close to float64 as torch's own, twice its error allowed."""
    truth, theirs, ours = make_modules(kind, case, dtype)
    data = make_data(kind, case, dtype)
    with torch.no_grad():
        expected = call(truth, case, data.to(torch.float64))
        torchs = call(theirs, case, data)
        with use_backend(backend):
            poison()
            results = call(ours, case, data)
    assert_as_good(results, torchs, expected, 2.0)


def check_gradients(kind: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    """Gradients of every input and parameter, three times torch's error allowed."""
    truth, theirs, ours = make_modules(kind, case, dtype)
    data = make_data(kind, case, dtype, grad=True)
    seeds = [torch.randn(r.shape) for r in call(truth, case, data.to(torch.float64))]
    expected = gradients(truth, case, data.to(torch.float64), seeds)
    torchs = gradients(theirs, case, data.to(dtype), seeds)
    with use_backend(backend):
        poison()
        results = gradients(ours, case, data.to(dtype), seeds)
    assert_as_good(results, torchs, expected, 3.0)
