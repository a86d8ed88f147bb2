"""Decoders as the engine runs them: which weights there are, and what is done with them.

A description holds the model's own tensors. `compiled` packs them for the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from encdec_fast.backends import library
from encdec_fast.ops._cpu import FORMATS

CELLS = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}
ATTENTIONS = {None: 0, "additive": 1, "dot": 2, "location": 3}
ACTIVATIONS = {"relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
NORMS = {"layer": 1, "rms": 2}


@dataclass(frozen=True)
class Affine:
    """y = x W' + b. weight (N, K), bias (N) or None."""

    weight: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(cls, linear: Any) -> Affine:
        """Of an nn.Linear."""
        return cls(linear.weight, linear.bias)

    def columns(self, first: int) -> tuple[Affine, Affine | None]:
        """Of the first features, with the bias, and of the others without; None: of none."""
        weight = self.weight
        others = Affine(weight[:, first:]) if weight.shape[1] > first else None
        return Affine(weight[:, :first], self.bias), others


@dataclass(frozen=True)
class Norm:
    """kind: "layer" (Ba et al., 2016) or "rms" (Zhang and Sennrich, 2019). weight, bias (D)."""

    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-5
    kind: str = "layer"

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> Norm:
        """Of an nn.LayerNorm with weights."""
        return cls(norm.weight, norm.bias, norm.eps)


@dataclass(frozen=True)
class RecurrentLayer:
    """input: (gates H, features) and hidden: (gates H, H), gates in torch's order."""

    input: Affine
    hidden: Affine
    cell: str = "lstm"


@dataclass(frozen=True)
class RecurrentDecoder:
    """An input-feeding recurrent decoder (`encdec_fast.nn.AttentionDecoder`), and layers above it.

    embedding (V, E). layers: the first reads [embedding; context], the second [state; context] (a
    decoder without attention: the state), the others the state below; contexts are of the memory's
    size M. attention: None (what stands in for a context is the same at each step: E. g. a vector
    of the bridge, or nothing), "additive", "dot" or "location". query: of the first layer's state,
    None: the state itself; keys: of the memory, None: itself; score (A): v of additive scores;
    location: from [embedding; state before] to the scores of positions. coverage (A): of additive
    scores, u: the sum of a position's weights so far, times u, is added to its key (Tu et al.,
    2016). attentional: of additive and dot scores, from [context; state] of the first layer; its
    tanh is read in the context's place, by the next step too (Luong et al., 2015, section 3.1).
    output: from [state; context], or without context_in_output from the state, to the scores of
    tokens.
    """

    embedding: Tensor
    layers: Sequence[RecurrentLayer]
    output: Affine
    context_size: int
    attention: str | None = None
    query: Affine | None = None
    keys: Affine | None = None
    score: Tensor | None = None
    location: Affine | None = None
    context_in_output: bool = True
    coverage: Tensor | None = None
    attentional: Affine | None = None

    @property
    def hidden_size(self) -> int:
        return self.layers[0].hidden.weight.shape[1]

    @property
    def fed_size(self) -> int:
        """Of the context, or of what stands in its place."""
        return self.context_size if self.attentional is None else len(self.attentional.weight)

    @property
    def attends(self) -> bool:
        return self.attention is not None

    @property
    def max_target_length(self) -> int | None:
        return None

    @property
    def max_source_length(self) -> int | None:
        return None if self.location is None else self.location.weight.shape[0]

    def _check_columns(self) -> None:
        """RuntimeError for weights that would be read past their ends."""
        H, fed = self.hidden_size, self.fed_size
        below = [self.embedding.shape[1] + fed, H + fed if self.attends else H]
        expected = [
            (f"layer {i}", layer.input, below[i] if i < 2 else H)
            for i, layer in enumerate(self.layers)
        ]
        expected.append(("output", self.output, H + fed if self.context_in_output else H))
        if self.attentional is not None:
            expected.append(("attentional", self.attentional, self.context_size + H))
        for name, affine, columns in expected:
            found = affine.weight.shape[1]
            if found != columns:
                raise RuntimeError(f"generate: {name} must read {columns} features, not {found}")

    def compile(self, pack: Packing) -> Any:
        """The engine's model. RuntimeError for weights whose sizes do not fit each other."""
        self._check_columns()
        H = self.hidden_size
        A = 0
        if self.attention in ("additive", "dot"):
            A = H if self.query is None else self.query.weight.shape[0]
        sizes = {
            "embedding_size": self.embedding.shape[1],
            "hidden_size": H,
            "context_size": self.context_size,
            "fed_size": self.fed_size,
            "attention_size": A,
            "attention": ATTENTIONS[self.attention],
            "embedding": pack.table(self.embedding),
        }
        own, context = self.output.columns(H)
        sizes["output"] = pack.affine(own)
        if context is not None:
            sizes["output_context"] = pack.affine(context)
        for name in ("query", "location"):
            affine = getattr(self, name)
            if affine is not None:
                sizes[name] = pack.affine(affine)
        if self.keys is not None:
            sizes["memory_keys"] = pack.affine(self.keys)
        if self.score is not None:
            sizes["score"] = pack.vector(self.score)
        if self.coverage is not None:
            sizes["coverage_weight"] = pack.vector(self.coverage)
        if self.attentional is not None:
            weight, M = self.attentional.weight, self.context_size
            sizes["attentional"] = pack.affine(Affine(weight[:, :M]))
            sizes["attentional_state"] = pack.affine(Affine(weight[:, M:], self.attentional.bias))
        layers = [self._compile_layer(index, pack) for index in range(len(self.layers))]
        assert library.extension is not None
        return library.extension.RecurrentModel(sizes, layers, *pack.rest())

    def _compile_layer(self, index: int, pack: Packing) -> dict[str, Any]:
        layer = self.layers[index]
        features = self.embedding.shape[1] if index == 0 else self.hidden_size
        found: dict[str, Any] = {"cell": CELLS[layer.cell], "hidden": pack.affine(layer.hidden)}
        own, context = layer.input.columns(features)
        # No more tokens than features: their gates are no more numbers than the weights.
        if index == 0 and self.embedding.shape[0] <= features:
            found["token_gates"] = pack.products(self.embedding, own)
        else:
            found["input"] = pack.affine(own)
        if context is not None:
            found["context"] = pack.affine(context)
        return found

    def start(self, model: Any) -> Any:
        """The engine's decoder: the states of one search at a time."""
        assert library.extension is not None
        return library.extension.RecurrentDecoder(model)


@dataclass(frozen=True)
class TransformerLayer:
    """A decoder layer: attention to what was written, to the memory, and a feed-forward block.

    The three norms follow their blocks, or with norm_first precede them. gate: of gated blocks,
    activation(gate(x)) * up(x) (Shazeer, 2020, arXiv:2002.05202).
    """

    self_query: Affine
    self_key: Affine
    self_value: Affine
    self_out: Affine
    cross_query: Affine
    cross_key: Affine
    cross_value: Affine
    cross_out: Affine
    up: Affine
    down: Affine
    self_norm: Norm
    cross_norm: Norm
    feed_norm: Norm
    gate: Affine | None = None


@dataclass(frozen=True)
class TransformerDecoder:
    """A Transformer decoder with its embedding and its output.

    embedding (V, D), times embedding_scale; positions (P, D), of which position t has row t +
    position_offset, or None; embedding_norm: after their sum. attention_scale: of a query's
    products; None: 1 / sqrt(head size). position_bias (heads, P): added to the scores by distance
    (T5); None: none. final_norm: after the last layer. output_scale: of what output is given.
    """

    embedding: Tensor
    layers: Sequence[TransformerLayer]
    output: Affine
    heads: int
    norm_first: bool = False
    activation: str = "relu"
    embedding_scale: float = 1.0
    positions: Tensor | None = None
    position_offset: int = 0
    embedding_norm: Norm | None = None
    final_norm: Norm | None = None
    attention_scale: float | None = None
    position_bias: Tensor | None = None
    output_scale: float = 1.0

    @property
    def head_size(self) -> int:
        return self.layers[0].self_query.weight.shape[0] // self.heads

    @property
    def attends(self) -> bool:
        return True

    @property
    def max_target_length(self) -> int | None:
        if self.positions is not None:
            return self.positions.shape[0] - self.position_offset
        return None if self.position_bias is None else self.position_bias.shape[1]

    @property
    def max_source_length(self) -> int | None:
        return None

    def compile(self, pack: Packing) -> Any:
        """The engine's model."""
        scale = self.attention_scale
        sizes: dict[str, Any] = {
            "model_size": self.embedding.shape[1],
            "heads": self.heads,
            "head_size": self.head_size,
            "feed_forward_size": self.layers[0].up.weight.shape[0],
            "norm_first": self.norm_first,
            "activation": ACTIVATIONS[self.activation],
            "attention_scale": self.head_size**-0.5 if scale is None else scale,
            "embedding_scale": self.embedding_scale,
            "output_scale": self.output_scale,
            "position_offset": self.position_offset,
            "embedding": pack.table(self.embedding),
            "output": pack.affine(self.output),
        }
        if self.positions is not None:
            sizes["positions"] = pack.table(self.positions)
        if self.position_bias is not None:
            sizes["bias_length"] = self.position_bias.shape[1]
            sizes["position_bias"] = pack.vector(self.position_bias)
        for name in ("embedding_norm", "final_norm"):
            norm = getattr(self, name)
            if norm is not None:
                sizes[name] = pack.norm(norm)
        layers = [self._compile_layer(layer, pack) for layer in self.layers]
        assert library.extension is not None
        return library.extension.TransformerModel(sizes, layers, *pack.rest())

    @staticmethod
    def _compile_layer(layer: TransformerLayer, pack: Packing) -> dict[str, Any]:
        names = {"cross_key": "memory_key", "cross_value": "memory_value"}
        found: dict[str, Any] = {}
        for name, part in vars(layer).items():
            if isinstance(part, Affine):
                found[names.get(name, name)] = pack.affine(part)
            elif isinstance(part, Norm):
                found[name] = pack.norm(part)
        return found

    def start(self, model: Any) -> Any:
        """The engine's decoder: the caches of one search at a time."""
        assert library.extension is not None
        return library.extension.TransformerDecoder(model)


Decoder = RecurrentDecoder | TransformerDecoder


@dataclass
class Packing:
    """What the engine is given of tensors: addresses, what must live with the model (alive), and
    what must live while it packs (scratch).

    weight_dtype: "float32", "bfloat16" or "int8". watched: matrices whose values are sampled again
    before each search, beside those that are packed.
    """

    weight_dtype: str
    watched: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    alive: list[Tensor] = field(default_factory=list)
    scratch: list[Tensor] = field(default_factory=list)

    def rest(self) -> tuple[Any, ...]:
        """The arguments of the engine's models that are the same for all."""
        formats = {"float32": 0, "bfloat16": 1, "int8": 3}
        return self.watched, formats[self.weight_dtype], torch.get_num_threads()

    def _matrix(self, tensor: Tensor) -> tuple[int, int, int, int, int]:
        tensor = tensor.detach()
        if tensor.dtype not in FORMATS:
            tensor = tensor.float()
        if tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        self.alive.append(tensor)
        rows = tensor.shape[0] if tensor.dim() == 2 else 1
        stride = tensor.stride(0) if tensor.dim() == 2 else tensor.shape[-1]
        return (tensor.data_ptr(), FORMATS[tensor.dtype], rows, tensor.shape[-1], stride)

    def table(self, tensor: Tensor) -> tuple[int, int, int, int, int]:
        """A matrix that is read row by row as it lies."""
        matrix = self._matrix(tensor)
        self.watched.append(matrix)
        return matrix

    def vector(self, tensor: Tensor | None) -> int:
        """Numbers that are copied as floats; 0 for none."""
        if tensor is None:
            return 0
        self.watched.append(self._matrix(tensor.flatten() if tensor.dim() > 1 else tensor))
        copy = tensor.detach().float().contiguous()
        self.alive.append(copy)
        return copy.data_ptr()

    def affine(self, affine: Affine) -> tuple[Any, int]:
        return self._matrix(affine.weight), self.vector(affine.bias)

    def products(self, rows: Tensor, affine: Affine) -> int:
        """affine of each row, as floats that are copied."""
        self.table(affine.weight)
        self.vector(affine.bias)
        for first in range(0, len(rows), 64):  # 64 samples: no row that none is of
            self.table(rows[first : first + 64])
        bias = None if affine.bias is None else affine.bias.detach().double()
        found = nn.functional.linear(rows.detach().double(), affine.weight.detach().double(), bias)
        self.scratch.append(found.float())
        return self.scratch[-1].data_ptr()

    def norm(self, norm: Norm) -> tuple[int, int, int, float]:
        return NORMS[norm.kind], self.vector(norm.weight), self.vector(norm.bias), norm.eps


class Parts(NamedTuple):
    """What a description consists of, in the order of its fields: tensors, and all else."""

    tensors: list[Tensor]
    settings: list[Any]


def parts_of(description: Any) -> Parts:
    """Found once for a description, which does not change."""
    found: Parts | None = vars(description).get("_parts")
    if found is None:
        found = Parts([], [])
        _collect(description, found)
        object.__setattr__(description, "_parts", found)
    return found


def _collect(part: Any, found: Parts) -> None:
    if isinstance(part, Tensor):
        found.tensors.append(part)
    elif isinstance(part, (list, tuple)):
        for item in part:
            _collect(item, found)
    elif is_dataclass(part):
        for item in list(vars(part).values()):
            _collect(item, found)
    else:
        found.settings.append(part)
