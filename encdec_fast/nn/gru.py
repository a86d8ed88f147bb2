"""A drop-in torch.nn.GRU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from encdec_fast.nn._recurrent import Lengths, RecurrentModule
from encdec_fast.ops.gru import OP


class GRU(RecurrentModule, torch.nn.GRU):
    """torch.nn.GRU on the kernels of this package, with `lengths` and `resets`.

    Arguments, parameters, initial values, state_dict, inputs, outputs and errors are those of
    torch.nn.GRU. Beyond it:

    lengths: the steps of each sequence of a padded 3-D input: int64 on the CPU, or a list, of shape
        (B), each from 1 to T, in any order. Steps past the end cost nothing and their output is
        zero; h_n is the state after each sequence's last step, and the reverse direction starts
        there. RuntimeError for other lengths.
    resets: bool, input's shape without its features, on its device: true where the state before a
        step is zero, so that another episode begins there (in the reverse direction it is the state
        from the step behind). With neither `lengths` nor a PackedSequence. RuntimeError for others.
    """

    _op = OP

    def forward(
        self,
        input: Any,
        hx: Tensor | None = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        result = self._run(input, hx, lengths, False, resets)
        if result is None:
            # Arguments that do not fit: what comes of them is torch's to say.
            plain: tuple[Any, Tensor] = torch.nn.GRU.forward(self, input, hx)
            self._decline(lengths, False, resets)
            return plain
        return result[0], result[1]
