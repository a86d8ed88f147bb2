"""Drop-in torch.nn.LSTMCell, GRUCell and RNNCell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from encdec_fast.backends import Description
from encdec_fast.ops import _cells
from encdec_fast.ops._call import State, weight_dtype_name
from encdec_fast.ops._layer import LayerOp
from encdec_fast.ops.gru import OP as GRU_OP
from encdec_fast.ops.lstm import OP as LSTM_OP
from encdec_fast.ops.rnn import OP as RNN_OP

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


class CellModule(torch.nn.modules.rnn.RNNCellBase):
    """What a cell of this package adds to torch's.

    weight_dtype: None, torch.bfloat16 or "int8": the dtype in which inference holds the weights.
    It is no part of the state_dict.
    """

    weight_dtype: torch.dtype | str | None = None
    _op: LayerOp

    @property
    def _kind(self) -> str:
        return self._op.name

    def _weights(self) -> list[Tensor]:
        parameters: Any = self._parameters
        try:
            weights = [parameters[name] for name in _NAMES]
        except KeyError:  # weight_norm, pruning and the like keep some as plain attributes
            weights = [getattr(self, name) for name in _NAMES]
        return weights[:2] if weights[2] is None else weights

    def _arguments(self, input: Any, h: Any, c: Any) -> tuple[Any, ...] | None:
        """The arguments of a step of the op, batched, or None where torch must decide."""
        dim = input.dim()
        if dim not in (1, 2) or (self._op.cells and (h is None) != (c is None)):
            return None
        for state in (h, c):
            if state is not None and (not isinstance(state, Tensor) or state.dim() != dim):
                return None
        if dim == 1:
            input = input.unsqueeze(0)
            h, c = (None if state is None else state.unsqueeze(0) for state in (h, c))
        weight_dtype = weight_dtype_name(self.weight_dtype, False)
        return self._op, self._kind, input, h, c, self._weights(), weight_dtype

    def _step(self, input: Any, h: Any, c: Any) -> tuple[Tensor, State] | None:
        arguments = self._arguments(input, h, c)
        result = None if arguments is None else _cells.step(*arguments)
        if result is None or input.dim() == 2:
            return result
        h_new, c_new = result
        return h_new.squeeze(0), None if c_new is None else c_new.squeeze(0)

    def _encdec_fast_describe(self, input: Any, hx: Any = None) -> Description:
        """What `explain` asks of a module."""
        h, c = hx if isinstance(hx, (tuple, list)) else (hx, None)
        arguments = self._arguments(input, h, c)
        if arguments is None or not _cells.fits(*arguments[2:6]):
            raise TypeError("explain: these arguments do not fit the module; call it for the error")
        return _cells.describe_step(*arguments)


class LSTMCell(CellModule, torch.nn.LSTMCell):
    """torch.nn.LSTMCell on the kernels of this package; arguments and errors are torch's."""

    _op = LSTM_OP

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        pair = (None, None) if hx is None else hx
        if isinstance(pair, (tuple, list)) and len(pair) == 2:
            result = self._step(input, pair[0], pair[1])
            if result is not None and result[1] is not None:
                return result[0], result[1]
        # Arguments that do not fit: what comes of them is torch's to say.
        plain: tuple[Tensor, Tensor] = torch.nn.LSTMCell.forward(self, input, hx)
        return plain


class GRUCell(CellModule, torch.nn.GRUCell):
    """torch.nn.GRUCell on the kernels of this package; arguments and errors are torch's."""

    _op = GRU_OP

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        result = self._step(input, hx, None)
        plain: Tensor = torch.nn.GRUCell.forward(self, input, hx) if result is None else result[0]
        return plain


class RNNCell(CellModule, torch.nn.RNNCell):
    """torch.nn.RNNCell on the kernels of this package; arguments and errors are torch's."""

    _op = RNN_OP

    @property
    def _kind(self) -> str:
        return f"rnn_{self.nonlinearity}"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        known = self.nonlinearity in ("tanh", "relu")
        result = self._step(input, hx, None) if known else None
        plain: Tensor = torch.nn.RNNCell.forward(self, input, hx) if result is None else result[0]
        return plain
