"""A model as a file of weights (safetensors) and a file that says what it is (JSON)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from encdec_fast.models import RecurrentEncoderDecoder, TransformerEncoderDecoder
from examples.g2p import GRAPHEMES, PHONEMES, Trouble

MODELS: dict[str, Any] = {
    "recurrent": RecurrentEncoderDecoder,
    "transformer": TransformerEncoderDecoder,
}


def build(model: str, arguments: dict[str, Any]) -> nn.Module:
    """A model between letters and phonemes; arguments: what else its class takes."""
    result: nn.Module = MODELS[model](len(GRAPHEMES), len(PHONEMES), **arguments)
    return result


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Written whole or not at all: what is there stays until the new file is complete."""
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(path)


def save_json(path: Path, content: dict[str, Any]) -> None:
    """As `save_tensors`."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Trouble if there is no such file or it is damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise Trouble(f"{path} cannot be read ({error}): train a model with --output") from None


def read_json(path: Path) -> dict[str, Any]:
    """Trouble if there is no such file or it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Trouble(f"{path} cannot be read ({error}): train a model with --output") from None
    if not isinstance(found, dict):
        raise Trouble(f"{path} does not hold a JSON object: train a model with --output")
    return found


def save_model(path: Path, model: nn.Module, about: dict[str, Any], dtype: torch.dtype) -> None:
    """path: of the weights (.safetensors); the JSON lies beside it. dtype: of the stored weights.

    about: "model" and "arguments", as for `build`, and whatever else is to be known.
    """
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    save_tensors(path, weights)
    save_json(path.with_suffix(".json"), about)


def load_model(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model, for inference in float32, and its JSON. Trouble if either cannot be read."""
    about = read_json(path.with_suffix(".json"))
    try:
        model = build(about["model"], about["arguments"])
        model.load_state_dict(read_tensors(path))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Trouble(f"{path} does not hold the model that its JSON tells of: {error}") from None
    return model.eval(), about
