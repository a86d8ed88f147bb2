"""ops.lstm and nn.LSTM: values, gradients, cell states, projections."""

from __future__ import annotations

import pytest
import recurrent_checks as checks
import torch
from helpers import CASES, PROJECTED, Case
from torch import nn

import encdec_fast
from encdec_fast import ops, use_backend

ALL = {**CASES, **PROJECTED}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_forward(case: Case, dtype: torch.dtype, backend: str) -> None:
    checks.check_forward("lstm", case, dtype, backend)
