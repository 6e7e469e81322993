"""The device programs of `epilogues.py`: everything small behind the four large products of a layer.

Tensors arrive as pointers with the distance between rows. `product` holds the outputs of all maps of its input, then
the lows B x; a tile of rows has 16 of them because the matrix units take 16. Sums are float32 and rounded where the
naive programs round.
"""

import triton
import triton.language as tl

from pte.kernels.float8_programs import codes_of, scale_and_inverse


@triton.jit
def steered_lows(
    low,
    other_low,
    low_row,
    state,
    state_row,
    state_out,
    state_in,
    rows,
    running,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_OTHER: tl.constexpr,
):
    """S (B x) of two maps for a tile of rows in the model's dtype, S read once; B x where there is no S.

    Without another map both results are the first.
    """
    outs = tl.arange(0, BLOCK_RANK)
    starts = rows.to(tl.int64)
    if HAS_STATE:
        steered = tl.zeros((rows.shape[0], BLOCK_RANK), tl.float32)
        other_steered = tl.zeros((rows.shape[0], BLOCK_RANK), tl.float32)
        row_starts = starts[:, None, None]
        there = running[:, None, None]
        for first in tl.static_range(0, RANK, CHUNK):
            ins = (first + tl.arange(0, CHUNK))[None, None, :]
            inside = there & (ins < RANK)
            places = row_starts * state_row + outs[None, :, None] * state_out + ins * state_in
            s = tl.load(state + places, mask=inside & (outs < RANK)[None, :, None], other=0.0)
            x = tl.load(low + row_starts * low_row + ins, mask=inside, other=0.0).to(tl.float32)
            steered += tl.sum(s * x, axis=2)
            if HAS_OTHER:
                y = tl.load(other_low + row_starts * low_row + ins, mask=inside, other=0.0).to(tl.float32)
                other_steered += tl.sum(s * y, axis=2)
        result = steered.to(low.dtype.element_ty)
        other = other_steered.to(low.dtype.element_ty)
    else:
        places = starts[:, None] * low_row + outs[None, :]
        result = tl.load(low + places, mask=running[:, None], other=0.0)
        other = tl.load(other_low + places, mask=running[:, None], other=0.0)
    return (result, other) if HAS_OTHER else (result, result)


@triton.jit
def added(out, low, up, columns, inside, BLOCK_RANK: tl.constexpr):
    """out + scale * A low for a tile of rows and columns, rounded once."""
    ranks = tl.arange(0, BLOCK_RANK)
    a = tl.load(up + columns.to(tl.int64)[None, :] * BLOCK_RANK + ranks[:, None], mask=inside[None, :], other=0.0)
    return (out.to(tl.float32) + tl.dot(low, a, input_precision="ieee")).to(out.dtype)


@triton.jit
def turned(x, y, cosine, signed_sine):
    """x cos + y signed sin, rounded after every operation as tensors in the model's dtype are."""
    dtype = x.dtype
    straight = (x.to(tl.float32) * cosine.to(tl.float32)).to(dtype)
    across = (y.to(tl.float32) * signed_sine.to(tl.float32)).to(dtype)
    return (straight.to(tl.float32) + across.to(tl.float32)).to(dtype)


@triton.jit
def store_head(goal, channel, scale_goal, x, y, halves, tile, running, HALF: tl.constexpr, FLOAT8: tl.constexpr):
    """Writes a head given as its two halves, for a tile of rows: as it is, or as float8 codes and their scale."""
    if FLOAT8:
        largest = tl.maximum(tl.max(tl.abs(x.to(tl.float32)), axis=1), tl.max(tl.abs(y.to(tl.float32)), axis=1))
        scale, inverse = scale_and_inverse(largest)
        tl.store(scale_goal, scale[:, None].to(scale_goal.dtype.element_ty), mask=running[:, None])
        tl.store(goal + halves[None, :] * channel, codes_of(x, inverse[:, None]), mask=tile)
        tl.store(goal + (HALF + halves)[None, :] * channel, codes_of(y, inverse[:, None]), mask=tile)
    else:
        tl.store(goal + halves[None, :] * channel, x, mask=tile)
        tl.store(goal + (HALF + halves)[None, :] * channel, y, mask=tile)


@triton.jit
def finish_qkv_program(
    product,
    product_row,
    up,
    state,
    state_row,
    state_out,
    state_in,
    norm,
    rotations,
    positions,
    slots,
    query,
    keys,
    values,
    key_row,
    key_head,
    key_slot,
    key_channel,
    value_row,
    value_head,
    value_slot,
    value_channel,
    key_scales,
    value_scales,
    key_scale_row,
    key_scale_head,
    value_scale_row,
    value_scale_head,
    epsilon,
    batch,
    heads_per_program,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERY_PLACE: tl.constexpr,
    KEY_PLACE: tl.constexpr,
    VALUE_PLACE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    FLOAT8: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Program (tile of rows, some heads of one map): a head at a time as its two halves, which rotate together."""
    HALF: tl.constexpr = HEAD_DIM // 2
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    running = rows < batch
    chunk = tl.program_id(1)
    query_chunks = tl.cdiv(QUERY_HEADS, heads_per_program)
    kv_chunks = tl.cdiv(KV_HEADS, heads_per_program)
    is_query = chunk < query_chunks
    is_value = chunk >= query_chunks + kv_chunks
    first_chunk = tl.where(is_query, 0, tl.where(is_value, query_chunks + kv_chunks, query_chunks))
    first_head = tl.where(is_query, 0, tl.where(is_value, QUERY_HEADS + KV_HEADS, QUERY_HEADS))
    place = tl.where(is_query, QUERY_PLACE, tl.where(is_value, VALUE_PLACE, KEY_PLACE))
    first = (chunk - first_chunk) * heads_per_program
    last = tl.minimum(first + heads_per_program, tl.where(is_query, QUERY_HEADS, KV_HEADS))

    halves = tl.arange(0, BLOCK_HALF)
    inside = halves < HALF
    tile = running[:, None] & inside[None, :]
    row_starts = rows.to(tl.int64)[:, None]
    if HAS_UPDATE:
        lows = product + (QUERY_HEADS + 2 * KV_HEADS) * HEAD_DIM + place * BLOCK_RANK
        low, _ = steered_lows(
            lows,
            lows,
            product_row,
            state,
            state_row,
            state_out,
            state_in,
            rows,
            running,
            RANK,
            BLOCK_RANK,
            CHUNK,
            HAS_STATE,
            False,
        )
    turn = tl.load(positions + rows, mask=running, other=0).to(tl.int64)[:, None] * (2 * HEAD_DIM) + halves[None, :]
    cosine_1 = tl.load(rotations + turn, mask=tile, other=0.0)
    cosine_2 = tl.load(rotations + turn + HALF, mask=tile, other=0.0)
    sine_1 = tl.load(rotations + turn + HEAD_DIM, mask=tile, other=0.0)
    sine_2 = tl.load(rotations + turn + HEAD_DIM + HALF, mask=tile, other=0.0)
    slot = tl.load(slots + rows, mask=running, other=0).to(tl.int64)[:, None]

    for head in tl.range(first, last):
        far = tl.zeros((1, 1), tl.int64) + head
        columns = (first_head + head) * HEAD_DIM + halves
        sources = product + row_starts * product_row + columns[None, :]
        x_1 = tl.load(sources, mask=tile, other=0.0)
        x_2 = tl.load(sources + HALF, mask=tile, other=0.0)
        if HAS_UPDATE:
            x_1 = added(x_1, low, up, columns, inside, BLOCK_RANK)
            x_2 = added(x_2, low, up, columns + HALF, inside, BLOCK_RANK)
        if is_value:
            goal = values + row_starts * value_row + far * value_head + slot * value_slot
            scale_goal = value_scales + row_starts * value_scale_row + far * value_scale_head + slot
            store_head(goal, value_channel, scale_goal, x_1, x_2, halves, tile, running, HALF, FLOAT8)
        else:
            if HAS_NORM:
                wide_1 = x_1.to(tl.float32)
                wide_2 = x_2.to(tl.float32)
                squares = tl.sum(wide_1 * wide_1, axis=1) + tl.sum(wide_2 * wide_2, axis=1)
                inverse = tl.rsqrt(squares / HEAD_DIM + epsilon)[:, None]
                weights = norm + tl.where(is_query, 0, HEAD_DIM) + halves
                weight_1 = tl.load(weights, mask=inside, other=0.0).to(tl.float32)[None, :]
                weight_2 = tl.load(weights + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
                x_1 = ((wide_1 * inverse).to(x_1.dtype).to(tl.float32) * weight_1).to(x_1.dtype)
                x_2 = ((wide_2 * inverse).to(x_2.dtype).to(tl.float32) * weight_2).to(x_2.dtype)
            y_1 = turned(x_1, x_2, cosine_1, sine_1)
            y_2 = turned(x_2, x_1, cosine_2, sine_2)
            if is_query:
                places = query + row_starts * (QUERY_HEADS * HEAD_DIM) + head * HEAD_DIM + halves[None, :]
                tl.store(places, y_1, mask=tile)
                tl.store(places + HALF, y_2, mask=tile)
            else:
                goal = keys + row_starts * key_row + far * key_head + slot * key_slot
                scale_goal = key_scales + row_starts * key_scale_row + far * key_scale_head + slot
                store_head(goal, key_channel, scale_goal, y_1, y_2, halves, tile, running, HALF, FLOAT8)


@triton.jit
def finish_gate_up_program(
    product,
    product_row,
    up,
    state,
    state_row,
    state_out,
    state_in,
    activated,
    batch,
    features,
    columns_per_program,
    GATE_PLACE: tl.constexpr,
    UP_PLACE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Program (tile of rows, some tiles of columns): silu(gate) * up, both of the same columns."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    running = rows < batch
    row_starts = rows.to(tl.int64)[:, None]
    if HAS_UPDATE:
        lows = product + 2 * features
        gate_low, up_low = steered_lows(
            lows + GATE_PLACE * BLOCK_RANK,
            lows + UP_PLACE * BLOCK_RANK,
            product_row,
            state,
            state_row,
            state_out,
            state_in,
            rows,
            running,
            RANK,
            BLOCK_RANK,
            CHUNK,
            HAS_STATE,
            GATE_PLACE != UP_PLACE,
        )
    first = tl.program_id(1) * columns_per_program
    for start in tl.range(first, tl.minimum(first + columns_per_program, features), BLOCK_COLUMNS, num_stages=4):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        inside = columns < features
        tile = running[:, None] & inside[None, :]
        sources = product + row_starts * product_row + columns[None, :]
        gate_x = tl.load(sources, mask=tile, other=0.0)
        up_x = tl.load(sources + features, mask=tile, other=0.0)
        if HAS_UPDATE:
            gate_x = added(gate_x, gate_low, up, columns, inside, BLOCK_RANK)
            up_x = added(up_x, up_low, up, columns + features, inside, BLOCK_RANK)
        wide = gate_x.to(tl.float32)
        active = (wide / (1.0 + tl.exp(-wide))).to(gate_x.dtype)
        result = (active.to(tl.float32) * up_x.to(tl.float32)).to(gate_x.dtype)
        tl.store(activated + row_starts * features + columns[None, :], result, mask=tile)


@triton.jit
def finish_residual_program(
    product,
    product_row,
    up,
    state,
    state_row,
    state_out,
    state_in,
    residual,
    weight,
    summed,
    normed,
    batch,
    hidden,
    epsilon,
    PLACE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    HAS_STATE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    """Program (some whole rows): the update is added in place, a tile of columns at a time; then all is normed."""
    first = tl.program_id(0) * ROWS
    if HAS_UPDATE:
        lanes = tl.arange(0, BLOCK_ROWS)
        tile_rows = first + lanes
        running = (lanes < ROWS) & (tile_rows < batch)
        lows = product + hidden + PLACE * BLOCK_RANK
        low, _ = steered_lows(
            lows,
            lows,
            product_row,
            state,
            state_row,
            state_out,
            state_in,
            tile_rows,
            running,
            RANK,
            BLOCK_RANK,
            CHUNK,
            HAS_STATE,
            False,
        )
        for start in tl.range(0, hidden, BLOCK_COLUMNS, num_stages=5):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            there = columns < hidden
            tile = running[:, None] & there[None, :]
            places = product + tile_rows.to(tl.int64)[:, None] * product_row + columns[None, :]
            out = tl.load(places, mask=tile, other=0.0)
            tl.store(places, added(out, low, up, columns, there, BLOCK_RANK), mask=tile)
        # The rows are read again by other threads than wrote them.
        tl.debug_barrier()
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    channels = tl.arange(0, BLOCK_HIDDEN)
    inside = (rows < batch) & (channels < hidden)[None, :]
    places = rows * hidden + channels[None, :]
    out = tl.load(product + rows * product_row + channels[None, :], mask=inside, other=0.0)
    before = tl.load(residual + places, mask=inside, other=0.0)
    total = (before.to(tl.float32) + out.to(tl.float32)).to(out.dtype)
    tl.store(summed + places, total, mask=inside)
    wide = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / hidden + epsilon)[:, None]
    factors = tl.load(weight + channels, mask=channels < hidden, other=0.0).to(tl.float32)[None, :]
    scaled = (wide * inverse).to(out.dtype).to(tl.float32)
    tl.store(normed + places, (scaled * factors).to(out.dtype), mask=inside)
