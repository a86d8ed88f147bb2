"""What the recurrent modules share: from a module and its arguments to a network of ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from encdec_fast.backends import Description
from encdec_fast.ops import _checks, _public, _recurrent
from encdec_fast.ops._call import LayerResult, State, weight_dtype_name
from encdec_fast.ops._cpu import run_again
from encdec_fast.ops._layer import LayerOp
from encdec_fast.ops._recurrent import Arguments, Network

Lengths: TypeAlias = Tensor | Sequence[int] | None


_KINDS = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}


class RecurrentModule(torch.nn.RNNBase):
    """What a recurrent module of this package adds to torch's.

    weight_dtype: None, torch.bfloat16 or "int8": the dtype in which inference holds the weights.
    It is no part of the state_dict.
    """

    weight_dtype: torch.dtype | str | None = None
    _op: LayerOp

    def _weights(self) -> list[Tensor]:
        """The weights in torch's order, as they are now: functional_call swaps them."""
        parameters: Any = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]
        except KeyError:  # weight_norm, pruning and the like keep some as plain attributes
            return [getattr(self, name) for name in self._flat_weights_names]

    def _network(self) -> Network:
        return Network(
            self._op,
            _KINDS[self.mode],
            self.num_layers,
            self.bidirectional,
            self.batch_first,
            self.proj_size > 0,
            weight_dtype_name(self.weight_dtype, False),
        )

    def _states(self, hx: Any, dim: int) -> tuple[State, State] | None:
        """(h0, c0), of `dim` dimensions each, or None if that is not what `hx` holds."""
        if hx is None:
            return None, None
        if self.mode == "LSTM":
            if not isinstance(hx, (tuple, list)) or len(hx) != 2:
                return None
            h0, c0 = hx
            if not isinstance(c0, Tensor) or c0.dim() != dim:
                return None
        else:
            h0, c0 = hx, None
        return (h0, c0) if isinstance(h0, Tensor) and h0.dim() == dim else None

    def _arguments(
        self, input: Any, hx: Any, lengths: Lengths, cell_states: bool, resets: Any = None
    ) -> Arguments | None:
        """The arguments of the network of ops, or None where torch must decide."""
        if resets is not None and (lengths is not None or isinstance(input, PackedSequence)):
            raise ValueError("resets come with neither lengths nor a PackedSequence")
        net = self._network()
        weights = self._weights()
        dropout = self.dropout if self.training else 0.0
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths needs a padded 3-D input: a PackedSequence has its own")
            states = self._states(hx, 3)
            if states is None:
                return None
            h0, c0 = states
            order = input.sorted_indices
            if h0 is not None and order is not None:
                h0 = h0.index_select(1, order)
                c0 = None if c0 is None else c0.index_select(1, order)
            batch_sizes = input.batch_sizes
            return Arguments(
                net, input.data, h0, c0, weights, dropout, None, batch_sizes, cell_states
            )
        dim = input.dim()
        states = self._states(hx, dim) if dim in (2, 3) else None
        if states is None:
            return None
        h0, c0 = states
        checked = None if resets is None else _checks.as_resets(resets, input)
        if dim == 2:
            if lengths is not None:
                raise ValueError("lengths needs a batched 3-D input, not a single 2-D sequence")
            input = input.unsqueeze(0 if self.batch_first else 1)
            checked = None if checked is None else checked.unsqueeze(0 if self.batch_first else 1)
            h0 = None if h0 is None else h0.unsqueeze(1)
            c0 = None if c0 is None else c0.unsqueeze(1)
        if lengths is not None:
            checked = _checks.as_lengths(lengths, input, self.batch_first)
        return Arguments(net, input, h0, c0, weights, dropout, checked, None, cell_states)

    def _run(
        self, input: Any, hx: Any, lengths: Lengths, cell_states: bool, resets: Any = None
    ) -> tuple[Any, Any, Any, Any] | None:
        """(output, h_n, c_n, cells), in the form of the input; None where torch must decide."""
        ragged = lengths is not None or resets is not None
        if type(input) is Tensor and hx is None and not ragged and input.dim() == 3:
            # Nothing is left to convert. Small calls feel the rest.
            weights = self._weights()
            if self.num_layers == 1 and not self.bidirectional:
                name = weight_dtype_name(self.weight_dtype, False)
                kind = _KINDS[self.mode]
                layer = run_again(kind, input, weights, name, self.batch_first, cell_states)
                if layer is not None:
                    return layer
            net, dropout = self._network(), self.dropout if self.training else 0.0
            rest = (dropout, None, None, cell_states)
            return _recurrent.run(net, input, None, None, weights, *rest)
        arguments = self._arguments(input, hx, lengths, cell_states, resets)
        if arguments is None:
            return None
        result = _recurrent.run(*arguments)
        if result is None:
            return None
        if arguments.batch_sizes is not None:
            return _packed(result, input)
        if input.dim() == 2:
            return _recurrent.unbatched(result, self.batch_first)
        return result

    def _decline(self, lengths: Lengths, cell_states: bool, resets: Any = None) -> None:
        """TypeError for what torch accepts, but not together with this package's own options."""
        own = lengths is not None or resets is not None or cell_states
        if own or self.weight_dtype is not None:
            raise TypeError(
                "lengths, resets, return_cell_states and weight_dtype need plain tensors of one "
                "dtype: torch's own module, which runs these arguments, does not have them"
            )

    def _encdec_fast_describe(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Lengths = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> Description:
        """What `explain` asks of a module."""
        arguments = self._arguments(input, hx, lengths, return_cell_states, resets)
        if arguments is None or not arguments.fit():
            raise TypeError("explain: these arguments do not fit the module; call it for the error")
        return _public.describe_network(arguments)


def _packed(result: LayerResult, input: PackedSequence) -> tuple[Any, Any, Any, Any]:
    """Results as PackedSequence, and states in the order that the sequences had before packing."""
    output, h_n, c_n, cells = result
    _, batch_sizes, order, back = input
    if back is not None:
        h_n = h_n.index_select(1, back)
        c_n = None if c_n is None else c_n.index_select(1, back)

    def pack(values: State) -> PackedSequence | None:
        return None if values is None else PackedSequence(values, batch_sizes, order, back)

    return pack(output), h_n, c_n, pack(cells)
