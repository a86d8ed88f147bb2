"""The modules as drop-in replacements: everything but the numbers, which other files check."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import Any

import pytest
import torch
from conftest import skip_without_native
from helpers import CASES, KINDS, OURS, THEIRS, Case, assert_as_good, call, make_data, make_modules
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import encdec_fast
from encdec_fast import use_backend

ALL = pytest.mark.parametrize("kind", KINDS)
I, H = 5, 7


def extra(kind: str) -> dict[str, Any]:
    return {"nonlinearity": kind[4:]} if kind.startswith("rnn") else {}


def pair(kind: str, **options: Any) -> tuple[Any, Any]:
    """(torch's module, ours), with the same weights."""
    theirs = THEIRS[kind](I, H, **extra(kind), **options)
    ours = OURS[kind](I, H, **extra(kind), **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def flat(results: Any) -> list[Tensor]:
    """The tensors of (output, states)."""
    output, states = results[:2]
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(states if isinstance(states, tuple) else (states,))]


@ALL
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same_parameters_from_the_same_seed(kind: str, case: Case) -> None:
    torch.manual_seed(3)
    theirs = THEIRS[kind](**case.arguments(kind))
    torch.manual_seed(3)
    ours = OURS[kind](**case.arguments(kind))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name])
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))
    theirs.load_state_dict(ours.state_dict(), strict=True)


@ALL
def test_hooks(kind: str) -> None:
    _, module = pair(kind)
    seen: list[str] = []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    module(torch.randn(4, 2, I, requires_grad=True))[0].sum().backward()
    assert seen == ["before", "after", "backward"]


@ALL
def test_deepcopy_and_pickle(kind: str) -> None:
    _, module = pair(kind, num_layers=2, bidirectional=True)
    x = torch.randn(4, 2, I)
    buffer = io.BytesIO()
    with torch.no_grad():
        expected = module(x)[0]
        torch.save(module, buffer)
        buffer.seek(0)
        for other in (
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            torch.load(buffer, weights_only=False),
        ):
            assert type(other) is type(module)
            assert torch.equal(other(x)[0], expected)


@ALL
def test_to(kind: str) -> None:
    _, module = pair(kind)
    x = torch.randn(4, 2, I)
    with torch.no_grad():
        expected = module(x)[0]
        for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
            module.to(dtype)
            output = module(x.to(dtype))[0]
            assert output.dtype == dtype
            torch.testing.assert_close(output.float(), expected, rtol=0.0, atol=0.05)


@ALL
def test_functional_call_and_stateless_weights(kind: str) -> None:
    theirs, ours = pair(kind)
    x = torch.randn(4, 2, I)
    other = {name: torch.randn_like(p, requires_grad=True) for name, p in ours.named_parameters()}
    found = []
    for module in (theirs, ours):
        output = torch.func.functional_call(module, other, (x,))[0]
        found.append([output, *torch.autograd.grad(output.sum(), list(other.values()))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@ALL
def test_dropout(kind: str) -> None:
    """None in eval; between layers only; equal in distribution; with p=1 exactly torch's."""
    theirs, ours = pair(kind, num_layers=2, dropout=1.0)
    x = torch.randn(4, 2, I)
    for a, b in zip(flat(ours(x)), flat(theirs(x)), strict=True):
        torch.testing.assert_close(a, b)
    theirs, ours = pair(kind, num_layers=2, dropout=0.5)
    torch.testing.assert_close(ours.eval()(x)[0], theirs.eval()(x)[0])
    ours.train(), theirs.train()
    first, second = ours(x)[0], ours(x)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    first = ours(x)[0]
    torch.manual_seed(5)
    assert torch.equal(first, ours(x)[0])
    with torch.no_grad():
        many = torch.randn(1, 1, I).expand(1, 4000, I)
        ours_mean, theirs_mean = ours(many)[0].mean(1), theirs(many)[0].mean(1)
    torch.testing.assert_close(ours_mean, theirs_mean, rtol=0.0, atol=0.02)


@ALL
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_packed_sequence(
    kind: str, enforce_sorted: bool, grad: bool, states: bool, backend: str
) -> None:
    """PackedSequence in, PackedSequence out, with torch's order in everything."""
    theirs, ours = pair(kind, num_layers=2, bidirectional=True)
    lengths = [6, 5, 5, 2, 1] if enforce_sorted else [2, 6, 1, 5, 5]
    x = torch.randn(6, 5, I)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)
    hx: Any = None
    if states:
        hx = torch.randn(4, 5, H)
        hx = (hx, torch.randn(4, 5, H)) if kind == "lstm" else hx
    with torch.set_grad_enabled(grad), use_backend(backend):
        expected, results = theirs(packed, hx), ours(packed, hx)
    assert isinstance(results[0], PackedSequence)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        a, b = getattr(results[0], name), getattr(expected[0], name)
        assert (a is None and b is None) or torch.equal(a, b)
    for result, true in zip(flat(results), flat(expected), strict=True):
        torch.testing.assert_close(result, true, rtol=1e-5, atol=1e-6)


def test_packed_without_permutation() -> None:
    theirs, ours = pair("gru")
    packed = pack_sequence([torch.randn(4, I), torch.randn(2, I)])
    packed = PackedSequence(packed.data, packed.batch_sizes)
    assert packed.sorted_indices is None
    torch.testing.assert_close(flat(ours(packed)), flat(theirs(packed)))


def theirs_in_bfloat16(module: nn.Module, *given: Any) -> list[Tensor]:
    """Torch's results; where its oneDNN has no such LSTM (AVX2 only), those of its other kernels.

    In the dtype that oneDNN's have.
    """
    try:
        return flat(module(*given))
    except RuntimeError as error:
        if "could not create a primitive descriptor" not in str(error):
            raise
    with torch.backends.mkldnn.flags(enabled=False):
        return [result.to(torch.bfloat16) for result in flat(module(*given))]


@ALL
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["plain", "states", "packed", "both directions"])
def test_autocast(kind: str, grad: bool, model: Any, given: Any, form: str) -> None:
    """The dtypes that torch's modules give, and at least their accuracy."""
    skip_without_native()
    options = {"num_layers": 2, "bidirectional": form == "both directions"}
    theirs, ours = (module.to(model) for module in pair(kind, **options))
    truth = copy.deepcopy(theirs).double()
    x: Any = torch.randn(6, 4, I).to(given)
    exact: Any = x.double()
    hx: Any = None
    if form == "states":
        hx = torch.randn(2, 4, H).to(given)
        hx = (hx, torch.randn(2, 4, H).to(given)) if kind == "lstm" else hx
    if form == "packed":
        x, exact = (pack_padded_sequence(t, torch.tensor([6, 4, 4, 1])) for t in (x, exact))
    exact_hx = tuple(h.double() for h in hx) if isinstance(hx, tuple) else hx
    exact_hx = exact_hx.double() if isinstance(exact_hx, Tensor) else exact_hx
    expected = flat(truth(exact, exact_hx))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        torchs, results = theirs_in_bfloat16(theirs, x, hx), flat(ours(x, hx))
    for result, their, true in zip(results, torchs, expected, strict=True):
        assert result.dtype == their.dtype
        assert result.requires_grad == their.requires_grad
        low = [t.to(torch.bfloat16) for t in (result, their)]
        assert_as_good([low[0]], [low[1]], [true], 2.0)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_with_a_projection(grad: bool) -> None:
    theirs, ours = pair("lstm", proj_size=3)
    x = torch.randn(6, 4, I)
    for given in (x, pack_padded_sequence(x, torch.tensor([6, 4, 4, 1]))):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            for result, their in zip(flat(ours(given)), flat(theirs(given)), strict=True):
                assert result.dtype == their.dtype
                torch.testing.assert_close(result, their, rtol=0.0, atol=0.02)


@pytest.mark.parametrize("kind", KINDS[1:])  # torch's LSTM has no float16 on every processor
def test_autocast_in_float16_is_torchs(kind: str) -> None:
    theirs, ours = pair(kind)
    x = torch.randn(6, 4, I)
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        for result, their in zip(flat(ours(x)), flat(theirs(x)), strict=True):
            assert result.dtype == their.dtype
            assert torch.equal(result, their)


@ALL
def test_autocast_trains(kind: str) -> None:
    """Gradients arrive in the parameters' dtype, close to torch's."""
    theirs, ours = pair(kind)
    x = torch.randn(6, 4, I)
    found = []
    for module, run in ((theirs, theirs_in_bfloat16), (ours, lambda ours, x: flat(ours(x)))):
        with torch.autocast("cpu", torch.bfloat16):
            output = run(module, x)[0]
        found.append(torch.autograd.grad(output.float().square().sum(), list(module.parameters())))
    for a, b in zip(*found, strict=True):
        assert b.dtype == torch.float32
        assert (a - b).norm() <= 0.05 * a.norm()


@ALL
def test_weight_norm_and_pruning(kind: str) -> None:
    """Weights that are no parameters of the module, but made from them in every call."""
    theirs, ours = pair(kind)
    x = torch.randn(4, 2, I)
    for change in (
        lambda m: torch.nn.utils.weight_norm(m, "weight_hh_l0"),
        lambda m: prune.random_unstructured(m, "weight_ih_l0", 0.5),
    ):
        torch.manual_seed(1)
        change(theirs)
        torch.manual_seed(1)
        change(ours)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])
        with torch.no_grad():
            for module in (theirs, ours):
                for parameter in module.parameters():
                    parameter.mul_(0.5)
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])


@ALL
def test_parametrized(kind: str) -> None:
    theirs, ours = pair(kind)
    x = torch.randn(4, 2, I)
    for module in (theirs, ours):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    ours(x)[0].sum().backward()


def test_weight_dtype_is_for_inference() -> None:
    _, module = pair("lstm")
    module.weight_dtype = "int8"
    x = torch.randn(4, 2, I)
    with pytest.raises(RuntimeError, match="inference"):
        module(x)
    assert "weight_dtype" not in module.state_dict()
    with torch.inference_mode():
        assert module(x)[0].shape == (4, 2, H)
    module.requires_grad_(False)
    assert not module(x)[0].requires_grad


def test_lengths_where_only_torch_runs() -> None:
    _, module = pair("gru")
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.float16),
        pytest.raises(TypeError, match="lengths"),
    ):
        module(torch.randn(4, 2, I), lengths=[1, 4])


@ALL
@pytest.mark.parametrize("case", ["everything", "lengths, everything"])
def test_inference_mode_gives_what_no_grad_gives(kind: str, case: str) -> None:
    _, _, module = make_modules(kind, CASES[case], torch.float32)
    data = make_data(kind, CASES[case], torch.float32)
    with torch.no_grad():
        expected = call(module, CASES[case], data)
    with torch.inference_mode():
        results = call(module, CASES[case], data)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert results[0].is_inference()


def test_data_parallel_wrapper(tmp_path: Any) -> None:
    """DistributedDataParallel of one process: its hooks on parameters see every gradient."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        module = encdec_fast.nn.LSTM(I, H, num_layers=2)
        wrapped = nn.parallel.DistributedDataParallel(module)
        x = torch.randn(4, 2, I)
        wrapped(x)[0].sum().backward()
        found = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        # Whoever holds the group last waits for its threads. The wrapper would do so with the GIL,
        # which a thread may be waiting for; destroy_process_group does without.
        del wrapped
        gc.collect()
        module.zero_grad()
        module(x)[0].sum().backward()
        expected = [p.grad for p in module.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        torch.distributed.destroy_process_group()


@ALL
def test_gradient_checkpointing(kind: str) -> None:
    """Forward runs again in backward, and again where that is differentiated."""
    _, module = pair(kind)
    x = torch.randn(4, 2, I, requires_grad=True)
    found = []
    for checkpointed in (False, True):
        output = module(x)[0]
        if checkpointed:
            checkpoint = torch.utils.checkpoint.checkpoint
            output = checkpoint(lambda t: module(t)[0], x, use_reentrant=False)
        (first,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        found.append([first, second])
    torch.testing.assert_close(found[1], found[0])
