"""ops.cross_entropy: losses and gradients against float64, its arguments, its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

import encdec_fast
from encdec_fast import BackendRefused, explain, use_backend
from encdec_fast.ops import cross_entropy
from encdec_fast.ops.cross_entropy import REDUCTIONS, reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPES = pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 128), (4, 129), (3, 9000)], ids=str)
SMOOTHING = pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])


@pytest.fixture(params=["triton", "torch", "reference"])
def name(request: pytest.FixtureRequest) -> str:
    """Every backend of this op."""
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    found: str = request.param
    return found


def make(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and targets, the last of which is ignored where there are several."""
    logits, target = 4 * torch.randn(shape), torch.randint(shape[1], shape[:1])
    if shape[0] > 1:
        target[-1] = -100
    return logits.to(dtype), target


def run(function: Any, logits: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    """The loss and the gradient of the logits."""
    own = logits.detach().requires_grad_()
    loss = function(own, *args, **options)
    seed = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape).to(loss.dtype)
    return [loss, *torch.autograd.grad(loss, own, seed)]


@DTYPES
@SHAPES
@SMOOTHING
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_values_and_gradients(
    shape: tuple[int, int], dtype: torch.dtype, smoothing: float, reduction: str, name: str
) -> None:
    """At most twice torch's error, three times in the gradient, and two roundings."""
    logits, target = make(shape, dtype)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    exact = run(F.cross_entropy, logits.double(), target, **options)
    theirs = run(F.cross_entropy, logits, target, **options)
    with use_backend(name):
        found = run(cross_entropy, logits, target, **options)
    for result, their, true, factor in zip(found, theirs, exact, (2.0, 3.0), strict=True):
        assert result.dtype == dtype and result.shape == true.shape
        allowed = factor * (their.double() - true).abs().max()
        floor = 2 * torch.finfo(dtype).eps * true.abs().max()
        assert (result.double() - true).abs().max() <= allowed + floor


def test_reference() -> None:
    """It is torch's in float64, where everything else is measured."""
    logits, target = make((6, 11), torch.float64)
    for smoothing in (0.0, 0.2):
        expected = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        found = reference(logits, target, label_smoothing=smoothing)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_gradients_of_any_order(name: str) -> None:
    logits, target = make((3, 5), torch.float32)
    found = []
    for backend, dtype in (("reference", torch.float64), (name, torch.float32)):
        own = logits.to(dtype).requires_grad_()
        with use_backend(backend):
            loss = cross_entropy(own, target, label_smoothing=0.1)
            (grad,) = torch.autograd.grad(loss, own, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), own)[0])
    torch.testing.assert_close(found[1].double(), found[0], rtol=1e-4, atol=1e-6)


def test_one_row(name: str) -> None:
    logits, target = torch.randn(9), torch.tensor(4)
    with use_backend(name):
        for reduction in REDUCTIONS:
            found = cross_entropy(logits, target, reduction=reduction)
            torch.testing.assert_close(found, F.cross_entropy(logits, target, reduction=reduction))


def test_rows_that_do_not_count(name: str) -> None:
    """Another number may mark them; if none counts, the mean is NaN and no gradient is."""
    logits, target = torch.randn(3, 5), torch.tensor([2, 7, 7])
    with use_backend(name):
        found = run(cross_entropy, logits, target, ignore_index=7, reduction="none")
        assert found[0][1:].tolist() == [0, 0] and not found[1][1:].any()
        assert cross_entropy(logits, target.clamp(max=4), ignore_index=4).isfinite()
        none = torch.full((3,), -100)
        loss, grad = run(cross_entropy, logits, none, reduction="sum")
        assert loss == 0 and not grad.any()
        assert cross_entropy(logits, none).isnan()
        empty = cross_entropy(torch.empty(0, 4), none[:0], reduction="none")
        assert empty.shape == (0,)


def test_infinities(name: str) -> None:
    """A class that is ruled out has no part; NaN and +inf stay in their rows."""
    logits = torch.randn(4, 6)
    logits[0, 1], logits[1, 2], logits[2, 3] = -torch.inf, torch.nan, torch.inf
    target = torch.tensor([0, 0, 0, 0])
    with use_backend(name):
        found = run(cross_entropy, logits, target, reduction="none")
        assert not cross_entropy(torch.full((1, 3), -torch.inf), target[:1]).isfinite()
    for result, true in zip(
        found, run(F.cross_entropy, logits, target, reduction="none"), strict=True
    ):
        assert torch.equal(result.isnan().view(4, -1).any(1), true.isnan().view(4, -1).any(1))
        torch.testing.assert_close(result[[0, 3]], true[[0, 3]])
    with use_backend(name):
        ruled_out = torch.full((1, 3), -torch.inf)
        assert (
            cross_entropy(ruled_out, target[:1]).isnan()
            == F.cross_entropy(ruled_out, target[:1]).isnan()
            or not cross_entropy(ruled_out, target[:1]).isfinite()
        )


@pytest.mark.parametrize("offset", [1e3, -1e5])
@SMOOTHING
def test_large_logits(offset: float, smoothing: float, name: str) -> None:
    """What all logits of a row have in common costs no digits beyond their own."""
    logits, target = torch.randn(8, 100) + offset, torch.randint(100, (8,))
    exact = run(F.cross_entropy, logits.double(), target, label_smoothing=smoothing)
    theirs = run(F.cross_entropy, logits, target, label_smoothing=smoothing)
    with use_backend(name):
        found = run(cross_entropy, logits, target, label_smoothing=smoothing)
    for result, their, true in zip(found, theirs, exact, strict=True):
        allowed = 3 * (their.double() - true).abs().max() + 5e-7 * true.abs().max()
        assert (result.double() - true).abs().max() <= allowed


def test_a_class_ruled_out_that_is_right(name: str) -> None:
    logits = torch.tensor([[0.5, -torch.inf, 1.0]])
    for smoothing in (0.0, 0.1):
        with use_backend(name):
            assert cross_entropy(logits, torch.tensor([1]), label_smoothing=smoothing) == torch.inf


def test_losses_may_be_changed(name: str) -> None:
    logits, target = make((4, 6), torch.float32)

    def weighed(function: Any) -> Any:
        def call(own: Tensor) -> Tensor:
            losses: Tensor = function(own, target, reduction="none")
            losses *= torch.arange(4)
            return losses

        return call

    with use_backend(name):
        found = run(weighed(cross_entropy), logits)
    torch.testing.assert_close(found, run(weighed(F.cross_entropy), logits))


def test_autocast(name: str) -> None:
    """float32, as torch's, whatever the logits have; backward may be inside of it or not."""
    logits, target = make((4, 6), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), use_backend(name):
        assert cross_entropy(logits, target).dtype == torch.float32
        loss, grad = run(cross_entropy, logits, target)
    assert F.cross_entropy(logits, target).dtype == torch.bfloat16 == grad.dtype
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), target))


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "reduction": ({"reduction": "median"}, ValueError, "reduction"),
    "smoothing": ({"label_smoothing": 1.5}, RuntimeError, "label_smoothing"),
    "rank": ({"logits": torch.randn(2, 3, 4)}, RuntimeError, "logits"),
    "no classes": ({"logits": torch.empty(2, 0)}, RuntimeError, "at least one class"),
    "integers": ({"logits": torch.ones(2, 5, dtype=torch.int64)}, RuntimeError, "floating"),
    "target's dtype": ({"target": torch.ones(2)}, RuntimeError, "int64"),
    "target's shape": ({"target": torch.ones(3, dtype=torch.int64)}, ValueError, "target"),
    "devices": ({"target": torch.ones(2, dtype=torch.int64, device="meta")}, RuntimeError, "meta"),
    "too large": ({"target": torch.tensor([1, 5])}, IndexError, "Target 5 is out of bounds"),
    "negative": ({"target": torch.tensor([-1, 0])}, IndexError, "Target -1 is out of bounds"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input(bad: str, interpreter: None) -> None:
    changed, error, says = BAD[bad]
    given = {"logits": torch.randn(2, 5), "target": torch.tensor([1, 0]), **changed}
    with use_backend("triton"), pytest.raises(error, match=says):
        cross_entropy(**given)


def test_targets_are_clamped(interpreter: None) -> None:
    """What nobody has checked, as on a GPU, reads nothing outside of its row."""
    kernels = encdec_fast.ops._triton.kernels("cross_entropy")
    logits = torch.randn(2, 5)
    losses, *_ = kernels.forward(logits, torch.tensor([99, -7]), -100, 0.0)
    expected = F.cross_entropy(logits, torch.tensor([4, 0]), reduction="none")
    torch.testing.assert_close(losses, expected)


def test_explain_and_refusals(interpreter: None) -> None:
    logits, target = make((2, 5), torch.float32)
    assert explain(cross_entropy, logits, target).backend == "torch"
    with use_backend("triton"):
        assert explain(cross_entropy, logits, target).backend == "triton"
        with pytest.raises(BackendRefused, match="float64"):
            cross_entropy(logits.double(), target)


def test_torch_runs_as_it_is() -> None:
    """Where torch's kernel runs, it is torch's function, bit for bit, gradients too."""
    logits, target = make((4, 50), torch.float32)
    found, theirs = (
        run(f, logits, target, label_smoothing=0.1) for f in (cross_entropy, F.cross_entropy)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, theirs, strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_op(training: bool, name: str) -> None:
    logits, target = make((3, 6), torch.float32)
    op = torch.ops.encdec_fast
    with use_backend(name):
        if training:
            opcheck(op.cross_entropy_train.default, (logits.requires_grad_(), target, -100, 0.1))
        else:
            opcheck(op.cross_entropy.default, (logits, target, -100, 0.0))


def test_compile() -> None:
    logits, target = make((3, 6), torch.float32)
    compiled = torch.compile(cross_entropy, fullgraph=True)
    for result, true in zip(
        run(compiled, logits, target), run(F.cross_entropy, logits, target), strict=True
    ):
        torch.testing.assert_close(result, true)


MODULES: dict[str, tuple[dict[str, Any], tuple[int, ...], Any]] = {
    "rows": ({}, (5, 7), lambda: torch.randint(7, (5,))),
    "one row": ({"reduction": "sum"}, (7,), lambda: torch.tensor(3)),
    "smoothing": ({"label_smoothing": 0.2, "reduction": "none"}, (5, 7), lambda: torch.arange(5)),
    "ignored": ({"ignore_index": 2}, (5, 7), lambda: torch.arange(5)),
    "weights": ({"weight": torch.linspace(0.1, 1, 7)}, (5, 7), lambda: torch.arange(5)),
    "probabilities": ({}, (5, 7), lambda: torch.rand(5, 7)),
    "more dimensions": ({}, (5, 7, 3), lambda: torch.randint(7, (5, 3))),
}


@pytest.mark.parametrize("case", MODULES)
def test_module(case: str, interpreter: None) -> None:
    """torch's module in every use; on Triton where its kernel takes the call, and so says it."""
    options, shape, make_target = MODULES[case]
    logits, target = torch.randn(shape), make_target()
    theirs = torch.nn.CrossEntropyLoss(**options)
    ours = encdec_fast.nn.CrossEntropyLoss(**options)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    expected = run(theirs, logits, target)
    taken = case in ("rows", "one row", "smoothing", "ignored")
    with use_backend("triton"):
        explanation = explain(ours, logits, target)
        assert (explanation.backend == "triton") == taken
        torch.testing.assert_close(run(ours, logits, target), expected)
    assert all(torch.equal(a, b) for a, b in zip(run(ours, logits, target), expected, strict=True))


def test_module_errors() -> None:
    """What does not fit is torch's to complain about."""
    for logits, target in (
        (torch.randn(2, 5), torch.tensor([1, 2, 3])),
        (torch.randn(2, 5), torch.tensor([1.0, 2.0])),
    ):
        errors = []
        for module in (torch.nn.CrossEntropyLoss(), encdec_fast.nn.CrossEntropyLoss()):
            with pytest.raises((RuntimeError, ValueError)) as raised:
                module(logits, target)
            errors.append((raised.type, str(raised.value)))
        assert errors[0] == errors[1]
