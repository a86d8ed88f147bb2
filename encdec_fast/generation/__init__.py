"""From an encoder-decoder model to tokens: greedy, beam search and sampling."""

from encdec_fast.generation.config import GenerationConfig
from encdec_fast.generation.decoders import (
    Affine,
    Norm,
    RecurrentDecoder,
    RecurrentLayer,
    TransformerDecoder,
    TransformerLayer,
)
from encdec_fast.generation.describe import (
    NotDescribed,
    attention_decoder,
    recurrent_layers,
    transformer_decoder,
)
from encdec_fast.generation.device import release
from encdec_fast.generation.engine import Encoded, packed_bytes
from encdec_fast.generation.generate import Generates, GenerationOutput, generate
from encdec_fast.generation.result import Hypothesis
from encdec_fast.generation.step import search

__all__ = [
    "Affine",
    "Encoded",
    "Generates",
    "GenerationConfig",
    "GenerationOutput",
    "Hypothesis",
    "Norm",
    "NotDescribed",
    "RecurrentDecoder",
    "RecurrentLayer",
    "TransformerDecoder",
    "TransformerLayer",
    "attention_decoder",
    "generate",
    "packed_bytes",
    "recurrent_layers",
    "release",
    "search",
    "transformer_decoder",
]
