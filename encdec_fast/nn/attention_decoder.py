"""A recurrent decoder with attention and input feeding: a step, and all steps of a known target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from encdec_fast.backends import Description
from encdec_fast.nn._parts import LISTENERS, why_called
from encdec_fast.nn._transformer import BACKENDS, ModuleCall, part_of
from encdec_fast.nn.additive_attention import AdditiveAttention, Lengths
from encdec_fast.nn.cells import GRUCell, LSTMCell
from encdec_fast.nn.location_attention import LocationAttention
from encdec_fast.nn.luong_attention import LuongAttention
from encdec_fast.ops._attention_checks import as_memory_lengths
from encdec_fast.ops.attention_decoder import attention_decoder, describe

# (h, c, context) of an LSTM, (h, context) of a GRU; (B, H), (B, H), (B, M). Where the attention has
# a coverage, it comes last: (B, S), the sum of the weights so far.
State = tuple[Tensor, ...]
_CELLS: dict[str, Any] = {"lstm": LSTMCell, "gru": GRUCell}


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook or another forward is to see the calls of some submodule."""
    for part in module.modules():
        if "forward" in part.__dict__ or any(getattr(part, name) for name in LISTENERS):
            return True
    return False


def _of_sentences(given: list[Tensor], memory: Tensor) -> list[Tensor]:
    """Rows (B beams, ...) as queries of their sentences, (B, beams, ...)."""
    B = memory.shape[0]
    return [rows.unflatten(0, (B, -1)) if B else rows.unsqueeze(1) for rows in given]


class AttentionDecoderCell(nn.Module):
    """One step: a recurrent cell over [input; context of the step before], then attention.

    attention: AdditiveAttention or LuongAttention of query_size hidden_size and of memory_size, or
        a module that is called like them; or a LocationAttention, whose context is computed first,
        from the input and the state of the step before, and enters the same step.
    cell: "lstm" or "gru".

    Submodules: cell (LSTMCell or GRUCell, input_size + memory_size to hidden_size) and attention.
    The same step in plain torch:

        h, c = cell(torch.cat([input, context], -1), (h, c))
        context = attention(h.unsqueeze(1), memory).squeeze(1)
        output = torch.cat([h, context], -1)

    An AdditiveAttention with coverage is given the sum of the weights of all steps before, which is
    the last part of the state.

    Luong, Pham and Manning, 2015 (arXiv:1508.04025), section 3.3, with the context itself fed.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        memory_size: int,
        attention: nn.Module,
        cell: str = "lstm",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if cell not in _CELLS:
            raise ValueError(f"cell must be 'lstm' or 'gru', but it is {cell!r}")
        self.input_size, self.hidden_size = input_size, hidden_size
        self.memory_size, self.kind = memory_size, cell
        size = input_size + memory_size
        self.cell = _CELLS[cell](size, hidden_size, bias, device=device, dtype=dtype)
        self.attention = attention

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, {self.memory_size}"

    @property
    def covers(self) -> bool:
        """Whether the attention is given the sum of the weights before."""
        own = self.attention
        plain = (
            isinstance(own, AdditiveAttention) and type(own).forward is AdditiveAttention.forward
        )
        return plain and bool(own.coverage)

    def first_state(self, input: Tensor, state: Any = None) -> State:
        """The state before the first step, for rows as input has.

        state: None (zeros), the encoder's final h or (h, c), these and a context, or a whole state,
        whose coverage is only there where it was given. RuntimeError if it has another number of
        parts.
        """
        rows = input.shape[0]
        parts = (state,) if isinstance(state, Tensor) else tuple(state or ())
        sizes = [self.hidden_size] * (2 if self.kind == "lstm" else 1) + [self.memory_size]
        if len(parts) not in (0, len(sizes) - 1, len(sizes), len(sizes) + self.covers):
            last = f", or {len(sizes) + 1} with the coverage" if self.covers else ""
            raise RuntimeError(
                f"AttentionDecoder: state must be {len(sizes) - 1} tensors, or {len(sizes)} with "
                f"the context{last}, but it is {len(parts)}"
            )
        missing = sizes[len(parts) :]
        return parts + tuple(input.new_zeros(rows, size) for size in missing)

    def _covered_state(self, input: Tensor, memory: Tensor, state: Any) -> tuple[State, State]:
        """`first_state` in two parts: without the coverage, and it, if there is any."""
        state = self.first_state(input, state)
        if not self.covers:
            return state, ()
        known = 3 if self.kind == "lstm" else 2
        if len(state) == known:
            return state, (memory.new_zeros(input.shape[0], memory.shape[1]),)
        return state[:known], state[known:]

    def _check_rows(self, input: Tensor, memory: Tensor) -> None:
        if memory.shape[0] and input.shape[0] % memory.shape[0]:
            raise RuntimeError(
                f"AttentionDecoderCell: input has {input.shape[0]} rows, which is no multiple of "
                f"the {memory.shape[0]} sentences of memory"
            )

    def project_memory(self, memory: Tensor) -> Tensor | None:
        """The keys of a memory, once for all steps; None where the attention has none."""
        project = getattr(self.attention, "project_memory", None)
        keys: Tensor | None = None if project is None else project(memory)
        return keys

    def _attend(
        self, given: list[Tensor], memory: Tensor, lengths: Lengths, need: bool, **options: Any
    ) -> Any:
        """(context, weights or None) of a query per row; a sentence's beams are its queries."""
        found = self.attention(*_of_sentences(given, memory), memory, lengths, need, **options)
        context, weights = found if need else (found, None)
        return context.flatten(0, 1), None if weights is None else weights.flatten(0, 1)

    def _attend_covered(
        self, h: Tensor, memory: Tensor, lengths: Lengths, keys: Tensor, coverage: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(context, weights) of a query per row, which has a coverage, so a memory, of its own."""
        beams = h.shape[0] // max(1, memory.shape[0])
        if beams != 1:
            lengths = as_memory_lengths(lengths, memory)
            lengths = None if lengths is None else lengths.repeat_interleave(beams)
            memory, keys = (t.repeat_interleave(beams, 0) for t in (memory, keys))
        options = {"keys": keys, "coverage": coverage}
        context, weights = self.attention(h.unsqueeze(1), memory, lengths, True, **options)
        return context.squeeze(1), weights.squeeze(1)

    def forward(
        self,
        input: Tensor,
        memory: Tensor,
        state: Any = None,
        memory_lengths: Lengths = None,
        need_weights: bool = False,
        *,
        keys: Tensor | None = None,
    ) -> Any:
        """(output, state), and with need_weights (output, state, weights).

        input: (B, input_size), or (B beams, input_size): the beams of a sentence lie one behind the
        other and share its memory (B, S, memory_size). state: as for `first_state`. keys: what
        `project_memory` returned for this memory. Returns the output (rows, hidden_size +
        memory_size), the new state, and weights (rows, S). RuntimeError for sizes that do not fit.
        """
        self._check_rows(input, memory)
        state, covered = self._covered_state(input, memory, state)
        hx = state[:-1] if self.kind == "lstm" else state[0]
        first = isinstance(self.attention, LocationAttention)
        context = state[-1]
        if first:
            given = [input, state[0]]
            context, weights = self._attend(given, memory, memory_lengths, need_weights)
        new = self.cell(torch.cat([input, context], dim=1), hx)
        new = new if self.kind == "lstm" else (new,)
        if not first:
            keys = self.project_memory(memory) if keys is None else keys
            if covered:
                assert keys is not None
                own = (new[0], memory, memory_lengths, keys, covered[0])
                context, weights = self._attend_covered(*own)
                covered = (covered[0] + weights,)
            else:
                options: dict[str, Any] = {} if keys is None else {"keys": keys}
                own_rows = ([new[0]], memory, memory_lengths, need_weights)
                context, weights = self._attend(*own_rows, **options)
        output = torch.cat([new[0], context], dim=1)
        found = (output, (*new, context, *covered))
        return (*found, weights) if need_weights else found

    def _encdec_fast_describe(
        self,
        input: Tensor,
        memory: Tensor,
        state: Any = None,
        memory_lengths: Lengths = None,
        need_weights: bool = False,
        *,
        keys: Tensor | None = None,
    ) -> Description:
        """What `explain` asks of a module."""
        self._check_rows(input, memory)
        state, _ = self._covered_state(input, memory, state)
        hx = state[:-1] if self.kind == "lstm" else state[0]
        asked: dict[str, tuple[Any, ...]] = {"cell": (torch.cat([input, state[-1]], dim=1), hx)}
        queries = [input, state[0]] if isinstance(self.attention, LocationAttention) else [state[0]]
        given = _of_sentences(queries, memory)
        asked["attention"] = (*given, memory, memory_lengths, need_weights)
        reasons, parts = [], []
        for name, arguments in asked.items():
            describe_part = getattr(self._modules[name], "_encdec_fast_describe", None)
            if describe_part is None:
                reasons.append(f"{name} is none of encdec_fast")
            else:
                parts.append(part_of(describe_part(*arguments), name))
        call = ModuleCall(tuple(reasons), tuple(parts))
        sizes = f"{tuple(input.shape)} {input.dtype} {input.device.type}"
        return Description("attention_decoder_cell", BACKENDS, call, sizes, lambda backend: "")


class AttentionDecoder(nn.Module):
    """All steps of a known target (teacher forcing), as one op forward and backward.

    Arguments and the one submodule, cell, are AttentionDecoderCell's: what was trained here decodes
    there, step by step. With AdditiveAttention, LuongAttention and LocationAttention the steps are
    one call of `encdec_fast.ops.attention_decoder`; with any other attention, hooks on a submodule
    or a weight_dtype of one, the cell runs step by step.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        memory_size: int,
        attention: nn.Module,
        cell: str = "lstm",
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (input_size, hidden_size, memory_size)
        where = {"device": device, "dtype": dtype}
        self.cell = AttentionDecoderCell(*sizes, attention, cell, bias, **where)

    def forward(
        self,
        input: Tensor,
        memory: Tensor,
        state: Any = None,
        memory_lengths: Lengths = None,
        need_weights: bool = False,
    ) -> Any:
        """(output, state), and with need_weights (output, state, weights).

        input: (B, T, input_size), the target's embeddings. memory: (B, S, memory_size). state: None
        (zeros), the encoder's final h or (h, c), each (B, hidden_size), or these and a context.
        memory_lengths: int64 (B) on the CPU, or a list, each from 0 to S. Returns the output
        (B, T, hidden_size + memory_size), h and context side by side; the state after the last
        step, (h, c, context) or for a GRU (h, context), and last the coverage where there is one;
        weights (B, T, S). RuntimeError for sizes that do not fit.
        """
        state = self.cell.first_state(input, state)
        if self._why_steps():
            return self._steps(input, memory, state, memory_lengths, need_weights)
        state, covered = self.cell._covered_state(input, memory, state)
        tensors, options = self._arguments(input, memory, state, covered, memory_lengths)
        shown = need_weights or bool(covered)
        output, c_n, *weights = attention_decoder(*tensors, **options, need_weights=shown)
        if input.shape[1] > 0:
            last = output[:, -1].split([self.cell.hidden_size, self.cell.memory_size], dim=1)
            state = (last[0], c_n, last[1]) if self.cell.kind == "lstm" else last
            covered = tuple(sum + weights[0].sum(dim=1) for sum in covered)
        found = (output, (*state, *covered))
        return (*found, *weights) if need_weights else found

    def _why_steps(self) -> str:
        """Why the steps must be taken one at a time; "" where they are one op."""
        attention: Any = self.cell.attention
        cell: Any = self.cell.cell
        kind, plain = type(attention), (nn.LSTMCell, nn.GRUCell, LSTMCell, GRUCell)
        if type(cell) not in plain:
            return "the cell was replaced"
        if _is_watched(self.cell):
            return "a part has a hook or a forward of its own"
        if any(getattr(part, "weight_dtype", None) for part in (cell, *attention.children())):
            return "a part rounds its weights"  # which is its own affair
        read = {"query_proj": False, "score": False, "score_proj": False}
        read |= {"output_proj": False, "attn": True, "coverage_proj": False}
        called = why_called(attention, {n: b for n, b in read.items() if n in attention._modules})
        if called:
            return called
        if kind in (AdditiveAttention, LuongAttention, LocationAttention):
            return ""
        return f"the attention is {kind.__name__}"

    def _location_weights(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Those columns of a LocationAttention's weight that meet the input, and the state."""
        attention: Any = self.cell.attention
        weight = attention.attn.weight
        wanted = input.shape[-1] + self.cell.hidden_size
        if weight.shape[1] != wanted:
            raise RuntimeError(
                f"AttentionDecoder: the LocationAttention takes {weight.shape[1]} features, but "
                f"input and state have {wanted}"
            )
        return weight[:, : input.shape[-1]], weight[:, input.shape[-1] :]

    def _arguments(
        self, input: Tensor, memory: Tensor, state: State, covered: State, memory_lengths: Lengths
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the op."""
        attention: Any = self.cell.attention
        cell: Any = self.cell.cell
        query_weight = score_weight = positions = output_weight = keys = None
        if type(attention) is LocationAttention:
            of_input, query_weight = self._location_weights(input)
            positions = functional.linear(input, of_input, attention.attn.bias)
        else:
            keys = attention.project_memory(memory)
        if type(attention) is AdditiveAttention:
            query_weight, score_weight = attention.query_proj.weight, attention.score.weight[0]
        elif type(attention) is LuongAttention:
            if attention.score == "concat":
                query_weight = attention.query_proj.weight
                score_weight = attention.score_proj.weight[0]
            if attention.output_size is not None:
                output_weight = attention.output_proj.weight
        h, c = state[0], state[1] if self.cell.kind == "lstm" else None
        biases = (cell.bias_ih, cell.bias_hh) if cell.bias else (None, None)
        weights = (cell.weight_ih, cell.weight_hh, *biases, query_weight, score_weight)
        tensors = (input, h, c, state[-1], keys, memory, *weights, memory_lengths)
        options = {"positions": positions, "output_weight": output_weight, "cell": self.cell.kind}
        if covered:
            options["coverage"] = covered[0]
            options["coverage_weight"] = attention.coverage_proj.weight[:, 0]
        return tensors, options

    def _steps(
        self,
        input: Tensor,
        memory: Tensor,
        state: State,
        memory_lengths: Lengths,
        need_weights: bool,
    ) -> Any:
        keys = self.cell.project_memory(memory)
        outputs, weights = [], []
        for x in input.unbind(1):
            found = self.cell(x, memory, state, memory_lengths, need_weights, keys=keys)
            output, state, *weight = found
            outputs.append(output)
            weights += weight
        if not outputs:
            parts, covered = self.cell._covered_state(input[:, :0].flatten(1), memory, state)
            state = (*parts, *covered)
            B, width = input.shape[0], self.cell.hidden_size + self.cell.memory_size
            nothing = input.new_zeros(B, 0, width), state, input.new_zeros(B, 0, memory.shape[1])
            return nothing if need_weights else nothing[:2]
        whole = (torch.stack(outputs, dim=1), state)
        return (*whole, torch.stack(weights, dim=1)) if need_weights else whole

    def _encdec_fast_describe(
        self,
        input: Tensor,
        memory: Tensor,
        state: Any = None,
        memory_lengths: Lengths = None,
        need_weights: bool = False,
    ) -> Description:
        """What `explain` asks of a module."""
        state = self.cell.first_state(input, state)
        reason = self._why_steps()
        if reason:
            one = input.new_zeros(input.shape[0], input.shape[2])
            given = (one, memory, state, memory_lengths, need_weights)
            found = self.cell._encdec_fast_describe(*given)
            return found._replace(op="attention_decoder", plan=lambda _: f"step by step: {reason}")
        state, covered = self.cell._covered_state(input, memory, state)
        tensors, options = self._arguments(input, memory, state, covered, memory_lengths)
        return describe(*tensors, **options, need_weights=need_weights)
