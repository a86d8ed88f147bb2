"""Drop-in modules, and `optimize`, which puts them into a model that already exists."""

from encdec_fast.nn import _dynamo
from encdec_fast.nn.additive_attention import AdditiveAttention
from encdec_fast.nn.cells import GRUCell, LSTMCell, RNNCell
from encdec_fast.nn.gru import GRU
from encdec_fast.nn.linear import Linear
from encdec_fast.nn.lstm import LSTM
from encdec_fast.nn.optimize import (
    OptimizationReport,
    ReportLine,
    optimization_report,
    optimize,
    restore,
)
from encdec_fast.nn.rnn import RNN

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "GRUCell",
    "LSTMCell",
    "Linear",
    "OptimizationReport",
    "RNNCell",
    "ReportLine",
    "optimization_report",
    "optimize",
    "restore",
]

_dynamo.install()
