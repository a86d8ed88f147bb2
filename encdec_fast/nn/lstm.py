"""A drop-in torch.nn.LSTM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from encdec_fast.nn._recurrent import Lengths, RecurrentModule
from encdec_fast.ops.lstm import OP


class LSTM(RecurrentModule, torch.nn.LSTM):
    """torch.nn.LSTM on the kernels of this package, with `lengths`, `resets` and every cell state.

    Arguments, parameters, initial values, state_dict, inputs, outputs and errors are those of
    torch.nn.LSTM. Beyond it:

    lengths: the steps of each sequence of a padded 3-D input: int64 on the CPU, or a list, of shape
        (B), each from 1 to T, in any order. Steps past the end cost nothing and their output is
        zero; h_n and c_n are the states after each sequence's last step, and the reverse direction
        starts there. RuntimeError for other lengths.
    resets: bool, input's shape without its features, on its device: true where the state before a
        step is zero, so that another episode begins there (in the reverse direction it is the state
        from the step behind). With neither `lengths` nor a PackedSequence. RuntimeError for others.
    return_cell_states: return (output, (h_n, c_n), cells) with every c_t of the last layer in
        output's layout, (T, B, D·H), zero past the end; a PackedSequence if the input is one.
    """

    _op = OP

    def forward(
        self,
        input: Any,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> tuple[Any, ...]:
        result = self._run(input, hx, lengths, return_cell_states, resets)
        if result is None:
            # Arguments that do not fit: what comes of them is torch's to say.
            plain: tuple[Any, ...] = torch.nn.LSTM.forward(self, input, hx)
            self._decline(lengths, return_cell_states, resets)
            return plain
        output, h_n, c_n, cells = result
        return (output, (h_n, c_n), cells) if return_cell_states else (output, (h_n, c_n))
