"""ops.add_norm: outputs, sums and gradients against float64, its arguments, its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from encdec_fast import BackendRefused, explain, use_backend
from encdec_fast.ops import add_norm
from encdec_fast.ops.add_norm import NORMS, reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPES = pytest.mark.parametrize(
    "shape", [(4, 3), (7, 5), (2, 3, 130), (600, 17), (3, 2048)], ids=str
)
NORM = pytest.mark.parametrize("norm", NORMS)


@pytest.fixture(params=["triton", "torch", "reference"])
def name(request: pytest.FixtureRequest) -> str:
    """Every backend of this op."""
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    found: str = request.param
    return found


def make(shape: tuple[int, ...], dtype: torch.dtype, residual: bool = True) -> list[Tensor | None]:
    """input, residual, weight and bias."""
    N = shape[-1]
    made = [torch.randn(shape) + 0.5, torch.randn(shape), 1 + torch.randn(N) / 2, torch.randn(N)]
    own: list[Tensor | None] = [tensor.to(dtype) for tensor in made]
    return own if residual else [own[0], None, own[2], own[3]]


def torchs(*tensors: Any, norm: str, eps: float = 1e-5) -> Any:
    """As torch's own functions have it."""
    input, residual, weight, bias = tensors
    total = input if residual is None else input + residual
    if norm == "layer":
        output = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    else:
        output = F.rms_norm(total, total.shape[-1:], weight, eps)
        output = output if bias is None else output + bias
    return output if residual is None else (output, total)


def run(function: Any, tensors: list[Any], **options: Any) -> list[Tensor]:
    """Results, and the gradients of all tensors when both results are used."""
    own = [None if t is None else t.detach().requires_grad_() for t in tensors]
    found = function(*own, **options)
    found = list(found) if isinstance(found, tuple) else [found]
    seeds = [torch.linspace(-1, 1, f.numel()).view(f.shape).to(f.dtype) for f in found]
    leaves = [t for t in own if t is not None]
    return [*found, *torch.autograd.grad(found, leaves, seeds)]


@DTYPES
@SHAPES
@NORM
@pytest.mark.parametrize("residual", [False, True])
def test_values_and_gradients(
    shape: tuple[int, ...], dtype: torch.dtype, norm: str, residual: bool, name: str
) -> None:
    """At most twice torch's error, three times in gradients, and two roundings."""
    tensors = make(shape, dtype, residual)
    doubles = [None if t is None else t.double() for t in tensors]
    exact = run(reference_results, doubles, norm=norm)
    theirs = run(torchs, tensors, norm=norm)
    with use_backend(name):
        found = run(add_norm, tensors, norm=norm)
    results = 2 if residual else 1
    for i, (own, their, true) in enumerate(zip(found, theirs, exact, strict=True)):
        assert own.dtype == dtype and own.shape == true.shape
        allowed = (2 if i < results else 3) * (their.double() - true).abs().max()
        floor = 2 * torch.finfo(dtype).eps * true.abs().max()
        assert (own.double() - true).abs().max() <= allowed + floor, i


def reference_results(*tensors: Any, norm: str) -> Any:
    output, total = reference(*tensors, norm=norm)
    return output if tensors[1] is None else (output, total)


@NORM
def test_reference(norm: str) -> None:
    """It is torch's in float64, where everything else is measured."""
    tensors = make((4, 9), torch.float64)
    for own, their in zip(
        run(reference_results, tensors, norm=norm), run(torchs, tensors, norm=norm), strict=True
    ):
        torch.testing.assert_close(own, their, rtol=1e-12, atol=1e-12)


@NORM
def test_without_weights(norm: str, name: str) -> None:
    input, residual, weight, bias = make((5, 12), torch.float32)
    for given in ([weight, None], [None, bias], [None, None]):
        tensors = [input, residual, *given]
        with use_backend(name):
            found = run(add_norm, tensors, norm=norm, eps=0.1)
        expected = run(torchs, tensors, norm=norm, eps=0.1)
        for own, their in zip(found, expected, strict=True):
            torch.testing.assert_close(own, their, rtol=1e-5, atol=1e-5)


def test_one_result_alone(name: str) -> None:
    """Gradients where only the output or only the sum is used."""
    for i in range(2):
        tensors = make((3, 6), torch.float32)

        def one(*own: Any, number: int = i, **options: Any) -> Tensor:
            results = add_norm(*own, **options)
            found: Tensor = results[number]
            return found + 0 * own[2].sum() + 0 * own[3].sum()

        with use_backend(name):
            found = run(one, tensors)
        with use_backend("reference"):
            expected = run(one, tensors)
        for own, their in zip(found, expected, strict=True):
            torch.testing.assert_close(own, their, rtol=1e-5, atol=1e-5)


@NORM
def test_gradients_of_any_order(norm: str, name: str) -> None:
    tensors = make((3, 5), torch.float32)
    found = []
    for backend, dtype in (("reference", torch.float64), (name, torch.float32)):
        own = [t.to(dtype).requires_grad_() for t in tensors if t is not None]
        with use_backend(backend):
            output, total = add_norm(*own, norm=norm)
            scalar = output.square().sum() + (output * total).sum()
            grads = torch.autograd.grad(scalar, own, create_graph=True)
            found.append(torch.autograd.grad(sum(g.square().sum() for g in grads), own))
    for own_grad, true in zip(found[1], found[0], strict=True):
        size = float(true.abs().max())
        assert size > 0.1
        assert (own_grad.double() - true).abs().max() <= 1e-5 * size


def test_rows_are_apart(name: str) -> None:
    tensors = make((4, 6), torch.float32)
    expected = torchs(*tensors, norm="layer")
    assert tensors[0] is not None
    tensors[0][1, 2], tensors[0][2, 0] = torch.nan, torch.inf
    with use_backend(name):
        found = add_norm(*tensors)
    for own, their in zip(found, expected, strict=True):
        torch.testing.assert_close(own[[0, 3]], their[[0, 3]])
    assert found[0][1:3].isnan().all()


def test_empty_and_strided(name: str) -> None:
    with use_backend(name):
        assert add_norm(torch.empty(0, 3)).shape == (0, 3)
        input, residual = torch.randn(6, 4).t(), torch.randn(4, 6)
        torch.testing.assert_close(
            add_norm(input, residual)[0], torchs(input, residual, None, None, norm="layer")[0]
        )


def test_autocast(name: str) -> None:
    """float32, as torch's norms."""
    tensors = make((3, 8), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), use_backend(name):
        output, total = add_norm(*tensors)
    assert output.dtype == total.dtype == torch.float32


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "norm": ({"norm": "batch"}, ValueError, "norm must be"),
    "scalar": ({"input": torch.tensor(1.0)}, RuntimeError, "rows of features"),
    "no features": ({"input": torch.empty(2, 0)}, RuntimeError, "rows of features"),
    "integers": ({"input": torch.ones(2, 4, dtype=torch.int64)}, RuntimeError, "floating-point"),
    "residual": ({"residual": torch.randn(2, 5)}, RuntimeError, "residual must have shape"),
    "weight": ({"weight": torch.randn(2)}, RuntimeError, "weight must have shape"),
    "bias": ({"bias": torch.randn(4).double()}, RuntimeError, "bias must be torch.float32"),
    "device": ({"weight": torch.randn(4, device="meta")}, RuntimeError, "on meta"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str, name: str) -> None:
    changed, error, says = BAD[bad]
    with use_backend(name), pytest.raises(error, match=says):
        add_norm(**{"input": torch.randn(2, 4), **changed})


def test_explain_and_refusals(interpreter: None) -> None:
    tensors = make((2, 5), torch.float32)
    assert explain(add_norm, *tensors).backend == "torch"
    with use_backend("triton"):
        assert explain(add_norm, *tensors).backend == "triton"
        with pytest.raises(BackendRefused, match="2048 features"):
            add_norm(torch.randn(1, 2049))
        with pytest.raises(BackendRefused, match="float64"):
            add_norm(torch.randn(1, 4).double())


@pytest.mark.parametrize("training", [False, True])
def test_op(training: bool, name: str) -> None:
    op = torch.ops.encdec_fast
    for residual in (False, True):
        tensors = make((3, 6), torch.float32, residual)
        with use_backend(name):
            if training:
                own = [None if t is None else t.requires_grad_() for t in tensors]
                opcheck(op.add_norm_train.default, (*own, "layer", 1e-5))
            else:
                opcheck(op.add_norm.default, (*tensors, "rms", 1e-5))


def test_compile() -> None:
    tensors = make((3, 6), torch.float32)
    compiled = torch.compile(add_norm, fullgraph=True)
    for own, their in zip(
        run(compiled, tensors, norm="rms"), run(torchs, tensors, norm="rms"), strict=True
    ):
        torch.testing.assert_close(own, their)
