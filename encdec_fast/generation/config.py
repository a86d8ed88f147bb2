"""What to search for, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

_MOST = 2**31 - 1


def _is_token(token: Any) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token <= _MOST


def _tokens(name: str, value: int | Sequence[int] | None) -> tuple[int, ...]:
    """One token or several as a tuple, in the order given."""
    if value is None:
        return ()
    found = (value,) if isinstance(value, int) else tuple(value)
    if not all(_is_token(token) for token in found):
        raise ValueError(f"{name} must be token ids, which are not negative, but it is {value!r}")
    return found


@dataclass(frozen=True)
class GenerationConfig:
    """How `generate` searches. Names and meanings are those of transformers' GenerationConfig.

    Lengths, in tokens of the target:
        max_length, min_length: with the start token and a prefix. max_new_tokens, min_new_tokens:
            without them, and used where both are given. Without either a target has at most 20
            tokens, as in transformers.
        max_time: seconds; hypotheses that are open then end as they are.

    The search:
        num_beams: hypotheses kept at each step; 1 is greedy. do_sample: draw tokens, with beams:
            beam sampling.
        length_penalty: a hypothesis scores its log probability / length ** length_penalty.
        early_stopping: True: end as soon as there are num_beams finished hypotheses; False: when
            an open one of the present length could not be better; "never": when none could.
        num_return_sequences: the best of num_beams, or, greedy with do_sample, so many draws.
        temperature, top_k (0: all), top_p: for do_sample. seed: of the draws; None: taken from
            torch's generator.
        coverage_penalty: beta of Wu et al., 2016 (arXiv:1609.08144), section 7: a finished
            hypothesis gets beta * sum over the source of log(min(attention it received, 1)). Needs
            a decoder with attention.

    Constraints:
        repetition_penalty, no_repeat_ngram_size, bad_words_ids, suppress_tokens,
        begin_suppress_tokens (at the first free place), forced_bos_token_id, forced_eos_token_id.
        vocabulary: the shortlist of tokens that may be written; None: all.
        prefix_bias: from 0 to 1, exclusive: `prefix` is no longer certain but biases the search:
            while a hypothesis follows it, p = (1 - prefix_bias) p + prefix_bias [its next token]
            (Arivazhagan et al., 2020, arXiv:2004.03643, section 4). None: the prefix is forced.

    Tokens: decoder_start_token_id, eos_token_id (one or several), pad_token_id (fills what follows
        the end; None: the first end token).

    max_batch_tokens: source positions, padding included, that are decoded together; None: all
        sentences at once. Results do not depend on it.

    Raises ValueError for options that contradict each other.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int = 0
    max_time: float | None = None
    num_beams: int = 1
    do_sample: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None
    coverage_penalty: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    vocabulary: Sequence[int] | None = None
    prefix_bias: float | None = None
    decoder_start_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    max_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        at_least = {
            "max_length": 1,
            "max_new_tokens": 1,
            "min_length": 0,
            "min_new_tokens": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "top_k": 0,
            "no_repeat_ngram_size": 0,
            "max_batch_tokens": 1,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is None and name in ("max_length", "max_new_tokens", "max_batch_tokens"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
            if value > _MOST:
                raise ValueError(f"{name} must be at most {_MOST}, but it is {value}")
        positive = ("temperature", "top_p", "repetition_penalty")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, but it is {getattr(self, name)!r}")
        if math.isnan(self.length_penalty):
            raise ValueError("length_penalty must be a number, but it is NaN")
        if self.top_p > 1:
            raise ValueError(f"top_p must be at most 1, but it is {self.top_p!r}")
        if self.max_time is not None and not self.max_time > 0:
            raise ValueError(f"max_time must be above 0 seconds, but it is {self.max_time!r}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f"early_stopping must be True, False or 'never', but it is {self.early_stopping!r}"
            )
        if not self.coverage_penalty >= 0:
            raise ValueError(
                f"coverage_penalty must not be negative, but it is {self.coverage_penalty!r}"
            )
        if self.prefix_bias is not None and not 0 < self.prefix_bias < 1:
            raise ValueError(
                f"prefix_bias must lie between 0 and 1, but it is {self.prefix_bias!r}"
            )
        if self.seed is not None and not isinstance(self.seed, int):
            raise ValueError(f"seed must be an integer, but it is {self.seed!r}")
        self._check_counts()
        self._check_tokens()

    def _check_counts(self) -> None:
        if self.num_return_sequences > self.num_beams and not self.draws:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}, but a search with "
                f"{self.num_beams} beams finds no more than {self.num_beams}; with do_sample and "
                "one beam any number can be drawn"
            )
        new = self.max_new_tokens
        if new is not None and self.min_new_tokens > new:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, above max_new_tokens, {new}"
            )
        if new is None and self.max_length is not None:
            for name in ("min_length", "min_new_tokens"):
                if getattr(self, name) > self.max_length:
                    raise ValueError(
                        f"{name} is {getattr(self, name)}, above max_length, {self.max_length}"
                    )

    def _check_tokens(self) -> None:
        forbidden = set(_tokens("suppress_tokens", self.suppress_tokens))
        first = forbidden | set(_tokens("begin_suppress_tokens", self.begin_suppress_tokens))
        for name in ("decoder_start_token_id", "pad_token_id"):
            value = getattr(self, name)
            if value is not None and not _is_token(value):
                raise ValueError(f"{name} must be a token id, but it is {value!r}")
        for word in self.bad_words_ids or ():
            if isinstance(word, int) or not word:
                raise ValueError(
                    f"bad_words_ids must be lists of tokens, none of them empty, but has {word!r}"
                )
            _tokens("bad_words_ids", word)
        _tokens("eos_token_id", self.eos_token_id)
        bos = _tokens("forced_bos_token_id", self.forced_bos_token_id)
        eos = _tokens("forced_eos_token_id", self.forced_eos_token_id)
        if set(bos) & first:
            raise ValueError(f"forced_bos_token_id, {bos[0]}, is suppressed")
        if eos and set(eos) <= forbidden:
            raise ValueError(f"forced_eos_token_id, {self.forced_eos_token_id}, is suppressed")
        if self.vocabulary is None:
            return
        allowed = set(_tokens("vocabulary", self.vocabulary)) - forbidden
        if not allowed:
            raise ValueError("vocabulary leaves no token: it is empty, or all of it is suppressed")
        for name, forced in (("forced_bos_token_id", bos), ("forced_eos_token_id", eos)):
            if forced and not set(forced) & allowed:
                raise ValueError(f"{name}, {getattr(self, name)}, is not in vocabulary")

    @property
    def draws(self) -> bool:
        """Whether each returned sequence is a draw of its own: do_sample without beams."""
        return self.do_sample and self.num_beams == 1

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """eos_token_id as a tuple."""
        return _tokens("eos_token_id", self.eos_token_id)

    @property
    def fill_token(self) -> int:
        """What follows the end of a sequence in a batch."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        return self.end_tokens[0] if self.end_tokens else 0

    def limit(self, prompt: int) -> int:
        """The length at which a target ends, of which the first `prompt` tokens are given."""
        if self.max_new_tokens is not None:
            return prompt + self.max_new_tokens
        if self.max_length is not None:
            return self.max_length
        return prompt + 20

    def __getstate__(self) -> dict[str, Any]:
        """The options alone: what the engine made of them is made anew."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def replace(self, **changes: Any) -> GenerationConfig:
        """A copy with some options changed. TypeError for a name that is none."""
        names = {field.name for field in fields(self)}
        unknown = sorted(set(changes) - names)
        if unknown:
            raise TypeError(f"GenerationConfig has no option {', '.join(unknown)}")
        return replace(self, **changes)
