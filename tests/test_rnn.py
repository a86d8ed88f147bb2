"""ops.rnn and nn.RNN: values, gradients, lengths."""

from __future__ import annotations

import pytest
import recurrent_checks as checks
import torch
from conftest import skip_without_native
from helpers import CASES, Case
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = pytest.mark.parametrize("kind", ["rnn_tanh", "rnn_relu"])
RAGGED = ["", "lengths", "packed"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@KINDS
def test_forward(kind: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    checks.check_forward(kind, case, dtype, backend)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@KINDS
def test_gradients(kind: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    checks.check_gradients(kind, case, dtype, backend)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@KINDS
def test_reference(kind: str, case: Case) -> None:
    checks.check_reference(kind, case)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@KINDS
def test_weight_dtype(
    kind: str, case: Case, weight_dtype: torch.dtype | str, other_backend: str
) -> None:
    checks.check_weight_dtype(kind, case, weight_dtype, other_backend)


@settings(max_examples=20, deadline=None)
@given(T=st.integers(1, 12), B=st.integers(1, 20), H=st.integers(1, 40), seed=st.integers(0, 99))
@KINDS
def test_rows(kind: str, T: int, B: int, H: int, seed: int) -> None:
    skip_without_native()
    checks.check_rows(kind, T, B, H, seed, "cpu", grad=bool(seed % 2))


@KINDS
def test_padding_is_not_read(kind: str, backend: str) -> None:
    checks.check_padding_is_not_read(kind, backend)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@KINDS
def test_rows_keep_their_nan(kind: str, backend: str, dtype: torch.dtype) -> None:
    checks.check_rows_keep_their_nan(kind, backend, dtype)


@pytest.mark.parametrize("ragged", RAGGED)
@KINDS
def test_op(kind: str, ragged: str, native: None) -> None:
    checks.check_op(kind, ragged, "cpu")


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("ragged", RAGGED)
@KINDS
def test_op_gradients(kind: str, ragged: str, name: str) -> None:
    checks.check_op_gradients(kind, ragged, name)


@KINDS
def test_double_backward(kind: str, backend: str) -> None:
    checks.check_double_backward(kind, backend)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@KINDS
def test_function(kind: str, case: Case) -> None:
    if case.ragged == "packed":
        pytest.skip("a function takes packed data and batch_sizes")
    checks.check_function(kind, case)


@KINDS
def test_runs_on(kind: str, backend: str) -> None:
    checks.check_runs_on(kind, backend)


@KINDS
def test_one_sequence_alone(kind: str, native: None) -> None:
    checks.check_alone(kind)


@KINDS
def test_sequences_over_threads(kind: str, native: None) -> None:
    checks.check_apart(kind)
