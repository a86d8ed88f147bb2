"""The kernels of lstm, gru and rnn: some steps of some sequences, forward and backward.

A program has a tile of sequences and walks over tiles of hidden units; it multiplies the state by
the units' rows of W_hh, gate by gate, and goes on with the gates in registers. Backward is the same
walk the other way: the gates' gradients of the step behind times W_hh are the state's gradient.

Step i is t = i, and in the reverse direction t = T - 1 - i. Ahead of a step is the one before it,
which made its state, and behind it the one that reads its state:

    direction 0:  ahead = t - 1,  behind = t + 1        direction 1:  ahead = t + 1,  behind = t - 1

Where rows lie, and which launches there are: recurrent.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from encdec_fast.triton_kernels._tiles import dot, rows_of, sigmoid, tanh

# As the kernels number them, and how many gates each has.
CELLS = {"lstm": 0, "gru": 1, "rnn_tanh": 2, "rnn_relu": 3}
GATES = (4, 3, 1, 1)
# Numbers of a row of gates' gradients, in hidden sizes: the GRU's new gate has two, one for the
# product with x and one, times r, for that with h.
SEGMENTS = (4, 4, 1, 1)
_LSTM, _GRU, _TANH = (tl.constexpr(i) for i in range(3))


@triton.jit
def _lengths_of(lengths, r, B, T):
    """How many steps sequences r have; 0 past the batch."""
    if lengths is None:
        n = tl.where(r < B, T, 0)
    else:
        n = tl.minimum(tl.load(lengths + r, r < B, 0).to(tl.int32), T)
    return n


@triton.jit
def _has_step(length, t):
    """(which sequences have a step t, which have not); t may be before the first."""
    end = tl.where(t < 0, t, length)
    return t < end, t >= end


@triton.jit
def _rows_at(t, T, r, real, starts, places, step, sequence):
    """(the rows of step t of sequences r, where they lie in padded tensors); 0 where not real."""
    if starts is None:
        row = t.to(tl.int64) * step + r.to(tl.int64) * sequence
    else:
        row = tl.load(starts + tl.minimum(tl.maximum(t, 0), T - 1)) + r
    row = tl.where(real, row, 0)
    if places is None:
        place = row
    else:
        place = tl.load(places + row, real, 0)
    return row, place


@triton.jit
def forward_kernel(
    products,  # float32 (rows, D * gates * H): of the input, with the biases
    weight,  # (D, gates * H, H)
    bias,  # GRU: (D, H), what is added to the new gate's product of h; or None
    states,  # (2, D, B, H): before and after a step, by turns
    c,  # LSTM: float32 (D, B, H), the running cell state
    output,  # (places, D * H)
    cells,  # LSTM: output's shape, or None
    gates,  # (D, rows, 4 * H), or None where no gradient is needed
    h_n,  # (D, B, H)
    lengths,  # int32 (B), or None: T
    starts,
    places,
    first,  # step
    count,  # of steps
    T,
    B,
    H,
    rows,
    step,
    sequence,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
):
    d, D = tl.program_id(2), tl.num_programs(2)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    length = _lengths_of(lengths, r, B, T)
    longest = tl.max(length)
    begin = tl.maximum(first, tl.where(d == 0, 0, T - longest))
    end = tl.minimum(first + count, tl.where(d == 0, longest, T))
    matrix = tl.full((), 1, tl.int64) * H * H
    weight += d * GATES * matrix
    half = D.to(tl.int64) * B * H
    for i in range(begin, end):
        t = tl.where(d == 0, i, T - 1 - i)
        real = t < length
        is_last = real & (t == tl.where(d == 0, length - 1, 0))
        row, place = _rows_at(t, T, r, real, starts, places, step, sequence)
        now = states + (i % 2) * half + d.to(tl.int64) * B * H
        then = states + ((i + 1) % 2) * half + d.to(tl.int64) * B * H
        for tile in range(tl.program_id(0), tl.cdiv(H, UNITS), tl.num_programs(0)):
            u = tile * UNITS + tl.arange(0, UNITS)
            inside = real[:, None] & (u[None, :] < H)
            h0 = tl.zeros((ROWS, UNITS), tl.float32)
            h1 = tl.zeros((ROWS, UNITS), tl.float32)
            h2 = tl.zeros((ROWS, UNITS), tl.float32)
            h3 = tl.zeros((ROWS, UNITS), tl.float32)
            for k0 in range(0, H, INNER):
                k = k0 + tl.arange(0, INNER)
                h = rows_of(now, r, B, k, H, H)
                h0 += dot(h, tl.trans(rows_of(weight, u, H, k, H, H)))
                if GATES > 1:
                    h1 += dot(h, tl.trans(rows_of(weight + matrix, u, H, k, H, H)))
                    h2 += dot(h, tl.trans(rows_of(weight + 2 * matrix, u, H, k, H, H)))
                if GATES > 3:
                    h3 += dot(h, tl.trans(rows_of(weight + 3 * matrix, u, H, k, H, H)))
            x = products + (row * D + d)[:, None] * GATES * H + u[None, :]
            own = (d.to(tl.int64) * B + r)[:, None] * H + u[None, :]  # of a state
            at = (place * D + d)[:, None] * H + u[None, :]
            saved = (d.to(tl.int64) * rows + row)[:, None] * 4 * H + u[None, :]
            h0 += tl.load(x, inside, 0.0)
            if CELL == _LSTM:
                i_gate = sigmoid(h0)
                f = sigmoid(h1 + tl.load(x + H, inside, 0.0))
                g = tanh(h2 + tl.load(x + 2 * H, inside, 0.0))
                o = sigmoid(h3 + tl.load(x + 3 * H, inside, 0.0))
                cell = f * tl.load(c + own, inside, 0.0) + i_gate * g
                new = o * tanh(cell)
                tl.store(c + own, cell, inside)
                if cells is not None:
                    tl.store(cells + at, cell, inside)
                if gates is not None:
                    tl.store(gates + saved, i_gate, inside)
                    tl.store(gates + saved + H, f, inside)
                    tl.store(gates + saved + 2 * H, g, inside)
                    tl.store(gates + saved + 3 * H, o, inside)
            elif CELL == _GRU:
                reset = sigmoid(h0)
                update = sigmoid(h1 + tl.load(x + H, inside, 0.0))
                if bias is not None:
                    h2 += tl.load(bias + d * H + u, u < H, 0.0).to(tl.float32)[None, :]
                fresh = tanh(tl.load(x + 2 * H, inside, 0.0) + reset * h2)
                before = tl.load(now + r[:, None].to(tl.int64) * H + u[None, :], inside, 0.0)
                new = fresh + update * (before.to(tl.float32) - fresh)
                if gates is not None:
                    tl.store(gates + saved, reset, inside)
                    tl.store(gates + saved + H, update, inside)
                    tl.store(gates + saved + 2 * H, fresh, inside)
                    tl.store(gates + saved + 3 * H, h2, inside)
            elif CELL == _TANH:
                new = tanh(h0)
            else:
                new = tl.where(h0 < 0.0, 0.0, h0)  # NaN stays
            tl.store(output + at, new, inside)
            tl.store(then + r[:, None].to(tl.int64) * H + u[None, :], new, inside)
            tl.store(h_n + own, new, inside & is_last[:, None])
        tl.debug_barrier()  # the next step reads what other threads of this program have stored


@triton.jit
def backward_kernel(
    grad_output,  # (places, D * H), or None
    grad_h_n,  # (D, B, H), or None
    grad_cells,  # LSTM: grad_output's shape, or None
    weight,
    gates,
    output,
    cells,
    h0,  # (D, B, H), or None
    c0,  # LSTM: the same
    grads,  # (rows, D * segments * H): of what enters the gates
    previous,  # (rows, D * H): the state before each step
    carry,  # float32 (D, B, H): what passes a step without a product; LSTM: of c, GRU: of h
    grad_h0,  # (D, B, H), or None
    lengths,
    starts,
    places,
    first,  # step: it and those before it
    count,  # of steps; step -1 has grad_h0 only
    T,
    B,
    H,
    rows,
    step,
    sequence,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    INNER: tl.constexpr,
):
    d, D = tl.program_id(2), tl.num_programs(2)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    length = _lengths_of(lengths, r, B, T)
    matrix = tl.full((), 1, tl.int64) * H * H
    weight += d * GATES * matrix
    forth = tl.where(d == 0, 1, -1)  # from a step to the one behind it
    for j in range(count):
        t = tl.where(d == 0, first - j, T - 1 - (first - j))
        behind, ahead = t + forth, t - forth
        real, absent = _has_step(length, t)
        goes_on, ends = _has_step(length, behind)
        has_ahead, begins = _has_step(length, ahead)
        came = real & has_ahead
        row, place = _rows_at(t, T, r, real, starts, places, step, sequence)
        row_behind, _ = _rows_at(behind, T, r, goes_on, starts, places, step, sequence)
        _, place_ahead = _rows_at(ahead, T, r, came, starts, places, step, sequence)
        of_behind = grads + (row_behind * D + d) * SEGMENTS * H
        for tile in range(tl.program_id(0), tl.cdiv(H, UNITS), tl.num_programs(0)):
            u = tile * UNITS + tl.arange(0, UNITS)
            dh = tl.zeros((ROWS, UNITS), tl.float32)
            blocks = tl.cdiv(H, INNER)
            for block in range(GATES * blocks):
                gate = block // blocks
                k = block % blocks * INNER + tl.arange(0, INNER)
                has = goes_on[:, None] & (k[None, :] < H)
                segment = gate
                if CELL == _GRU:  # what its new gate has for h
                    segment = tl.where(gate == 2, 3, gate)
                a = tl.load(of_behind[:, None] + segment * H + k[None, :], has, 0.0)
                dh += dot(a, rows_of(weight + gate * matrix, k, H, u, H, H))
            inside = real[:, None] & (u[None, :] < H)
            own = (d.to(tl.int64) * B + r)[:, None] * H + u[None, :]
            if CELL == _GRU:
                dh += tl.load(carry + own, (r[:, None] < B) & (u[None, :] < H), 0.0)
            if grad_h0 is not None:
                started = goes_on & absent
                tl.store(grad_h0 + own, dh, started[:, None] & (u[None, :] < H))
            at = (place * D + d)[:, None] * H + u[None, :]
            at_ahead = (place_ahead * D + d)[:, None] * H + u[None, :]
            of_ahead = came[:, None] & (u[None, :] < H)
            begin = inside & begins[:, None]
            if grad_output is not None:
                dh += tl.load(grad_output + at, inside, 0.0).to(tl.float32)
            if grad_h_n is not None:
                end = inside & ends[:, None]
                dh += tl.load(grad_h_n + own, end, 0.0).to(tl.float32)
            before = tl.load(output + at_ahead, of_ahead, 0.0).to(tl.float32)
            if h0 is not None:
                before += tl.load(h0 + own, begin, 0.0).to(tl.float32)
            tl.store(previous + (row * D + d)[:, None] * H + u[None, :], before, inside)
            to = grads + (row * D + d)[:, None] * SEGMENTS * H + u[None, :]
            saved = (d.to(tl.int64) * rows + row)[:, None] * 4 * H + u[None, :]
            if CELL == _LSTM:
                i_gate = tl.load(gates + saved, inside, 0.0).to(tl.float32)
                f = tl.load(gates + saved + H, inside, 0.0).to(tl.float32)
                g = tl.load(gates + saved + 2 * H, inside, 0.0).to(tl.float32)
                o = tl.load(gates + saved + 3 * H, inside, 0.0).to(tl.float32)
                tanh_c = tanh(tl.load(cells + at, inside, 0.0).to(tl.float32))
                c_before = tl.load(cells + at_ahead, of_ahead, 0.0).to(tl.float32)
                if c0 is not None:
                    c_before += tl.load(c0 + own, begin, 0.0).to(tl.float32)
                dc = dh * o * (1.0 - tanh_c * tanh_c) + tl.load(carry + own, inside, 0.0)
                if grad_cells is not None:
                    dc += tl.load(grad_cells + at, inside, 0.0).to(tl.float32)
                tl.store(carry + own, dc * f, inside)
                tl.store(to, dc * g * i_gate * (1.0 - i_gate), inside)
                tl.store(to + H, dc * c_before * f * (1.0 - f), inside)
                tl.store(to + 2 * H, dc * i_gate * (1.0 - g * g), inside)
                tl.store(to + 3 * H, dh * tanh_c * o * (1.0 - o), inside)
            elif CELL == _GRU:
                reset = tl.load(gates + saved, inside, 0.0).to(tl.float32)
                update = tl.load(gates + saved + H, inside, 0.0).to(tl.float32)
                fresh = tl.load(gates + saved + 2 * H, inside, 0.0).to(tl.float32)
                inner = tl.load(gates + saved + 3 * H, inside, 0.0).to(tl.float32)
                of_fresh = dh * (1.0 - update) * (1.0 - fresh * fresh)
                tl.store(carry + own, dh * update, inside)
                tl.store(to, of_fresh * inner * reset * (1.0 - reset), inside)
                tl.store(to + H, dh * (before - fresh) * update * (1.0 - update), inside)
                tl.store(to + 2 * H, of_fresh, inside)
                tl.store(to + 3 * H, of_fresh * reset, inside)
            else:
                h = tl.load(output + at, inside, 0.0).to(tl.float32)
                if CELL == _TANH:
                    tl.store(to, dh * (1.0 - h * h), inside)
                else:
                    tl.store(to, tl.where(h > 0.0, dh, 0.0), inside)
        tl.debug_barrier()
