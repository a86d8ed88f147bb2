"""A decoder's weights on the device, in the dtype of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from encdec_fast.generation.decoders import Affine, Norm, parts_of
from encdec_fast.ops.add_norm import add_norm
from encdec_fast.ops.linear import linear


def put(given: Tensor, to: Tensor) -> None:
    """A memory (B, S, M) into one that has room for more sentences and positions."""
    to.zero_()
    to[: given.shape[0], : given.shape[1]] = given


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies, and how: one that lies there in the same way has the same numbers."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


class Weights:
    """The model's own tensors where they have this dtype, else copies of them.

    Copies are made anew for each search (`refresh`), so that they are never stale; a captured graph
    reads them, and the model's own, where they lie. All searches with a decoder share them.
    """

    def __init__(self, decoder: Any, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._copies: dict[tuple[Any, ...], Tensor] = {}
        self._joined: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}
        self._parts: list[tuple[tuple[Any, ...], Tensor]] = []  # of joined ones: whose, and where
        for tensor in parts_of(decoder).tensors:
            if tensor.dtype != dtype or tensor.device != device:
                self._copies[place_of(tensor)] = tensor.detach().to(device=device, dtype=dtype)

    def refresh(self, decoder: Any) -> None:
        """Copy the tensors of a description of the same decoder as they are now."""
        now = {place_of(tensor): tensor.detach() for tensor in parts_of(decoder).tensors}
        for place, copy in (*self._copies.items(), *self._parts):
            copy.copy_(now[place])

    def join(self, affines: Sequence[Affine]) -> tuple[Tensor, Tensor | None]:
        """(weight, bias) of one product in the place of several of the same input."""
        places = tuple(place_of(affine.weight) for affine in affines)
        if places in self._joined:
            return self._joined[places]
        weight = torch.cat([self(affine.weight) for affine in affines])
        sizes = [affine.weight.shape[0] for affine in affines]
        bias = None
        if any(affine.bias is not None for affine in affines):
            bias = self.zeros(sum(sizes))
        for i, affine in enumerate(affines):
            self._parts.append((places[i], weight.split(sizes)[i]))
            if affine.bias is not None and bias is not None:
                self._parts.append((place_of(affine.bias), bias.split(sizes)[i]))
        self._joined[places] = weight, bias
        return weight, bias

    def __call__(self, tensor: Tensor) -> Tensor:
        found = self._copies.get(place_of(tensor))
        return tensor.detach() if found is None else found

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def rows(self, table: Tensor, places: Tensor) -> Tensor:
        """Rows of a table; places beyond its ends are the nearest."""
        return F.embedding(places.clamp(0, table.shape[0] - 1), self(table))

    def affine(
        self,
        affine: Affine,
        x: Tensor,
        activation: str | None = None,
        residual: Tensor | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """activation(x W' + b), and with a norm norm(residual + x W' + b)."""
        weight, bias = self(affine.weight), None if affine.bias is None else self(affine.bias)
        if activation is None and norm is None:
            return F.linear(x, weight, bias)
        options: dict[str, Any] = {}
        if norm is not None:
            options = {
                "norm": norm.kind,
                "norm_weight": self(norm.weight),
                "norm_bias": None if norm.bias is None else self(norm.bias),
                "norm_eps": norm.eps,
            }
        return linear(x, weight, bias, activation=activation, residual=residual, **options)

    def norm(self, norm: Norm, x: Tensor, residual: Tensor | None = None) -> Any:
        """The norm of x; with a residual that of their sum, and the sum."""
        bias = None if norm.bias is None else self(norm.bias)
        return add_norm(x, residual, self(norm.weight), bias, norm=norm.kind, eps=norm.eps)
