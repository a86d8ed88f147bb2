"""A step of a search in one launch; encdec_fast/generation/device/search.py has its tensors.

A program has one sentence: it chooses from the candidates of its rows, files what has ended, opens
what goes on, and moves the tables of its rows along. Everything is small, so one warp does it. The
same in torch is `Search._advance`, which says what each part is for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from encdec_fast.triton_kernels._configuration import Configuration
from torch import Tensor

MOST = 2048  # candidates of all rows of a sentence
TILE = 512  # numbers of a table that are moved at a time
EARLY = (False, True, "never")  # as the kernel numbers them

# A choice between truth values of a tile by a single one is written with `where`: the interpreter
# has no `&` of the two.
_NOTHING = tl.constexpr(-1)


@triton.jit
def _insert(kept, ages, inside, score, length, row, token, log_prob, age):
    """One hypothesis more in a list of the best: it takes the place of the worst, if it is better.

    Of equal ones the earlier is the better.
    """
    scores, lengths, rows, tokens, log_probs = kept
    worst = tl.min(tl.where(inside, scores, float("inf")), 0)
    last = inside & (scores == worst)
    here = last & (ages == tl.max(tl.where(last, ages, -1), 0))
    here = tl.where(score > worst, here, ages < 0)
    scores = tl.where(here, score, scores)
    lengths = tl.where(here, length, lengths)
    rows = tl.where(here, row, rows)
    tokens = tl.where(here, token, tokens)
    log_probs = tl.where(here, log_prob, log_probs)
    return (scores, lengths, rows, tokens, log_probs), tl.where(here, age, ages)


@triton.jit
def _read(scores, lengths, rows, tokens, log_probs, at, inside):
    return (
        tl.load(scores + at, inside, float("-inf")),
        tl.load(lengths + at, inside, 0),
        tl.load(rows + at, inside, 0),
        tl.load(tokens + at, inside, 0),
        tl.load(log_probs + at, inside, 0.0),
    )


@triton.jit
def _write(kept, ages, scores, lengths, rows, tokens, log_probs, first, inside):
    """In order: the best first, of equal ones the earlier."""
    own = tl.where(inside, kept[0], float("-inf"))
    age = tl.where(inside, ages, 2147483647)
    ahead = (own[None, :] > own[:, None]) | (
        (own[None, :] == own[:, None]) & (age[None, :] < age[:, None])
    )
    at = first + tl.sum(ahead.to(tl.int64), 1)
    tl.store(scores + at, kept[0], inside)
    tl.store(lengths + at, kept[1], inside)
    tl.store(rows + at, kept[2], inside)
    tl.store(tokens + at, kept[3], inside)
    tl.store(log_probs + at, kept[4], inside)


@triton.jit
def _coverage(received, attention, row, inside, n, S, WIDTH: tl.constexpr):
    """Of each row the sum over its source of log(min(what it received, 1)), in float64.

    attention: what it receives in this step, or None.
    """
    logs = tl.zeros(row.shape, tl.float64)
    for s0 in range(0, S, WIDTH):
        s = s0 + tl.arange(0, WIDTH)
        at = row[:, None] * S + s[None, :]
        real = inside[:, None] & (s[None, :] < n)
        got = tl.load(received + at, real, 1.0)
        if attention is not None:
            got += tl.load(attention + at, real, 0.0)
        # Nothing at all, by underflow: a number in place of -infinity.
        got = tl.minimum(tl.maximum(got, 1.1754943508222875e-38), 1.0)
        logs += tl.sum(tl.where(real, tl.log(got.to(tl.float64)), 0.0), 1)
    return logs


@triton.jit
def _move(table, parents, row, width, column, value, inside, WIDTH: tl.constexpr):
    """Rows of a table (R, width) become those of their parents, with one number in a column."""
    for c0 in range(0, width, WIDTH):
        c = c0 + tl.arange(0, WIDTH)
        there = inside[:, None] & (c[None, :] < width)
        old = tl.load(table + parents[:, None] * width + c[None, :], there, 0)
        tl.debug_barrier()  # all is read before anything is written
        new = tl.where(c[None, :] == column, value[:, None].to(old.dtype), old)
        tl.store(table + row[:, None] * width + c[None, :], new, there)


@triton.jit
def advance_kernel(
    found_log_probs, found_ranks, found_tokens, healthy,  # (R, k), and (R)
    attention,  # float32 (R, S) or None
    position, late, failed, settings, prompts, lengths, limits, sources, ends,
    open_rows, sums, next_tokens, parents, tokens, rows, log_probs, ancestors,
    history, prefix, follows, all_attention, received,  # each may be None
    ended_scores, ended_lengths, ended_rows, ended_tokens, ended_log_probs,
    stuck_scores, stuck_lengths, stuck_rows, stuck_tokens, stuck_log_probs,
    B, P, X, L, S, E,
    SAMPLES: tl.constexpr, STOP: tl.constexpr,  # early_stopping, by its number in EARLY
    K: tl.constexpr, EACH: tl.constexpr, KEPT: tl.constexpr,  # rows, their candidates, the chosen
    LANES: tl.constexpr, FLAT: tl.constexpr, ENDS: tl.constexpr,  # powers of 2 that hold K, K k, E
    WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane < K
    row, first = b * K + lane, b * K
    step = tl.load(position + b)
    length, prompt, limit = step + 1, tl.load(lengths + b), tl.load(limits + b)
    over = tl.load(late) != 0
    penalty, beta = tl.load(settings), tl.load(settings + 1)
    was_open = tl.load(open_rows + row, inside, 0) != 0
    alive = tl.max(was_open.to(tl.int32), 0) != 0
    reading = length < prompt
    searching = alive & (length >= prompt)
    before = tl.load(sums + row, inside, float("-inf"))
    good = tl.load(healthy + row, inside, 1) != 0
    bad = tl.max((was_open & (good == 0)).to(tl.int32), 0)
    if searching & (bad != 0):
        if tl.load(failed) == 0:
            tl.store(failed, length)

    # What finished hypotheses are ranked by: parts that do not hang on the candidate.
    written = length - prompt  # before this step
    n = tl.load(sources + b)
    covered = tl.zeros((LANES,), tl.float64)
    covered_before = tl.zeros((LANES,), tl.float64)
    if received is not None:
        covered_before = beta * _coverage(received, None, row, inside, n, S, WIDTH)
        covered = beta * _coverage(received, attention, row, inside, n, S, WIDTH)
    factor = tl.exp(penalty * tl.log(tl.maximum(written + 1, 1).to(tl.float64)))
    factor_before = tl.exp(penalty * tl.log(tl.maximum(written, 1).to(tl.float64)))

    # Hypotheses that no token may follow.
    stuck = _read(
        stuck_scores, stuck_lengths, stuck_rows, stuck_tokens, stuck_log_probs, row, inside
    )
    ages = lane
    top = tl.load(found_log_probs + row * EACH, inside, 0.0)
    none = tl.where(searching, inside & was_open & (top == float("-inf")), lane < 0)
    if tl.max(none.to(tl.int32), 0) != 0:
        scores = before
        if K > 1:
            if written > 0:
                scores = before / factor_before + covered_before
        for i in range(K):
            mine = lane == i
            score = tl.max(tl.where(mine & none, scores, float("-inf")), 0)
            stuck, ages = _insert(
                stuck, ages, inside, score, length, first + i, _NOTHING, 0.0, LANES + i
            )
    _write(
        stuck, ages,
        stuck_scores, stuck_lengths, stuck_rows, stuck_tokens, stuck_log_probs, first, inside,
    )  # fmt: skip

    # The best candidates of all rows, one after the other.
    flat = tl.arange(0, FLAT)
    beam = flat // EACH
    real = flat < K * EACH
    live = real & (tl.load(open_rows + first + beam, real, 0) != 0)
    live = tl.where(searching, live, flat < 0)
    base = tl.load(sums + first + beam, live, float("-inf"))
    at = first * EACH + flat
    log_prob = tl.load(found_log_probs + at, live, float("-inf"))
    token = tl.load(found_tokens + at, live, 0)
    score = base + log_prob
    pool = score
    if SAMPLES:
        ranks = base + tl.load(found_ranks + at, live, float("-inf"))
        chosen = flat < 0
        for _ in range(KEPT):
            best = tl.max(ranks, 0)
            drawn = flat == tl.min(tl.where(ranks == best, flat, FLAT), 0)
            chosen |= drawn
            ranks = tl.where(drawn, float("-inf"), ranks)
        pool = tl.where(chosen, score, float("-inf"))
    ended = _read(
        ended_scores, ended_lengths, ended_rows, ended_tokens, ended_log_probs, row, inside
    )
    ages = lane
    last_tokens = tl.load(ends + tl.arange(0, ENDS), tl.arange(0, ENDS) < E, _NOTHING)
    opened = tl.zeros((), tl.int32)
    new_open = lane < 0
    new_sums = tl.full((LANES,), float("-inf"), tl.float64)
    new_parents, new_tokens = row, tl.zeros((LANES,), tl.int64)
    new_log_probs = tl.zeros((LANES,), tl.float32)
    for j in range(KEPT):
        best = tl.max(pool, 0)
        here = flat == tl.min(tl.where(pool == best, flat, FLAT), 0)
        pool = tl.where(here, float("-inf"), pool)
        own_token = tl.sum(tl.where(here, token, 0), 0)
        own_log_prob = tl.sum(tl.where(here, log_prob, 0.0), 0)
        own_beam = tl.sum(tl.where(here, beam, 0), 0)
        possible = best > float("-inf")
        ends_it = (tl.max((last_tokens == own_token).to(tl.int32), 0) != 0) | over
        ends_it = ends_it | (length + 1 >= limit)
        final = best
        if K > 1:
            final = best / factor + tl.sum(tl.where(lane == own_beam, covered, 0.0), 0)
        final = tl.where(possible & ends_it & (j < K), final, float("-inf"))
        ended, ages = _insert(
            ended, ages, inside, final, length + 1, first + own_beam, own_token, own_log_prob,
            LANES + j,
        )  # fmt: skip
        goes_on = possible & (ends_it == 0) & (opened < K)
        slot = tl.where(goes_on, lane == opened, lane < 0)
        new_open |= slot
        new_sums = tl.where(slot, best, new_sums)
        new_parents = tl.where(slot, first + own_beam, new_parents)
        new_tokens = tl.where(slot, own_token, new_tokens)
        new_log_probs = tl.where(slot, own_log_prob, new_log_probs)
        opened += goes_on.to(tl.int32)
    # A sentence that is still reading when the time is over has written nothing.
    nothing = tl.where(alive & reading & over, 0.0, float("-inf")).to(tl.float64)
    ended, ages = _insert(
        ended, ages, inside, nothing, prompt, _NOTHING, _NOTHING, 0.0, LANES + KEPT
    )
    _write(
        ended, ages,
        ended_scores, ended_lengths, ended_rows, ended_tokens, ended_log_probs, first, inside,
    )  # fmt: skip

    # Whether the best open hypothesis may yet be one of the best.
    worst = tl.min(tl.where(inside, ended[0], float("inf")), 0)
    improves = worst == float("-inf")
    if (K > 1) & (STOP != 1):
        most = written + 1
        if STOP == 2:
            if penalty > 0:
                most = limit - prompt
        reach = tl.exp(penalty * tl.log(tl.maximum(most, 1).to(tl.float64)))
        improves = improves | (tl.max(new_sums, 0) / reach > worst)
    new_open = tl.where(improves, new_open, lane < 0)
    reads = tl.where(alive & reading & (over == 0), lane == 0, lane < 0)
    new_parents = tl.where(new_open, new_parents, row)
    fed = tl.load(prompts + b * P + tl.minimum(length, P - 1))
    new_tokens = tl.where(reads, fed, tl.where(new_open, new_tokens, 0))
    new_sums = tl.where(reads, 0.0, tl.where(new_open, new_sums, float("-inf")))
    if follows is not None:
        place = tl.minimum(tl.maximum(written, 0), X - 1)
        same = (new_tokens == tl.load(prefix + b * X + place)) | (new_open == 0)
        did = tl.load(follows + new_parents, inside, 0) != 0
        tl.debug_barrier()
        tl.store(follows + row, same & did, inside)
    if received is not None:
        for s0 in range(0, S, WIDTH):
            s = s0 + tl.arange(0, WIDTH)
            there = inside[:, None] & (s[None, :] < S)
            old = new_parents[:, None] * S + s[None, :]
            came = tl.load(open_rows + new_parents, inside, 0) != 0
            fresh = tl.where(searching, there & came[:, None], there & (s[None, :] < 0))
            got = tl.load(attention + old, fresh, 0.0)
            got += tl.load(received + old, there, 0.0)
            tl.debug_barrier()
            tl.store(received + row[:, None] * S + s[None, :], got, there)
    if all_attention is not None:
        for s0 in range(0, S, WIDTH):
            s = s0 + tl.arange(0, WIDTH)
            there = inside[:, None] & (s[None, :] < S)
            own = row[:, None] * S + s[None, :]
            seen = tl.load(attention + own, there, 0.0)
            tl.store(all_attention + step * B * K * S + own, seen, there)
    tl.debug_barrier()
    tl.store(open_rows + row, new_open | reads, inside)
    tl.store(sums + row, new_sums, inside)
    tl.store(next_tokens + row, new_tokens, inside)
    tl.store(parents + row, new_parents, inside)
    place = tl.minimum(length, L - 1)
    at_place = place * B * K + row
    tl.store(tokens + at_place, new_tokens, inside)
    tl.store(rows + at_place, new_parents, inside)
    tl.store(log_probs + at_place, new_log_probs, inside)
    _move(ancestors, new_parents, row, L, place, row, inside, WIDTH)
    if history is not None:
        _move(history, new_parents, row, L, place, new_tokens, inside, WIDTH)
    tl.store(position + b, tl.minimum(length, L - 1))


def _options(K: int, each: int, kept: int, ends: int) -> dict[str, Any]:
    lanes, flat = triton.next_power_of_2(K), triton.next_power_of_2(K * each)
    return {
        "K": K,
        "EACH": each,
        "KEPT": kept,
        "LANES": lanes,
        "FLAT": flat,
        "ENDS": triton.next_power_of_2(max(1, ends)),
        "WIDTH": max(16, TILE // lanes),
        "num_warps": max(1, flat // 256),
        # Left to itself, the compiler stops at 128, and some numbers do not fit.
        "maxnreg": 192 if flat <= 256 else 255,
    }


def _bytes(tensor: Tensor | None) -> Tensor | None:
    """Truth values as numbers."""
    return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.bool else tensor


def advance(
    found: Sequence[Tensor],
    attention: Tensor | None,
    tensors: Sequence[Tensor | None],
    sizes: tuple[int, int, int, int, int, int],
    K: int,
    kept: int,
    samples: bool,
    early_stopping: bool | str,
) -> None:
    """Change a search's tensors, which are in the kernel's order from `position` on.

    found: log probabilities, ranks and tokens (R, k) of the candidates, and whether each row is
    healthy. sizes: B, P, X, L, S and the number of end tokens. kept: of the best candidates.
    """
    given: list[Any] = [_bytes(tensor) for tensor in (*found, attention, *tensors)]
    options = _options(K, found[0].shape[1], kept, sizes[5])
    stop = EARLY.index(early_stopping)
    advance_kernel[sizes[0],](*given, *sizes, SAMPLES=samples, STOP=stop, **options)


def configurations(dtype: str) -> Iterator[Configuration]:
    """What `advance` launches for a few sizes, the same for each dtype."""
    names = [name for name in advance_kernel.arg_names if name.islower()]
    types = dict.fromkeys(names, "*i64")
    numbers = ("found_log_probs", "found_ranks", "attention", "log_probs", "all_attention")
    types |= dict.fromkeys((*numbers, "received", "ended_log_probs", "stuck_log_probs"), "*fp32")
    types |= dict.fromkeys(("settings", "sums", "ended_scores", "stuck_scores"), "*fp64")
    types |= dict.fromkeys(("healthy", "late", "open_rows", "follows"), "*u8")
    types |= {"ancestors": "*i32"} | dict.fromkeys(("B", "P", "X", "L", "S", "E"), "i32")
    absent = ("history", "prefix", "follows", "all_attention", "received", "attention")
    for K, ends, stop in ((4, 1, 0), (1, 1, 0), (5, 3, 2), (8, 1, 1), (16, 1, 1), (32, 1, 1)):
        each = 1 if K == 1 else max(2, 1 + ends) * K
        options = _options(K, each, each, ends) | {"SAMPLES": K == 5, "STOP": stop}
        launch = {"warps": options.pop("num_warps"), "registers": options.pop("maxnreg")}
        whole = Configuration(advance_kernel, dtype, types, options, **launch, default=K == 4)
        yield from (whole, whole.plain(*absent))
