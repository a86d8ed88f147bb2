"""Packed weights never outlive the values they were packed from, however those change."""

from __future__ import annotations

import copy
import gc
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import skip_without_native
from helpers import KINDS, OURS
from torch import Tensor, nn

import encdec_fast
from encdec_fast import repack, use_backend
from encdec_fast.ops import _packing

pytestmark = pytest.mark.usefixtures("native")
ALL = pytest.mark.parametrize("kind", KINDS)
I, H = 5, 40  # w_hh has more elements than the fingerprint looks at


def make(kind: str) -> Any:
    return OURS[kind](I, H, bidirectional=True)


def assert_fresh(module: Any, x: Tensor, run: Callable[..., Any] | None = None) -> Tensor:
    """The cpu backend gives what the reference makes of the weights as they are now."""
    output: Tensor = (module if run is None else run)(x)[0]
    with use_backend("reference"):
        expected = module(x)[0]
    bound = 0.1 if module.weight_dtype else 1e-5
    torch.testing.assert_close(output, expected, rtol=0.0, atol=bound)
    return output


def _with_no_grad(module: Any) -> None:
    for parameter in module.parameters():
        parameter.add_(0.5)


def _through_data(module: Any) -> None:
    for parameter in module.parameters():
        parameter.data.add_(0.5)


def _new_data(module: Any) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data + 0.5


def _same_memory_again(module: Any) -> None:
    """The memory goes away and comes back with other values, and nobody looked in between."""
    for parameter in module.parameters():
        values = parameter.data + 0.5
        storage = parameter.data
        parameter.data = torch.empty(0)
        storage.copy_(values)
        parameter.data = storage


def _through_numpy(module: Any) -> None:
    for parameter in module.parameters():
        array = parameter.detach().numpy()
        array += 0.5


def _load_state_dict(module: Any) -> None:
    module.load_state_dict({k: v + 0.5 for k, v in module.state_dict().items()})


def _assign(module: Any) -> None:
    module.load_state_dict({k: v + 0.5 for k, v in module.state_dict().items()}, assign=True)


def _new_parameter(module: Any) -> None:
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(parameter + 0.5))


def _init(module: Any) -> None:
    torch.manual_seed(7)
    module.reset_parameters()


def _vector(module: Any) -> None:
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector + 0.5, module.parameters())


def _swapped_on_conversion(module: Any) -> None:
    """`.to()` as it may be one day: it moves the new tensors into the old objects."""
    _with_no_grad(module)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.half().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def _set(module: Any) -> None:
    for parameter in module.parameters():
        parameter.set_(parameter.detach() + 0.5)


def _cast_back_and_forth(module: Any) -> None:
    _with_no_grad(module)
    module.half().float()


CHANGES = {
    "no_grad": _with_no_grad,
    ".data": _through_data,
    "p.data =": _new_data,
    "the same memory again": _same_memory_again,
    "numpy": _through_numpy,
    "load_state_dict": _load_state_dict,
    "load_state_dict(assign=True)": _assign,
    "a new parameter": _new_parameter,
    "reset_parameters": _init,
    "vector_to_parameters": _vector,
    "swapped on conversion": _swapped_on_conversion,
    "set_": _set,
    "half and float": _cast_back_and_forth,
}
HOW = pytest.mark.parametrize("how", list(CHANGES))


@ALL
@HOW
@pytest.mark.parametrize("weight_dtype", [None, "int8"])
def test_change(kind: str, how: str, weight_dtype: Any) -> None:
    module, x = make(kind), torch.randn(4, 2, I)
    module.weight_dtype = weight_dtype
    with torch.no_grad():
        before = assert_fresh(module, x)
        CHANGES[how](module)
        after = assert_fresh(module, x)
    assert not torch.allclose(before, after, atol=1e-3)


@ALL
@HOW
def test_change_and_compiled(kind: str, how: str) -> None:
    module, x = make(kind), torch.randn(4, 2, I)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        before = assert_fresh(module, x, compiled)
        CHANGES[how](module)
        after = assert_fresh(module, x, compiled)
    assert not torch.allclose(before, after, atol=1e-3)


@ALL
@pytest.mark.parametrize("how", [".data", "p.data =", "no_grad", "numpy", "a new parameter"])
def test_change_in_inference_mode(kind: str, how: str) -> None:
    """Tensors made there have no version counter."""
    with torch.inference_mode():
        module, x = make(kind), torch.randn(4, 2, I)
        assert module.weight_ih_l0.is_inference()
        before = assert_fresh(module, x)
        CHANGES[how](module)
        after = assert_fresh(module, x)
    assert not torch.allclose(before, after, atol=1e-3)


@ALL
@pytest.mark.parametrize("name", ["SGD", "Adam", "fused Adam"])
@pytest.mark.parametrize("compiled", [False, True])
def test_optimizer(kind: str, name: str, compiled: bool) -> None:
    module, x = make(kind), torch.randn(4, 2, I)
    if name == "SGD":
        optimizer: Any = torch.optim.SGD(module.parameters(), 0.5)
    else:
        optimizer = torch.optim.Adam(module.parameters(), 0.1, fused="fused" in name)
    run = torch.compile(module, backend="aot_eager") if compiled else module
    outputs = []
    for _ in range(3):
        with torch.no_grad():
            outputs.append(assert_fresh(module, x, run))
        optimizer.zero_grad()
        run(x)[0].square().sum().backward()
        optimizer.step()
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)


@ALL
def test_functional_call(kind: str) -> None:
    """Other weights for one call, and the module's own again."""
    module, x = make(kind), torch.randn(4, 2, I)
    other = {name: p.detach() + 0.5 for name, p in module.named_parameters()}
    with torch.no_grad():
        own = assert_fresh(module, x)
        for _ in range(2):
            swapped = torch.func.functional_call(module, other, (x,))[0]
            with use_backend("reference"):
                expected = torch.func.functional_call(module, other, (x,))[0]
            torch.testing.assert_close(swapped, expected, rtol=0.0, atol=1e-5)
            assert torch.equal(module(x)[0], own)
            for value in other.values():
                value.add_(0.1)


@ALL
def test_weights_made_anew_in_every_call(kind: str) -> None:
    """The allocator gives the same memory to other values, and the version is 0 each time."""
    module, x = make(kind), torch.randn(4, 2, I)
    base = {name: p.detach().clone() for name, p in module.named_parameters()}
    with torch.no_grad():
        for i in range(5):
            made = {name: value * (1 + i) for name, value in base.items()}
            output = torch.func.functional_call(module, made, (x,))[0]
            with use_backend("reference"):
                expected = torch.func.functional_call(module, made, (x,))[0]
            torch.testing.assert_close(output, expected, rtol=0.0, atol=1e-5)
            del made


def test_one_element_through_data_needs_repack() -> None:
    """What no trace shows, and how to tell."""
    module, x = make("lstm"), torch.randn(4, 2, I)
    with torch.no_grad():
        for what in (module, module.weight_hh_l0, list(module.parameters())):
            module(x)
            module.weight_hh_l0.data[1, 2] += 3.0
            repack(what)
            assert_fresh(module, x)


@ALL
def test_change_between_forward_and_backward_is_noticed(kind: str) -> None:
    module, x = make(kind), torch.randn(4, 2, I)
    output = module(x)[0].sum()
    with torch.no_grad():
        module.weight_hh_l0.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_packs_die_with_their_weights() -> None:
    gc.collect()
    before = len(_packing._entries)
    module = make("lstm")
    with torch.no_grad():
        module(torch.randn(4, 2, I))
        module.weight_dtype = "int8"
        module(torch.randn(4, 2, I))
    assert len(_packing._entries) == before + 4  # two directions in two formats
    del module
    gc.collect()
    assert len(_packing._entries) == before


def test_training_keeps_no_packs() -> None:
    gc.collect()
    before = len(_packing._entries)
    module = make("lstm")
    module(torch.randn(4, 2, I))[0].sum().backward()
    assert len(_packing._entries) == before


def test_a_pack_is_made_once() -> None:
    module, x = make("gru"), torch.randn(4, 2, I)
    with torch.no_grad():
        module(x)
        blobs = [entry.blob for entry in _packing._entries.values()]
        module(x)
        module(torch.randn(7, 3, I))
        again = [entry.blob for entry in _packing._entries.values()]
    assert len(blobs) == len(again)
    assert all(a is b for a, b in zip(blobs, again, strict=True))


def test_copies_have_packs_of_their_own() -> None:
    module, x = make("lstm"), torch.randn(4, 2, I)
    with torch.no_grad():
        expected = module(x)[0]
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        for parameter in module.parameters():
            parameter.add_(0.5)
        assert_fresh(module, x)
        for other in copies:
            assert torch.equal(other(x)[0], expected)


def test_shared_weights_in_two_layers() -> None:
    """One parameter in two modules, with other weights beside it."""
    first, second = make("lstm"), make("lstm")
    second.weight_hh_l0 = first.weight_hh_l0
    x = torch.randn(4, 2, I)
    with torch.no_grad():
        for _ in range(2):
            assert_fresh(first, x)
            assert_fresh(second, x)
            first.weight_hh_l0.mul_(0.5)


def test_a_cell_and_a_network_with_the_same_weights() -> None:
    """The same tensors as another kind of network are another pack."""
    skip_without_native()
    w_ih, w_hh = torch.randn(12, I), torch.randn(12, 3)
    x = torch.randn(4, 2, I)
    lstm_like = [w_ih, torch.randn(12, 3)]
    gru = encdec_fast.ops.gru(x, None, [w_ih, w_hh[:, :].clone().resize_(12, 4)], bias=False)
    lstm = encdec_fast.ops.lstm(x, None, lstm_like, bias=False)
    assert gru[0].shape[-1] == 4
    assert lstm[0].shape[-1] == 3


# The file of ops that packs the weights, and the module whose weights they are.
ALWAYS_CHANGING: dict[str, tuple[str, Callable[[], Any]]] = {
    "lstm": ("_cpu", lambda: encdec_fast.nn.LSTM(I, H, bidirectional=True)),
    "gru": ("_cpu", lambda: encdec_fast.nn.GRU(I, H)),
    "linear": ("linear", lambda: encdec_fast.nn.Linear(I, H)),
    "gated_bridge": ("gated_bridge", lambda: encdec_fast.nn.GatedBridge(I, I)),
}


@pytest.mark.parametrize("name", ALWAYS_CHANGING)
def test_weights_that_never_stand_still(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever they are packed, another thread writes others: copies are what runs."""
    file, new_module = ALWAYS_CHANGING[name]
    ops = importlib.import_module(f"encdec_fast.ops.{file}")
    module = new_module()
    matrices = [parameter.data for parameter in module.parameters() if parameter.dim() == 2]
    args = [torch.randn(2, I)] * 2 if name == "gated_bridge" else [torch.randn(2, 3, I)]
    pack = ops.make_pack
    packed: list[str] = []

    def make_pack(kind: str, weights: list[Tensor], weight_format: int) -> Tensor:
        result: Tensor = pack(kind, weights, weight_format)
        packed.append(kind)
        for matrix in matrices:
            matrix.add_(0.125)
        return result

    monkeypatch.setattr(ops, "make_pack", make_pack)
    with torch.no_grad():
        found = module(*args)
        for matrix in matrices:  # as they were when they were copied
            matrix.sub_(0.125 * len(packed) / 3)
        with use_backend("reference"):
            expected = module(*args)
    assert len(packed) == (6 if name == "lstm" else 3)  # of both directions; of one
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_module_packs_once(compiler: str) -> None:
    module, x = make("lstm"), torch.randn(4, 2, I)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend=compiler)
        compiled(x)
        blobs = [entry.blob for entry in _packing._entries.values()]
        compiled(x)
        again = [entry.blob for entry in _packing._entries.values()]
    assert blobs
    assert all(a is b for a, b in zip(blobs, again, strict=True))


def test_weights_of_another_dtype_than_the_rows(native: None) -> None:
    """Only the raw op takes them in training; they are read as what they are."""
    module = torch.nn.LSTM(20, 32).bfloat16()
    weights = [weight.detach() for weight in module.parameters()]
    x = torch.randn(6, 5, 20)
    found = torch.ops.encdec_fast_cpu.rnn_forward(
        0, x, weights, [], None, None, None, None, False, False, True
    )
    expected, _ = module.float()(x)
    torch.testing.assert_close(found[0], expected.detach(), rtol=0, atol=1e-2)
