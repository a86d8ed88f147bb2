"""AttentionDecoder and its cell: each attention, the state, coverage, what `explain` says."""

from __future__ import annotations

import pickle
from copy import deepcopy as copy_module
from typing import Any

import pytest
import torch
from helpers import assert_same_gradients
from test_attention_decoder import CELLS
from torch import nn

import encdec_fast
from encdec_fast import explain


def attention_of(kind: str, H: int = 6, M: int = 5) -> nn.Module:
    ours = encdec_fast.nn
    made: dict[str, Any] = {
        "additive": lambda: ours.AdditiveAttention(H, M, 7),
        "coverage": lambda: ours.AdditiveAttention(H, M, 7, coverage=True),
        "general": lambda: ours.LuongAttention(H, M),
        "concat": lambda: ours.LuongAttention(H, M, "concat", 9),
        "dot": lambda: ours.LuongAttention(H, H, "dot"),
        "output": lambda: ours.LuongAttention(H, M, output_size=M),
        "concat, output": lambda: ours.LuongAttention(H, M, "concat", 9, output_size=M),
        "location": lambda: ours.LocationAttention(4, H, 8),
    }
    module: nn.Module = made[kind]()
    return module


KINDS = ["additive", "general", "concat", "dot", "output", "concat, output", "location"]
MODULES = pytest.mark.parametrize("kind", KINDS)


@CELLS
@MODULES
@pytest.mark.parametrize("grad", [False, True])
def test_module(cell: str, kind: str, grad: bool) -> None:
    """The same network, written with torch.nn's cell, a step at a time."""
    M = 6 if kind == "dot" else 5
    decoder = encdec_fast.nn.AttentionDecoder(4, 6, M, attention_of(kind, 6, M), cell)
    own = (nn.LSTMCell if cell == "lstm" else nn.GRUCell)(4 + M, 6)
    own.load_state_dict(decoder.cell.cell.state_dict())
    attend = decoder.cell.attention
    input, memory = torch.randn(3, 5, 4), torch.randn(3, 8, M)
    first = [torch.randn(3, 6) for _ in range(2 if cell == "lstm" else 1)]
    lengths = torch.tensor([8, 3, 5])
    with torch.set_grad_enabled(grad):
        output, state, weights = decoder(input, memory, tuple(first), lengths, True)
        hx: Any = tuple(first) if cell == "lstm" else first[0]
        context = torch.zeros(3, M)
        for t in range(5):
            h = hx[0] if cell == "lstm" else hx
            if kind == "location":
                found, weight = attend(input[:, t : t + 1], h[:, None], memory, lengths, True)
                context, weight = found.squeeze(1), weight.squeeze(1)
            hx = own(torch.cat([input[:, t], context], 1), hx)
            h = hx[0] if cell == "lstm" else hx
            if kind != "location":
                found, weight = attend(h.unsqueeze(1), memory, lengths, True)
                context, weight = found.squeeze(1), weight.squeeze(1)
            expected = torch.cat([h, context], 1)
            torch.testing.assert_close(output[:, t], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(weights[:, t], weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state[0], h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state[-1], context, rtol=1e-4, atol=1e-5)
    if cell == "lstm":
        torch.testing.assert_close(state[1], hx[1], rtol=1e-4, atol=1e-5)


@CELLS
@MODULES
def test_cell_goes_on_where_the_decoder_stops(cell: str, kind: str) -> None:
    M = 6 if kind == "dot" else 5
    decoder = encdec_fast.nn.AttentionDecoder(4, 6, M, attention_of(kind, 6, M), cell)
    input, memory = torch.randn(2, 5, 4), torch.randn(2, 8, M)
    whole, end, weights = decoder(input, memory, need_weights=True)
    _, state = decoder(input[:, :3], memory)
    for t in (3, 4):
        output, state, weight = decoder.cell(input[:, t], memory, state, None, True)
        torch.testing.assert_close(output, whole[:, t], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weight, weights[:, t], rtol=1e-4, atol=1e-5)
    for a, b in zip(state, end, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # Beams of a sentence share its memory.
    beams = tuple(part.repeat_interleave(3, 0) for part in state)
    x = torch.randn(6, 4)
    output, _, weight = decoder.cell(x, memory, beams, [8, 6], True)
    alone = decoder.cell(x, memory.repeat_interleave(3, 0), beams, [8, 8, 8, 6, 6, 6], True)
    torch.testing.assert_close(output, alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight, alone[2], rtol=1e-4, atol=1e-5)


@CELLS
def test_coverage(cell: str) -> None:
    """Each step is given the sum of the weights before it, of its own hypothesis."""
    decoder = encdec_fast.nn.AttentionDecoder(4, 6, 5, attention_of("coverage"), cell)
    attention = decoder.cell.attention
    nn.init.normal_(attention.coverage_proj.weight, std=2.0)
    input, memory = torch.randn(3, 4, 4), torch.randn(3, 8, 5)
    lengths = torch.tensor([8, 3, 5])
    output, state, weights = decoder(input, memory, None, lengths, True)
    query = attention.query_proj(output[..., :6]).unsqueeze(2)
    before = weights.cumsum(1) - weights
    hidden = query + attention.memory_proj(memory).unsqueeze(1)
    hidden = torch.tanh(hidden + attention.coverage_proj(before.unsqueeze(3)))
    outside = (torch.arange(8) >= lengths[:, None]).unsqueeze(1)
    expected = attention.score(hidden).squeeze(3).masked_fill(outside, -torch.inf).softmax(2)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output[..., 6:], expected @ memory, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state[-1], weights.sum(1), rtol=1e-4, atol=1e-5)
    weights.square().sum().backward()
    assert attention.coverage_proj.weight.grad.abs().sum() > 0

    # It goes on where it stopped, and without its coverage it does not.
    _, middle, _ = decoder(input[:, :2], memory, None, lengths, True)
    rest, end, _ = decoder(input[:, 2:], memory, middle, lengths, True)
    torch.testing.assert_close(rest, output[:, 2:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end[-1], state[-1], rtol=1e-4, atol=1e-5)
    forgot, _, _ = decoder(input[:, 2:], memory, middle[:-1], lengths, True)
    assert (forgot - rest).abs().max() > 1e-3

    # Beams of a sentence share its memory, and not their coverage.
    beams = [part.repeat_interleave(2, 0) for part in middle]
    beams[-1] = beams[-1] * torch.tensor([0.0, 3.0]).repeat(3).unsqueeze(1)
    x = torch.randn(6, 4)
    together = decoder.cell(x, memory, tuple(beams), lengths, True)
    for row in range(6):
        own = slice(row, row + 1)
        at = slice(row // 2, row // 2 + 1)
        part = tuple(t[own] for t in beams)
        alone = decoder.cell(x[own], memory[at], part, lengths[at], True)
        torch.testing.assert_close(together[0][own], alone[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[2][own], alone[2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together[1][-1][own], alone[1][-1], rtol=1e-4, atol=1e-5)

    # A list of lengths is the same, wherever tensors are made; what fits nobody is said.
    with torch.device("meta"):
        listed = decoder.cell(x, memory, tuple(beams), lengths.tolist(), True)
    torch.testing.assert_close(listed[0], together[0])
    with pytest.raises(RuntimeError, match=r"must have shape \(3,\)"):
        decoder.cell(x, memory, tuple(beams), [3, 3])
    with pytest.raises(RuntimeError, match="with the coverage"):
        decoder.cell(x, memory, (*beams, x))

    # Nothing there: no steps, no rows, no sentences.
    _, still, _ = decoder(input[:, :0], memory, None, lengths, True)
    assert len(still) == len(state) and not still[-1].any()
    for rows, own_memory in ((x[:0], memory), (x[:0], memory[:0])):
        output, after = decoder.cell(rows, own_memory)
        assert output.shape == (0, 11) and after[-1].shape == (0, 8)
        assert explain(decoder.cell, rows, own_memory) is not None


@CELLS
@pytest.mark.parametrize("kind", [*KINDS, "coverage"])
@pytest.mark.parametrize("lengths", [None, [7, 3]])
def test_gradients_of_a_module(cell: str, kind: str, lengths: Any, native: None) -> None:
    """One op, whose gradients are those of its cell step by step: of each parameter and input."""
    M = 6 if kind == "dot" else 5
    decoder = encdec_fast.nn.AttentionDecoder(4, 6, M, attention_of(kind, 6, M), cell)
    x, memory = torch.randn(2, 4, 4, requires_grad=True), torch.randn(2, 7, M, requires_grad=True)
    first = [torch.randn(2, 6, requires_grad=True) for _ in range(2 if cell == "lstm" else 1)]
    inputs = [x, memory, *first, *decoder.parameters()]
    if kind == "coverage":
        nn.init.normal_(decoder.cell.attention.coverage_proj.weight, std=2.0)
    found = explain(decoder, x, memory, tuple(first), lengths)
    assert found.backend == "cpu" and "step by step" not in str(found)
    seeds = torch.randn(2, 4, 6 + M), torch.randn(2, 4, 7)

    def gradients(output: torch.Tensor, weights: torch.Tensor) -> Any:
        return torch.autograd.grad((output * seeds[0]).sum() + (weights * seeds[1]).sum(), inputs)

    output, state, weights = decoder(x, memory, tuple(first), lengths, True)
    now: Any = tuple(first)
    steps = []
    for t in range(4):
        *step, weight = decoder.cell(x[:, t], memory, now, lengths, True)
        now = step[1]
        steps.append((step[0], weight))
    expected = [torch.stack(parts, dim=1) for parts in zip(*steps, strict=True)]
    for a, b in zip(state, now, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients(output, weights), gradients(*expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    with pytest.raises(RuntimeError, match="state must be"):
        explain(decoder, x, memory, (x,) * 6)


def test_a_location_attention_of_other_sizes() -> None:
    decoder = encdec_fast.nn.AttentionDecoder(3, 6, 5, attention_of("location"))
    with pytest.raises(RuntimeError, match="LocationAttention takes 10 features"):
        decoder(torch.randn(2, 3, 3), torch.randn(2, 7, 5))
    decoder = encdec_fast.nn.AttentionDecoder(4, 6, 5, attention_of("location"))
    with pytest.raises(RuntimeError, match="at most the 8 positions"):
        decoder(torch.randn(2, 3, 4), torch.randn(2, 9, 5))


def test_what_a_module_runs(native: None) -> None:
    decoder = encdec_fast.nn.AttentionDecoder(4, 6, 5, attention_of("additive"))
    arguments = (torch.randn(2, 3, 4), torch.randn(2, 7, 5))
    assert explain(decoder, *arguments).backend == "cpu"
    expected = decoder(*arguments)[0]
    seen = []
    decoder.cell.cell.register_forward_hook(lambda *_: seen.append(1))
    found = explain(decoder, *arguments, need_weights=True)
    assert "step by step: a part has a hook" in str(found)
    torch.testing.assert_close(decoder(*arguments)[0], expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == 3


@CELLS
@pytest.mark.parametrize("kind", ["additive", "coverage", "general", "location"])
def test_what_a_step_runs(cell: str, kind: str, native: None) -> None:
    """`explain` of the cell: of its recurrent cell and of its attention."""
    step = encdec_fast.nn.AttentionDecoder(4, 6, 5, attention_of(kind), cell).cell
    x, memory = torch.randn(4, 4), torch.randn(2, 7, 5)
    _, state = step(x, memory)
    with torch.no_grad():
        for given in (None, state):
            found = explain(step, x, memory, given, [7, 3], need_weights=True)
            assert found.backend == "cpu"
    step.cell = (nn.LSTMCell if cell == "lstm" else nn.GRUCell)(9, 6)
    found = explain(step, x, memory)
    assert found.backend == "torch" and "cell is none of encdec_fast" in str(found)


def test_a_replaced_projection_is_called(native: None) -> None:
    decoder = encdec_fast.nn.AttentionDecoder(4, 6, 5, attention_of("additive"))
    decoder.cell.attention.query_proj = nn.Linear(6, 7)  # with a bias
    x, memory = torch.randn(2, 3, 4), torch.randn(2, 7, 5)
    output, _ = decoder(x, memory)
    state = None
    for t in range(3):
        step, state = decoder.cell(x[:, t], memory, state)
        torch.testing.assert_close(output[:, t], step)
    output.sum().backward()
    assert decoder.cell.attention.query_proj.bias.grad is not None


def test_rounded_weights_step_by_step(native: None) -> None:
    decoder = encdec_fast.nn.AttentionDecoder(4, 6, 5, attention_of("additive"))
    x, memory = torch.randn(2, 3, 4), torch.randn(2, 7, 5)
    with torch.no_grad():
        exact = decoder(x, memory)[0]
        encdec_fast.optimize(decoder, "int8")
        assert "step by step: a part rounds its weights" in str(explain(decoder, x, memory))
        difference = (decoder(x, memory)[0] - exact).abs().max()
    assert 0 < difference < 0.05
    with pytest.raises(RuntimeError, match="weight_dtype"):
        decoder(x, memory)


def test_module_state_and_errors() -> None:
    decoder = encdec_fast.nn.AttentionDecoder(4, 6, 5, attention_of("additive"))
    names = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"}
    assert {n.removeprefix("cell.cell.") for n in decoder.state_dict() if ".cell." in n} == names
    cell = encdec_fast.nn.AttentionDecoderCell(4, 6, 5, attention_of("additive"))
    cell.load_state_dict({n.removeprefix("cell."): t for n, t in decoder.state_dict().items()} | {})
    x, memory = torch.randn(2, 3, 4), torch.randn(2, 7, 5)
    again = pickle.loads(pickle.dumps(decoder))
    torch.testing.assert_close(again(x, memory)[0], copy_module(decoder)(x, memory)[0])
    assert decoder(x[:, :0], memory)[0].shape == (2, 0, 11)
    assert decoder(x, memory[:, :0])[0].shape == (2, 3, 11)
    with pytest.raises(ValueError, match="cell"):
        encdec_fast.nn.AttentionDecoder(4, 6, 5, attention_of("additive"), "rnn")
    with pytest.raises(RuntimeError, match="state"):
        decoder(x, memory, (torch.zeros(2, 6),))
    with pytest.raises(RuntimeError, match="multiple"):
        decoder.cell(torch.randn(3, 4), memory)
    with pytest.raises(RuntimeError):
        decoder(torch.randn(2, 3, 5), memory)


@pytest.mark.parametrize("grad", [False, True])
def test_module_compiles(grad: bool) -> None:
    for kind in (*KINDS, "coverage"):
        M = 6 if kind == "dot" else 5
        decoder = encdec_fast.nn.AttentionDecoder(4, 6, M, attention_of(kind, 6, M))
        x, memory = torch.randn(2, 3, 4, requires_grad=grad), torch.randn(2, 7, M)
        torch._dynamo.reset()
        compiled = torch.compile(decoder, fullgraph=True, backend="aot_eager")
        with torch.set_grad_enabled(grad):
            found, expected = compiled(x, memory), decoder(x, memory)
        torch.testing.assert_close(found, expected)
        if grad:
            assert_same_gradients(found[0], expected[0], decoder, [x])


def test_module_exports_with_dynamic_sizes() -> None:
    decoder = encdec_fast.nn.AttentionDecoder(4, 6, 5, attention_of("general")).eval()
    B, T, S = (torch.export.Dim(name, min=2, max=50) for name in "BTS")
    example = (torch.randn(3, 4, 4), torch.randn(3, 7, 5))
    with torch.no_grad():
        program = torch.export.export(
            decoder, example, dynamic_shapes={"input": {0: B, 1: T}, "memory": {0: B, 1: S}}
        )
        other = (torch.randn(2, 9, 4), torch.randn(2, 5, 5))
        torch.testing.assert_close(program.module()(*other), decoder(*other))


def test_explain_of_a_step_with_a_gradient(native: None) -> None:
    """Its cell is torch's then, and its attention is not."""
    step = encdec_fast.nn.AttentionDecoder(4, 6, 5, attention_of("general")).cell
    x, memory = torch.randn(2, 4), torch.randn(2, 7, 5)
    assert explain(step, x, memory).backend == "parts"
    with torch.no_grad():
        assert explain(step, x, memory).backend == "cpu"
