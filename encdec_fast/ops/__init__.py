"""The ops, one file each: the one place that tells everything about it."""

from encdec_fast.ops._packing import repack
from encdec_fast.ops.additive_attention import additive_attention
from encdec_fast.ops.attention import attention
from encdec_fast.ops.gru import gru, gru_cell
from encdec_fast.ops.linear import linear
from encdec_fast.ops.lstm import lstm, lstm_cell
from encdec_fast.ops.rnn import rnn, rnn_cell

__all__ = [
    "additive_attention",
    "attention",
    "gru",
    "gru_cell",
    "linear",
    "lstm",
    "lstm_cell",
    "repack",
    "rnn",
    "rnn_cell",
]
