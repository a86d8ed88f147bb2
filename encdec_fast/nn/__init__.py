"""Drop-in modules, and `optimize`, which puts them into a model that already exists."""

from encdec_fast.nn import _dynamo
from encdec_fast.nn.additive_attention import AdditiveAttention
from encdec_fast.nn.attention_decoder import AttentionDecoder, AttentionDecoderCell
from encdec_fast.nn.bridge import AttentionBridge, Bridge, DirectBridge, GatedBridge
from encdec_fast.nn.cells import GRUCell, LSTMCell, RNNCell
from encdec_fast.nn.cross_entropy import CrossEntropyLoss
from encdec_fast.nn.gru import GRU
from encdec_fast.nn.layer_norm import LayerNorm
from encdec_fast.nn.linear import Linear
from encdec_fast.nn.location_attention import LocationAttention
from encdec_fast.nn.lstm import LSTM
from encdec_fast.nn.luong_attention import LuongAttention
from encdec_fast.nn.multihead_attention import MultiheadAttention
from encdec_fast.nn.optimize import (
    OptimizationReport,
    ReportLine,
    optimization_report,
    optimize,
    restore,
)
from encdec_fast.nn.rnn import RNN
from encdec_fast.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder
from encdec_fast.nn.transformer_layers import TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "AttentionBridge",
    "AttentionDecoder",
    "AttentionDecoderCell",
    "Bridge",
    "CrossEntropyLoss",
    "DirectBridge",
    "GRUCell",
    "GatedBridge",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "LocationAttention",
    "LuongAttention",
    "MultiheadAttention",
    "OptimizationReport",
    "RNNCell",
    "ReportLine",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "optimization_report",
    "optimize",
    "restore",
]

_dynamo.install()
