"""Whole encoder-decoder models, built from the modules of this package."""

from encdec_fast.models.recurrent import RecurrentEncoderDecoder
from encdec_fast.models.transformer import TransformerEncoderDecoder

__all__ = ["RecurrentEncoderDecoder", "TransformerEncoderDecoder"]
