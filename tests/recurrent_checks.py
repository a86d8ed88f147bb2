"""The checks that lstm, gru and rnn share; each file of theirs calls them with its kind."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import torch
from helpers import (
    ALONE,
    APART,
    FUNCTIONS,
    OURS,
    Case,
    Data,
    assert_as_good,
    call,
    error,
    gradients,
    make_data,
    make_modules,
    poison,
    two_threads,
)
from torch import Tensor, nn
from torch.library import opcheck

import encdec_fast
from encdec_fast import use_backend
from encdec_fast.backends import library


def check_forward(kind: str, case: Case, dtype: torch.dtype, backend: str) -> None:
    """Inference is as close to float64 as torch's own, twice its error allowed."""
    truth, theirs, ours = make_modules(kind, case, dtype)
    data = make_data(kind, case, dtype)
    with torch.no_grad():
        expected = call(truth, case, data.to(torch.float64))
        torchs = call(theirs, case, data)
        with use_backend(backend), two_threads():
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
    with use_backend(backend), two_threads():
        poison()
        results = gradients(ours, case, data.to(dtype), seeds)
    if kind == "rnn_relu" and dtype != torch.float32:
        # Where a sum is zero but for its rounding, relu's gradient is 0 or 1 as luck will have it,
        # and the largest error says nothing: the mean one does.
        assert_as_good(results, torchs, expected, 3.0, mean=True)
    else:
        assert_as_good(results, torchs, expected, 3.0)


def check_reference(kind: str, case: Case) -> None:
    """The reference itself agrees with torch's module in float64, gradients too."""
    _, theirs, ours = make_modules(kind, case, torch.float64)
    data = make_data(kind, case, torch.float64, grad=True)
    expected = call(theirs, case, data.to(torch.float64))
    seeds = [torch.randn_like(r) for r in expected]
    with use_backend("reference"):
        results = call(ours, case, data.to(torch.float64))
        grads = gradients(ours, case, data.to(torch.float64), seeds)
    torch.testing.assert_close(results, expected, rtol=1e-12, atol=1e-12)
    expected = gradients(theirs, case, data.to(torch.float64), seeds)
    torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-11)


def check_weight_dtype(kind: str, case: Case, weight_dtype: Any, backend: str) -> None:
    """Weights held in fewer bits: as good as torch's network of that kind."""
    truth, theirs, ours = make_modules(kind, case, torch.float32)
    data = make_data(kind, case, torch.float32)
    ours.weight_dtype = weight_dtype
    floor = 1e-3
    with torch.no_grad():
        expected = call(truth, case, data.to(torch.float64))
        with use_backend(backend):
            poison()
            results = call(ours, case, data)
        if weight_dtype == torch.bfloat16:
            low = call(copy.deepcopy(theirs).bfloat16(), case, data.to(torch.bfloat16))
            torchs, factor = [result.float() for result in low], 1.0
        elif _has_dynamic_int8(kind, case):
            torchs, factor = call(_dynamic_int8(theirs), case, data), 1.0
        else:
            # No peer. Activations are rounded as coarsely as weights: allow the error of rounding
            # the weights four times, and half a unit of an activation bounded by 1.
            with use_backend("torch"):
                torchs, factor, floor = call(ours, case, data), 4.0, 0.5 / 127
    for result, their, true in zip(results, torchs, expected, strict=True):
        assert error(result, true) <= factor * error(their, true) + floor


def _has_dynamic_int8(kind: str, case: Case) -> bool:
    """Torch quantizes LSTM and GRU, with biases, without projections, and only batches."""
    plain = case.batched and case.options.get("bias", True) and "proj_size" not in case.options
    return kind in ("lstm", "gru") and plain


def _dynamic_int8(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = nn.ModuleDict({"inner": copy.deepcopy(module)})
        done = torch.ao.quantization.quantize_dynamic(root, {nn.LSTM, nn.GRU}, dtype=torch.qint8)
    return done["inner"]


def check_rows(kind: str, T: int, B: int, H: int, seed: int, backend: str, grad: bool) -> None:
    """Each sequence of a batch of unequal lengths gives what it gives alone."""
    torch.manual_seed(seed)
    module = OURS[kind](3, H, bidirectional=True, batch_first=True)
    x = torch.randn(B, T, 3)
    lengths = torch.randint(1, T + 1, (B,))
    with use_backend(backend), torch.set_grad_enabled(grad):
        poison()
        output, states = module(x, lengths=lengths)
        states = states if isinstance(states, tuple) else (states,)
        for row, steps in enumerate(lengths.tolist()):
            alone, alone_states = module(x[row, :steps])
            alone_states = alone_states if isinstance(alone_states, tuple) else (alone_states,)
            torch.testing.assert_close(output[row, :steps], alone, rtol=1e-5, atol=1e-6)
            assert not output[row, steps:].any()
            for batched, single in zip(states, alone_states, strict=True):
                torch.testing.assert_close(batched[:, row], single, rtol=1e-5, atol=1e-6)


def check_padding_is_not_read(kind: str, backend: str) -> None:
    """NaN in the padding reaches no result and no gradient."""
    module = OURS[kind](3, 5, bidirectional=True)
    clean = torch.randn(6, 4, 3)
    lengths = torch.tensor([2, 6, 1, 4])
    padding = torch.arange(6).unsqueeze(1) >= lengths
    found = []
    for fill in (0.0, torch.nan):
        x = clean.masked_fill(padding.unsqueeze(2), fill).requires_grad_()
        with use_backend(backend):
            output, _ = module(x, lengths=lengths)
            found.append([output, *torch.autograd.grad(output.sum(), [x, *module.parameters()])])
    for with_zeros, with_nan in zip(*found, strict=True):
        assert torch.equal(with_zeros, with_nan)
        assert not with_nan.isnan().any()


def check_rows_keep_their_nan(kind: str, backend: str, dtype: torch.dtype) -> None:
    """NaN and inf spread as in float64, and never to another row.

    Where the processor has AMX, torch's own GRU in bfloat16 lets them into the row before.
    """
    truth, theirs, ours = make_modules(kind, Case(T=5, B=5, H=16), dtype)
    x = torch.randn(5, 5, 5).to(dtype)
    x[2, 1, 0] = torch.nan
    x[3, 3, 1] = torch.inf
    with torch.no_grad(), use_backend(backend):
        output = ours(x)[0]
        expected = truth(x.double())[0]
        by_torch = theirs(x)[0]
        clean = ours(x.nan_to_num(0.0, 0.0, 0.0))[0]
    untouched = [0, 2, 4]
    if backend == "torch" and by_torch[:, untouched].isnan().any():
        assert torch.equal(output.isnan(), by_torch.isnan())
        return
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output[:, untouched], clean[:, untouched])
    assert torch.equal(output[:2], clean[:2])


def op_arguments(
    kind: str, ragged: str, grad: bool, dtype: torch.dtype, cell_states: bool
) -> tuple[Any, ...]:
    """Arguments of the op of one layer, both directions, in the schema's order."""
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)
    shapes = [(gates * 4, 3), (gates * 4, 4), (gates * 4,), (gates * 4,)] * 2

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, requires_grad=grad)

    packed = ragged == "packed"
    batch = 3 if packed else 2
    states: list[Any] = [new(2, batch, 4) for _ in range(2 if kind == "lstm" else 1)]
    if ragged == "":
        states = [None] * len(states)
    own = {"lstm": (cell_states,), "gru": ()}.get(kind, (kind[4:],))
    return (
        new(5, 3) if packed else new(2, 2, 3),
        [new(*shape) for shape in shapes],
        *states,
        torch.tensor([1, 2]) if ragged == "lengths" else None,
        torch.tensor([3, 2]) if packed else None,
        True,
        False,
        *own,
    )


def _ops(kind: str) -> tuple[Any, Any, Any]:
    name = kind[:3] if kind.startswith("rnn") else kind
    ops = torch.ops.encdec_fast
    return tuple(getattr(ops, name + end).default for end in ("", "_train", "_backward"))  # type: ignore[return-value]


def check_op(kind: str, ragged: str, backend: str) -> None:
    """torch.library.opcheck of the three ops."""
    infer, train, backward = _ops(kind)
    with use_backend(backend):
        opcheck(infer, (*op_arguments(kind, ragged, False, torch.float32, False), ""))
        arguments = op_arguments(kind, ragged, True, torch.float32, backend != "torch")
        opcheck(train, arguments)
        with torch.no_grad():
            results = train(*arguments)
        count = 4 if kind == "lstm" else 2
        grads: list[Any] = [torch.randn_like(r, requires_grad=True) for r in results[:count]]
        grads[1] = None
        saved = (results[0], *results[3:])[-(4 if kind == "lstm" else 3) :]
        if kind != "lstm":
            saved = (results[0], *results[2:])
        opcheck(backward, (*grads, *arguments, *saved))


def check_op_gradients(kind: str, ragged: str, backend: str) -> None:
    """gradcheck and gradgradcheck of the generic op in float64."""
    _, train, _ = _ops(kind)
    cells = kind == "lstm" and backend != "torch"  # torch's kernel does not return them
    input, weights, *rest = op_arguments(kind, ragged, True, torch.float64, cells)
    count = 2 if kind == "lstm" else 1
    states, flags = rest[:count], rest[count:]
    given = [state for state in states if state is not None]

    def run(input: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, states = tensors[:8], list(tensors[8:]) or [None] * count
        results: tuple[Tensor, ...] = train(input, list(weights), *states, *flags)
        return results[: 2 + (kind == "lstm") + cells]

    tensors = (input, *weights, *given)
    with use_backend(backend):
        assert torch.autograd.gradcheck(run, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def check_double_backward(kind: str, backend: str) -> None:
    """A gradient penalty through a module, which needs the gradient of its backward."""
    found = []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, backend)):
        torch.manual_seed(0)
        module = OURS[kind](3, 6, bidirectional=True).to(dtype)
        x = torch.randn(5, 4, 3).to(dtype).requires_grad_()
        with use_backend(name):
            output = module(x)[0]
            (grad,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
            penalty = grad.square().sum()
            found.append(torch.autograd.grad(penalty, [x, *module.parameters()]))
    for exact, result in zip(*found, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-4)


def check_function(kind: str, case: Case) -> None:
    """The function gives what the module gives."""
    _, _, module = make_modules(kind, case, torch.float32)
    data: Data = make_data(kind, case, torch.float32)
    options = dict(case.options)
    if kind.startswith("rnn"):
        options["nonlinearity"] = kind[4:]
    options = {name: value for name, value in options.items() if name != "dropout"}
    expected = call(module, case, data)
    output, states = FUNCTIONS[kind](
        data.input, data.hx, list(module.parameters()), lengths=data.lengths, **options
    )
    states = states if isinstance(states, tuple) else (states,)
    for result, true in zip((output, *states), expected, strict=True):
        assert torch.equal(result, true)


def check_runs_on(kind: str, backend: str) -> None:
    """`explain` names the backend that was asked for, of functions and modules."""
    module = OURS[kind](3, 5)
    x = torch.randn(4, 2, 3)
    extra = {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {}
    weights = list(module.parameters())
    with use_backend(backend):
        assert encdec_fast.explain(module, x).backend == backend
        assert encdec_fast.explain(FUNCTIONS[kind], x, None, weights, **extra).backend == backend


def check_alone(kind: str) -> None:
    """One long sequence has its input products made beside its steps, where there are kernels."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_forward(kind, ALONE, dtype, "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        check_gradients(kind, ALONE, dtype, "cpu")
    for weight_dtype in (torch.bfloat16, "int8"):
        check_weight_dtype(kind, ALONE, weight_dtype, "cpu")
    if kind == "lstm":
        options = {"bidirectional": True, "proj_size": 40}
        check_forward(kind, Case(T=21, B=1, H=136, options=options), torch.float32, "cpu")
    module = OURS[kind](64, 256).eval()
    beside = "beside the steps"
    with use_backend("cpu"), two_threads():
        plan = encdec_fast.explain(module, torch.randn(40, 1, 64)).plan
        assert (beside in plan) == library.extension.chosen_isa().startswith("avx512"), plan
        for T, B in [(40, 2), (10, 1)]:
            plan = encdec_fast.explain(module, torch.randn(T, B, 64)).plan
            assert "time chunks" in plan and beside not in plan


def check_apart(kind: str) -> None:
    """Where sequences are shared out, not hidden units.

    A thread count changes no bit, but that sums of floats are split where few rows run.
    """
    words = "sequences over threads"
    for name, case in APART.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check_forward(kind, case, dtype, "cpu")
        for dtype in (torch.float32, torch.bfloat16):
            # Of few steps: a weight's gradient sums over all rows at once, torch's step by step.
            check_gradients(kind, replace(case, T=9), dtype, "cpu")
        module = make_modules(kind, case, torch.float32)[-1].eval()
        data = make_data(kind, case, torch.float32)
        for weight_dtype in (None, torch.bfloat16, "int8"):
            module.weight_dtype = weight_dtype
            with use_backend("cpu"), torch.no_grad():
                expected = call(module, case, data)
                with two_threads():
                    results = call(module, case, data)
            for result, true in zip(results, expected, strict=True):
                if case.ragged and weight_dtype != "int8":
                    torch.testing.assert_close(result, true, atol=2e-6, rtol=0)
                else:
                    assert torch.equal(result, true), (name, weight_dtype)
        with use_backend("cpu"), two_threads():
            x = torch.randn(case.T, case.B, case.I)
            one = OURS[kind](case.I, case.H)
            assert words in encdec_fast.explain(one, x).plan
            both = OURS[kind](case.I, case.H, bidirectional=True)
            assert words not in encdec_fast.explain(both, x).plan
            assert words not in encdec_fast.explain(one, x[:, :3]).plan
