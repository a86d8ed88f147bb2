"""The ops, one file each: the one place that tells everything about it."""

from encdec_fast.ops._packing import repack
from encdec_fast.ops.add_norm import add_norm
from encdec_fast.ops.additive_attention import additive_attention
from encdec_fast.ops.attention import attention
from encdec_fast.ops.attention_decoder import attention_decoder
from encdec_fast.ops.cached_attention import cached_attention
from encdec_fast.ops.cross_entropy import cross_entropy
from encdec_fast.ops.direct_bridge import direct_bridge, merge_directions
from encdec_fast.ops.gated_bridge import gated_bridge
from encdec_fast.ops.gru import gru, gru_cell
from encdec_fast.ops.linear import linear
from encdec_fast.ops.location_attention import location_attention
from encdec_fast.ops.log_softmax_topk import log_softmax_topk
from encdec_fast.ops.lstm import lstm, lstm_cell
from encdec_fast.ops.multiplicative_attention import multiplicative_attention
from encdec_fast.ops.rnn import rnn, rnn_cell
from encdec_fast.ops.varlen_attention import varlen_attention

__all__ = [
    "add_norm",
    "additive_attention",
    "attention",
    "attention_decoder",
    "cached_attention",
    "cross_entropy",
    "direct_bridge",
    "gated_bridge",
    "gru",
    "gru_cell",
    "linear",
    "location_attention",
    "log_softmax_topk",
    "lstm",
    "lstm_cell",
    "merge_directions",
    "multiplicative_attention",
    "repack",
    "rnn",
    "rnn_cell",
    "varlen_attention",
]
