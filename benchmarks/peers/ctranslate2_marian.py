"""CTranslate2 with the weights of a MarianMTModel of transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctranslate2
from ctranslate2.converters.transformers import MarianMTLoader
from torch import Tensor

MODES = ("float32", "int8", "int8_float32", "int8_bfloat16", "int16")


def convert(model: Any, folder: Path) -> None:
    """Write a model in CTranslate2's format. Its pad token is the last one, and is left out."""
    spec = MarianMTLoader().get_model_spec(model)
    tokens = [f"t{i}" for i in range(model.config.vocab_size - 1)]
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    end = tokens[model.config.eos_token_id]
    spec.config.eos_token = spec.config.bos_token = spec.config.decoder_start_token = end
    spec.config.unk_token = tokens[-1]
    spec.config.add_source_eos = spec.config.add_source_bos = False
    spec.validate()
    spec.optimize()
    spec.save(str(folder))


class Translators:
    """The same weights in every mode that this machine has."""

    def __init__(self, model: Any, threads: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "model"
        path.mkdir()
        convert(model, path)
        supported = ctranslate2.get_supported_compute_types("cpu")
        self.modes = {
            mode: ctranslate2.Translator(
                str(path), device="cpu", compute_type=mode, inter_threads=1, intra_threads=threads
            )
            for mode in MODES
            if mode in supported
        }

    def call(self, mode: str, source: Tensor, beams: int, length: int) -> Callable[[], Any]:
        """A call that translates `source` to targets of exactly `length` tokens."""
        translator = self.modes[mode]
        tokens = [[f"t{token}" for token in row] for row in source.tolist()]

        def run() -> Any:
            return translator.translate_batch(
                tokens,
                beam_size=beams,
                min_decoding_length=length,
                max_decoding_length=length,
                max_batch_size=0,
            )

        return run
