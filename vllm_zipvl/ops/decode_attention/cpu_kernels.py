"""Decode attention in numba: one pass over tiles of tokens with an online softmax.

A tile is one page, or up to 64 tokens of one dense block; one step of the softmax takes
tiles of about 64 tokens. Everything is float32; scores are in units of log 2, so that a
weight is one exp2.
"""

import math

import numba
import numpy as np

from vllm_zipvl.ops.decode_attention.cpu_launch import DENSE, KEPT, REST
from vllm_zipvl.ops.decode_attention.cpu_vectors import (
    BFLOAT16,
    CODES8,
    FLOAT16,
    FLOAT32,
    LOWEST,
    accumulate_tokens,
    affine_max,
    float_from_bits,
    prefetch,
    score_tokens,
    weigh,
)
from vllm_zipvl.ops.halves import half_to_float, scales_to_floats

STEP_TOKENS = 64
"""Tokens of one softmax step, where a tile does not hold more."""
_Index = np.uintp  # numba wraps signed indices around, and then does not vectorise
_SMALLEST = np.float32(-64)
_LOG2 = np.float32(math.log(2))


@numba.njit(cache=True)
def _element(kind, stored, start, channel, head_size):
    """One stored element as float32; the plain way, for head sizes the vectors do not fit."""
    if kind >= CODES8:
        bits = 8 >> (kind - CODES8)
        width = head_size * bits // 8
        part = channel // width
        code = stored[start + channel - part * width] >> (part * bits)
        return np.float32(code & ((1 << bits) - 1))
    if kind in (BFLOAT16, FLOAT16):
        at = start + 2 * channel
        raw = np.uint16(stored[at]) | np.uint16(stored[at + 1]) << 8
        if kind == FLOAT16:
            return half_to_float(np.uint16(raw))
        return float_from_bits(np.int32(np.uint32(raw) << 16))
    at = start + 4 * channel
    raw = np.uint32(0)
    for i in range(4):
        raw |= np.uint32(stored[at + i]) << np.uint32(8 * i)
    return float_from_bits(np.int32(raw))


@numba.njit(cache=True)
def _widen(kind, stored, start, stride, num_tokens, shape, work, first):
    """Copy vectors into float32 [num_tokens, padded_size] of `work`, whose padding is 0."""
    for token in range(num_tokens):
        at = start + token * stride
        for channel in range(shape.head_size):
            value = _element(kind, stored, at, channel, shape.head_size)
            work[first + token * shape.padded_size + channel] = value


@numba.njit(cache=True)
def _load_params(halves, at, capacity, num_tokens, row, work, params):
    """Parameters of one page's tokens: a word of both scales, then the zeros."""
    for token in range(num_tokens):
        key_scale, value_scale = scales_to_floats(halves[_Index(at + token)])
        early_zero = half_to_float(halves[_Index(at + capacity + token)])
        late_zero = half_to_float(halves[_Index(at + 2 * capacity + token)])
        value_zero = half_to_float(halves[_Index(at + 3 * capacity + token)])
        work[_Index(params + token)] = key_scale
        work[_Index(params + row + token)] = early_zero
        work[_Index(params + 2 * row + token)] = late_zero
        work[_Index(params + 3 * row + token)] = value_scale
        work[_Index(params + 4 * row + token)] = value_zero


@numba.njit(cache=True)
def _neutral_params(row, work, params):
    """Parameters of unquantised tokens: scales of 1, zeros of 0 but for the key's first one.

    That brings the offset into the score.
    """
    for i in range(5 * row):
        work[_Index(params + i)] = i < 2 * row or 3 * row <= i < 4 * row


@numba.njit(cache=True)
def _power(exponent):
    """2^exponent for differences of maxima, which are at most 0."""
    return np.float32(math.exp(max(exponent, _SMALLEST) * _LOG2))


@numba.njit(cache=True)
def _rotate(work, start, size):
    """Multiply a vector by the Hadamard matrix of `core.quantization`, in place."""
    block = size & -size
    width = 1
    while width < block:
        for first in range(start, start + size, 2 * width):
            for i in range(first, first + width):
                a, b = work[_Index(i)], work[_Index(i + width)]
                work[_Index(i)] = a + b
                work[_Index(i + width)] = a - b
        width *= 2
    factor = np.float32(1 / math.sqrt(block))
    for i in range(start, start + size):
        work[_Index(i)] *= factor


@numba.njit(cache=True)
def _load_query(query, norm, scale, rotated, work, base, record, shape, index):
    """Load one query, plain and as it meets stored keys (`core.quantization.fold_key_norm`).

    The scores of quantised tokens lack an offset then; the others get its negative, so that
    all are off by the same.
    """
    plain = base + record.query + index * shape.padded_size
    for channel in range(shape.head_size):
        work[_Index(plain + channel)] = query[channel] * scale
    if not rotated:
        return
    turned = plain + shape.num_queries * shape.padded_size
    offset = np.float32(0)
    for place in range(shape.head_size):
        of_channel = work[_Index(plain + np.int64(half_to_float(norm[2, place])))]
        offset += of_channel * half_to_float(norm[0, place])
        work[_Index(turned + place)] = of_channel * half_to_float(norm[1, place])
    _rotate(work, turned, shape.head_size)
    work[base + record.offsets + index] = -offset
    for place in range(shape.head_size):
        late = np.int64(place >= shape.head_size // 2) * shape.num_queries
        work[base + record.query_sums + late + index] += work[_Index(turned + place)]


@numba.njit(cache=True)
def _start(work, base, record, shape, inputs, row, slot, head):
    """Load the queries of one KV head of a row; everything else is 0."""
    for i in range(record.size):
        work[_Index(base + i)] = 0
    per_head = inputs.queries.shape[1] // shape.num_kv_heads
    for index in range(per_head):
        query = inputs.queries[row, head * per_head + index]
        norm = inputs.norms[slot, :, head]
        _load_query(query, norm, inputs.scale, inputs.rotated, work, base, record, shape, index)
    for index in range(shape.num_queries):
        work[base + record.state + index] = LOWEST


@numba.njit(cache=True)
def _rescale(work, sums, size, factor):
    for channel in range(size):
        work[_Index(sums + channel)] *= factor


@numba.njit(cache=True)
def _raise(work, sums, size, zeros):
    """Add what the zeros of the values contribute to every channel.

    At once, not at the end: it cancels most of the codes' sums, and a rounding error common
    to all channels would be gathered in a single one when the output is rotated back.
    """
    for channel in range(size):
        work[_Index(sums + channel)] += zeros


@numba.njit(cache=True)
def _softmax(work, base, record, shape, num_tokens, quantised):
    """One step of the online softmax for every query, over the scores of a few tiles."""
    params, nq = base + record.params, shape.num_queries
    for q in range(nq):
        scores, state = base + record.scores + q * shape.row, base + record.state + q
        sums = base + record.sums + q * shape.padded_size
        sums_of_codes = sums + nq * shape.padded_size
        query_sum = work[base + (record.query_sums if quantised else record.offsets) + q]
        late_sum = work[base + record.query_sums + nq + q]
        top = affine_max(work, scores, params, shape.row, num_tokens, query_sum, late_sum)
        if top > work[state]:
            factor = _power(work[state] - top)
            work[state] = top
            work[state + nq] *= factor
            _rescale(work, sums, shape.padded_size, factor)
            _rescale(work, sums_of_codes, shape.padded_size, factor)
        total, zeros = weigh(work, scores, params, shape.row, num_tokens, work[state])
        work[state + nq] += total
        if quantised:
            _raise(work, sums_of_codes, shape.padded_size, zeros)


@numba.njit(cache=True)
def _score_part(tile, stored, at, num_tokens, shape, record, work, work_bytes, base, scores):
    """Raw scores of the keys that start at byte `at`, written from `scores` on."""
    size, group = shape.padded_size, shape.group
    kind, stride, region = tile.kind, tile.stride, tile.quantised * shape.num_queries
    if size != shape.head_size:
        _widen(kind, stored, at, stride, num_tokens, shape, work, base + record.widened)
        stored, at, kind, stride = work_bytes, 4 * (base + record.widened), FLOAT32, 4 * size
    for q in range(0, shape.num_queries, group):
        query = base + record.query + (region + q) * size
        score_tokens(
            kind, group, work, query, stored, at, work, scores + q * shape.row,
            shape.row, stride, num_tokens, size,
        )  # fmt: skip


@numba.njit(cache=True)
def _accumulate_part(tile, stored, at, num_tokens, shape, record, work, work_bytes, base, scores):
    """Add the weighted values that start at byte `at`; weights start at `scores`."""
    size, group = shape.padded_size, shape.group
    kind, stride, region = tile.kind, tile.stride, tile.quantised * shape.num_queries
    if size != shape.head_size:
        _widen(kind, stored, at, stride, num_tokens, shape, work, base + record.widened)
        stored, at, kind, stride = work_bytes, 4 * (base + record.widened), FLOAT32, 4 * size
    for q in range(0, shape.num_queries, group):
        accumulate_tokens(
            kind, group, work, scores + q * shape.row, stored, at, work,
            base + record.sums + (region + q) * size, shape.row, stride, num_tokens, size,
        )  # fmt: skip


@numba.njit(cache=True)
def _num_tokens(tables, row, tile):
    """Tokens of a row that lie in a class."""
    if tile.table == DENSE:
        return tables.rows[row, 2] + max(tables.rows[row, 4] - tables.rows[row, 3], 0)
    return tables.page_counts[tables.rows[row, 0], tile.table] if tile.kind >= 0 else 0


@numba.njit(cache=True)
def _tile_start(tables, row, tile, head, index):
    """Byte at which a class's tile `index` starts, in its page or block."""
    slot, table_row, head_len, tail_start, _ = tables.rows[row]
    if tile.table == DENSE:
        # Of head and tail as if they were one.
        first = index * tile.capacity
        if first >= head_len:
            first += tail_start - head_len
        block = first // tile.unit_tokens
        start = (first - block * tile.unit_tokens) * tile.stride
        unit_id = tables.block_table[table_row, block]
    else:
        last = tables.page_table.shape[1] - 1
        start = 0
        unit_id = tables.page_table[slot, last - index if tile.table == REST else index]
    return np.int64(unit_id) * tile.unit_bytes + head * tile.head_bytes + start


@numba.njit(cache=True)
def _attend_tiles(
    tile, stored, halves, tables, row, head, following, first, last, num_tokens, shape, record,
    work, wb, base,
):  # fmt: skip
    """Attend over tiles [first, last), whose scores fit in a row, in one softmax step.

    `following` is the head whose keys are needed next, of these tiles if it is a later one.
    """
    begin, params = first * tile.capacity, base + record.params
    for i in range(first, last):
        done = i * tile.capacity - begin
        count = min(tile.capacity, num_tokens - i * tile.capacity)
        at = _tile_start(tables, row, tile, head, i)
        prefetch(stored, at + tile.fetch_bytes, tile.fetch_bytes)
        if tile.quantised:
            at_params = (at + tile.param_offset) // 2
            _load_params(halves, at_params, tile.capacity, count, shape.row, work, params + done)
        scores = base + record.scores + done
        _score_part(tile, stored, at, count, shape, record, work, wb, base, scores)
    done = min(last * tile.capacity, num_tokens) - begin
    _softmax(work, base, record, shape, done, tile.quantised)
    for i in range(first, last):
        scores = base + record.scores + i * tile.capacity - begin
        count = min(tile.capacity, num_tokens - i * tile.capacity)
        ahead = i if following > head else min(i + last - first, (num_tokens - 1) // tile.capacity)
        prefetch(stored, _tile_start(tables, row, tile, following, ahead), tile.fetch_bytes)
        at = _tile_start(tables, row, tile, head, i) + tile.value_offset
        _accumulate_part(tile, stored, at, count, shape, record, work, wb, base, scores)


@numba.njit(cache=True)
def _attend_row(tile, stored, halves, tables, row, heads, split, shape, record, work, wb, bases):
    """Attend over one split of a class of tokens of one row, with the queries of some heads.

    The heads of a page lie side by side, so all of them take a step before the next step.
    `bases` is where the first head's record starts, and how far apart the records are.
    """
    num_tokens = _num_tokens(tables, row, tile)
    num_tiles = (num_tokens + tile.capacity - 1) // tile.capacity
    begin = num_tiles * split // shape.num_splits
    end = num_tiles * (split + 1) // shape.num_splits
    if begin < end and not tile.quantised:
        for i in range(heads[1] - heads[0]):
            _neutral_params(shape.row, work, bases[0] + i * bases[1] + record.params)
    step = max(1, STEP_TOKENS // tile.capacity)
    for i in range(begin, end, step):
        for head in range(heads[0], heads[1]):
            following = head + 1 if head + 1 < heads[1] else heads[0]
            _attend_tiles(
                tile, stored, halves, tables, row, head, following, i, min(i + step, end),
                num_tokens, shape, record, work, wb, bases[0] + (head - heads[0]) * bases[1],
            )  # fmt: skip


@numba.njit(cache=True, parallel=True)
def attend_rows(inputs, stores, kept, rest, dense, tables, shape, record, work, work_bytes):
    """Attend for every (group of KV heads, split, row), rows fastest so that lengths mix.

    Args:
        inputs: `Inputs`.
        stores: `Stores`.
        kept: `TokenClass` of the kept tokens' pages.
        rest: `TokenClass` of the other pages.
        dense: `TokenClass` of the dense blocks.
        tables: `Tables`.
        shape: `Shape`.
        record: `Record`.
        work: Written: records [num_kv_heads, num_splits, num_rows, record.size], flat float32.
        work_bytes: The same memory as uint8.
    """
    num_rows = inputs.queries.shape[0]
    apart = shape.num_splits * num_rows
    num_items = -(-shape.num_kv_heads // shape.heads_per_item) * apart
    for item in numba.prange(num_items):
        row = item % num_rows
        split = item // num_rows % shape.num_splits
        first = item // apart * shape.heads_per_item
        heads = first, min(first + shape.heads_per_item, shape.num_kv_heads)
        bases = (first * apart + item % apart) * record.size, apart * record.size
        for i in range(heads[1] - heads[0]):
            slot = tables.rows[row, 0]
            _start(work, bases[0] + i * bases[1], record, shape, inputs, row, slot, first + i)
        for table in range(3):
            tile = kept if table == KEPT else (rest if table == REST else dense)
            stored = stores.dense if table == DENSE else stores.heap
            _attend_row(
                tile, stored, stores.halves, tables, row, heads, split, shape, record, work,
                work_bytes, bases,
            )  # fmt: skip


@numba.njit(cache=True)
def _join_pair(work, base, other, record, shape):
    """Add the record at `other` to the one at `base`."""
    nq = shape.num_queries
    for q in range(nq):
        state, state_b = base + record.state + q, other + record.state + q
        top = max(work[state], work[state_b])
        a, b = _power(work[state] - top), _power(work[state_b] - top)
        work[state] = top
        work[state + nq] = a * work[state + nq] + b * work[state_b + nq]
        for region in range(2):
            first = record.sums + (region * nq + q) * shape.padded_size
            for channel in range(shape.padded_size):
                to, of = _Index(base + first + channel), _Index(other + first + channel)
                work[to] = a * work[to] + b * work[of]


@numba.njit(cache=True, parallel=True)
def finish_rows(inputs, shape, record, work, out, lse):
    """Join the splits of every row and head, and take their outputs from the records.

    Args:
        inputs: `Inputs`.
        shape: `Shape`.
        record: `Record`.
        work: Records, see `attend_rows`.
        out: Written, float32 [num_rows, num_heads, head_size].
        lse: Written, log of the softmax denominators, float32 [num_rows, num_heads].
    """
    num_rows, nq = out.shape[0], shape.num_queries
    per_head = out.shape[1] // shape.num_kv_heads
    for item in numba.prange(num_rows * shape.num_kv_heads):
        row, head = item % num_rows, item // num_rows
        base = (head * shape.num_splits * num_rows + row) * record.size
        for split in range(1, shape.num_splits):
            _join_pair(work, base, base + split * num_rows * record.size, record, shape)
        for index in range(per_head):
            plain = base + record.sums + index * shape.padded_size
            turned = plain + nq * shape.padded_size
            if inputs.rotated:
                _rotate(work, turned, shape.head_size)
            top = work[base + record.state + index] - work[base + record.offsets + index]
            total = work[base + record.state + nq + index]
            share = np.float32(1) / total if total != 0 else np.float32(0)
            to = head * per_head + index
            lse[row, to] = top * _LOG2 + np.float32(math.log(total)) if total != 0 else -np.inf
            for channel in range(shape.head_size):
                value = work[_Index(plain + channel)] + work[_Index(turned + channel)]
                out[row, to, channel] = value * share
