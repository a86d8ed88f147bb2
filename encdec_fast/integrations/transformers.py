"""transformers' generate on the engine.

    model = encdec_fast.integrations.transformers.optimize(model)
    model.generate(...)  # as before
    print(encdec_fast.explain(model.generate, ...))  # what runs it, and why

transformers (5.x up to 5.24) prepares a call as ever: it merges configs and arguments, runs the
encoder, makes the first tokens. In place of its own decoding method it is given the engine's
(`custom_generate`). What the engine lacks is told by one line of the log, and the call begins anew
with transformers' own method.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from encdec_fast import nn, ops
from encdec_fast.backends import Backend, Description, library, requested_backend, select
from encdec_fast.generation import NotDescribed, TransformerDecoder, device, engine
from encdec_fast.generation._snapshot import Snapshot
from encdec_fast.generation.generate import WEIGHT_DTYPES
from encdec_fast.integrations import _transformers_encoders as encoders
from encdec_fast.integrations import _transformers_requests as requests
from encdec_fast.integrations._transformers_decoders import SUPPORTED, Kept, by_distance, describe
from encdec_fast.ops import _packing
from encdec_fast.ops._call import autocasting

_M = TypeVar("_M", bound=torch.nn.Module)
_log = logging.getLogger(__name__)
hf: Any = requests.hf

# Arguments that only transformers' own methods know what to do with.
_FOREIGN = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "assistant_model",
    "assistant_tokenizer",
    "tokenizer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "synced_gpus",
    "custom_generate",
    "cache_implementation",
    "cache",
    "past_key_values",
    "inputs_embeds",
    "decoder_inputs_embeds",
    "decoder_attention_mask",
    "return_timestamps",
    "return_token_timestamps",
)
DISTANCES = 512  # of relative positions, unless a search needs more


class Call(NamedTuple):
    """What the backends judge."""

    model: str
    reasons: tuple[str, ...]
    device: str
    weight_dtype: str


class _Told(Exception):
    """Ends a call that `explain` began, with the verdict on it."""

    def __init__(self, call: Call, sizes: str) -> None:
        super().__init__()
        self.call, self.sizes = call, sizes


class _Refused(Exception):
    """Ends a call on the engine: it is to begin anew with transformers' own method."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        super().__init__()
        self.reasons = reasons


def _why_not_engine(call: Call) -> list[str]:
    reasons = list(call.reasons)
    if library.extension is None:
        reasons.insert(0, "the compiled module encdec_fast._C is not loaded")
    if call.device != "cpu":
        reasons.append(f"the model is on {call.device}")
    return reasons


def _why_not_device(call: Call) -> list[str]:
    return [*call.reasons, *device.why_not(call.device, call.weight_dtype)]


def _refuse(search: _Search, prepared: requests.Prepared) -> Any:
    raise _Refused(search.reasons)


BACKENDS = (
    Backend("triton", lambda search, prepared: search.run(prepared, device.run), _why_not_device),
    Backend("cpu", lambda search, prepared: search.run(prepared, engine.run), _why_not_engine),
    Backend("torch", _refuse, lambda call: []),
)


class Generate:
    """What `optimize` puts in the place of a model's generate; it takes the same arguments.

    model: whose it is. weight_dtype: how the engine holds the decoder's weights, as for `optimize`.
    """

    def __init__(self, model: Any, weight_dtype: torch.dtype | str | None) -> None:
        self.model = model
        self.weight_dtype = weight_dtype
        self._kept = Kept()
        self._distances = DISTANCES
        self._described: TransformerDecoder | None = None
        self._snapshot: Snapshot | None = None
        self._told: set[tuple[str, ...]] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Neither copies nor files have a use for what is computed from the weights.
        return {"model": self.model, "weight_dtype": self.weight_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Generate.__init__(self, **state)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the generate of the model's class; see there for arguments, results and errors.

        With return_dict_in_generate a beam search has sequences_scores, with or without
        output_scores; beam_indices and the cache are None.
        """
        method = type(self.model).generate
        if requested_backend() == "torch":
            return method(self.model, *args, **kwargs)
        try:
            return self._start(args, kwargs, explaining=False)
        except _Refused as refused:
            reasons = refused.reasons
        level = logging.INFO if reasons in self._told else logging.WARNING
        self._told.add(reasons)
        _log.log(level, "generate of transformers runs, not the engine: %s", "; ".join(reasons))
        return method(self.model, *args, **kwargs)

    def _encdec_fast_describe(self, *args: Any, **kwargs: Any) -> Description:
        """What `explain` asks; the encoder runs, since it is part of what transformers prepares."""
        try:
            self._start(args, kwargs, explaining=True)
        except _Told as told:
            call, sizes = told.call, told.sizes
        weights = self.packed_dtype

        def plan(backend: str) -> str:
            return f"weights of the decoder in {weights}" if backend in ("cpu", "triton") else ""

        return Description("generate", BACKENDS, call, sizes, plan)

    @property
    def packed_dtype(self) -> str:
        """How the engine holds the weights: as asked for, or as the model does."""
        asked = self.weight_dtype
        return WEIGHT_DTYPES.get(self.model.dtype if asked is None else asked, "float32")

    def describe(self, length: int) -> TransformerDecoder:
        """The decoder, that can read so many tokens. NotDescribed where the engine has none."""
        # A table that grows is a table that is packed anew, with all else: so at least twice.
        if length > self._distances:
            self._distances = 1 << (length - 1).bit_length()
        known = self._described
        if known is None or self._snapshot is None or not self._snapshot.fresh():
            self._described = None
            found = describe(self.model, self._kept, self._distances)
            self._snapshot = Snapshot(self.model)
        elif known.position_bias is None:
            return known
        else:
            table = by_distance(self.model, self._kept, self._distances)
            found = known if table is known.position_bias else replace(known, position_bias=table)
        self._described = found
        return found

    def _start(self, args: Any, kwargs: Any, explaining: bool) -> Any:
        """Let transformers prepare the call for the engine. _Refused where the engine cannot."""
        method = type(self.model).generate
        given = _by_name(method, (self.model, *args), kwargs)
        reasons = [
            f"the argument {name}" for name in _FOREIGN if requests.is_given(given.get(name))
        ]
        if autocasting(self.model.device.type):
            reasons.append("torch.autocast is on")
        try:
            decoder = self.describe(1)
        except NotDescribed as error:
            reasons.append(str(error))
        if reasons:
            _judge(self, tuple(reasons), type(self.model).__name__, explaining)
            raise _Refused(tuple(reasons))
        streamer = given.pop("streamer", None)
        given["custom_generate"] = _Search(self, decoder, streamer, explaining)
        return method(self.model, **given)


def _by_name(method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A method's arguments but the first. TypeError as a call with them would raise it."""
    bound = inspect.signature(method).bind(*args, **kwargs).arguments
    first = next(iter(bound))
    others = {name: value for name, value in bound.items() if name not in (first, "kwargs")}
    return {**others, **bound.get("kwargs", {})}


def _judge(owner: Generate, reasons: tuple[str, ...], sizes: str, explaining: bool) -> Backend:
    """Which backend runs. BackendRefused where the one that was asked for cannot."""
    call = _call_of(owner, reasons)
    if explaining:
        raise _Told(call, sizes)
    return select(BACKENDS, call)


def _call_of(owner: Generate, reasons: tuple[str, ...]) -> Call:
    model = owner.model
    return Call(type(model).__name__, reasons, model.device.type, owner.packed_dtype)


class _Search:
    """A decoding method as transformers calls it."""

    def __init__(
        self, owner: Generate, decoder: TransformerDecoder, streamer: Any, explaining: bool
    ) -> None:
        self.owner, self.decoder, self.streamer = owner, decoder, streamer
        self.explaining = explaining
        self.masked = "Whisper" not in type(owner.model).__name__
        self.reasons: tuple[str, ...] = ()

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        prepared = requests.Prepared(
            input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
        )
        self.reasons = tuple(self._why_not(prepared))
        sizes = "{} B={} S={} beams={} max_length={}".format(
            type(model).__name__,
            *prepared.memory.shape[:2],
            generation_config.num_beams,
            generation_config.max_length,
        )
        backend = _judge(self.owner, self.reasons, sizes, self.explaining)
        if not self.reasons:  # what speaks against the engines, should neither run
            call = _call_of(self.owner, ())
            verdicts = (f"{b.name}: {'; '.join(b.why_not(call))}" for b in BACKENDS[:-1])
            self.reasons = tuple(verdicts) if backend is BACKENDS[-1] else ()
        return backend.run(self, prepared)

    def _why_not(self, prepared: requests.Prepared) -> list[str]:
        reasons = list(requests.why_not(prepared, self.masked))
        if self.streamer is not None and prepared.first.shape[0] > 1:
            reasons.append("a streamer of more than one sequence")
        if not reasons:
            try:
                self._fit(prepared)
            except (NotDescribed, ValueError) as error:
                reasons.append(str(error))
        return reasons

    def _fit(self, prepared: requests.Prepared) -> None:
        # The last token is written, but not read.
        needed = prepared.config.max_length - 1
        if self.decoder.position_bias is not None and needed > self.decoder.position_bias.shape[1]:
            self.decoder = self.owner.describe(needed)
        self.config = requests.options(prepared, self.decoder)

    def run(self, prepared: requests.Prepared, search: Callable[..., Any]) -> Any:
        """Search, and return what transformers' decoding methods return; search: an engine's."""
        streamer = self.streamer

        def written(_: int, tokens: list[int]) -> None:
            for token in tokens:
                streamer.put(torch.tensor([token]))

        if streamer is not None:
            streamer.put(prepared.first.cpu())
        found = search(
            self.owner,
            self.decoder,
            engine.Encoded(prepared.memory, requests.lengths(prepared, self.masked)),
            [engine.Request(prompt, [], i) for i, prompt in enumerate(prepared.prompts)],
            self.config,
            weight_dtype=self.owner.packed_dtype,
            # From torch's generator, as transformers' draws are.
            seed=int(torch.randint(2**63 - 1, ())) if self.config.do_sample else 0,
            written=None if streamer is None else written,
        )
        if streamer is not None:
            streamer.end()
        return requests.result(prepared, found)


def optimize(model: _M, weight_dtype: torch.dtype | str | None = None) -> _M:
    """Make `model.generate` run on the engine, in place; return `model`.

    model: a MarianMTModel, BartForConditionalGeneration, MBartForConditionalGeneration,
        T5ForConditionalGeneration or WhisperForConditionalGeneration, not of a subclass.
    weight_dtype: in which the weights are held for generate: None (as in the model),
        torch.bfloat16 or "int8". The parameters keep theirs.

    The decoder's weights are packed in the first call, and anew when they change. The encoder's
    modules become this package's, as `encdec_fast.optimize` makes them, and its layers, but T5's,
    compute activation, residual and norm where the products are: with a weight_dtype they raise
    RuntimeError where a gradient is needed, so `restore` before training. Doing it again
    changes weight_dtype. Copies and pickles of the model are optimized models too.

    What the engine does not do, such as stopping criteria of your own, scores of each step,
    timestamps, int8 weights on a GPU, a model in training mode, runs on transformers' own decoding
    (behind an encoder that keeps its weight_dtype), with the reason in the log of this module: as a
    warning the first time, then as information. `encdec_fast.explain` tells it beforehand. In
    bfloat16 and float16 models the engine's sums on the CPU are float32, transformers' are not.

    TypeError for another class; RuntimeError where somebody else replaced generate; ValueError for
    another weight_dtype.
    """
    _check(model)
    changed: Any = model
    if not isinstance(changed.__dict__.get("generate"), Generate | None):
        raise RuntimeError(f"optimize: this {type(model).__name__} has a generate of its own")
    nn.optimize(changed.get_encoder(), weight_dtype)
    encoders.fuse(changed.get_encoder())
    ops.repack(changed.get_encoder())  # what was packed in another weight_dtype
    changed.generate = Generate(model, weight_dtype)
    return model


def restore(model: _M) -> _M:
    """Undo `optimize`, in place; return `model`. TypeError for a class that it does not take."""
    _check(model)
    changed: Any = model
    if isinstance(changed.__dict__.get("generate"), Generate):
        del changed.generate
        encoders.restore(changed.get_encoder())
        nn.restore(changed.get_encoder())
        ops.repack(changed.get_encoder())
    return model


def memory(model: torch.nn.Module) -> dict[str, int]:
    """The bytes that packed weights take beside the model's own: of its encoder and its decoder.

    Nothing is packed before it is used. TypeError as for `optimize`.
    """
    _check(model)
    changed: Any = model
    own = {id(parameter) for parameter in changed.get_encoder().parameters()}
    packs = [e.blob.nbytes for k, e in list(_packing._entries.items()) if own & set(k[2:])]
    generate = changed.__dict__.get("generate")
    packed = engine.packed_bytes(generate) if isinstance(generate, Generate) else {}
    return {"encoder": sum(packs), "decoder": sum(packed.values())}


def _check(model: Any) -> None:
    name = type(model).__name__
    if name not in SUPPORTED or type(model) is not getattr(hf, name):
        raise TypeError(f"{name} is none of the classes that are supported: {', '.join(SUPPORTED)}")
