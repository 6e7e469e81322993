"""The device programs of `attention.py`: attention of one query a row over a part of its slots, and the combination.

Tensors arrive as pointers with the distances between neighbours. A tile of keys is loaded once for all query heads that
share it; empty slots are masked in the load itself, so that they cost no memory traffic.
"""

import triton
import triton.language as tl


@triton.jit
def attend(
    query,
    keys,
    values,
    positions,
    ends,
    attended,
    partial_max,
    partial_sum,
    partial_attended,
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
    position_row,
    scaling,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """Program (row and key head, split): softmax over its part of the filled slots, or what `combine` needs of it."""
    pair = tl.program_id(0)
    split = tl.program_id(1)
    row = pair // KV_HEADS
    head = pair % KV_HEADS
    members = tl.arange(0, BLOCK_GROUP)
    channels = tl.arange(0, BLOCK_DIM)
    places = (pair * GROUP + members)[:, None] * HEAD_DIM + channels[None, :]
    there = (members < GROUP)[:, None] & (channels < HEAD_DIM)[None, :]
    q = tl.load(query + places, mask=there, other=0.0)
    # Powers of two: exp2 is the device's own exponential.
    to_exponent = scaling * 1.4426950408889634

    key_start = keys + row.to(tl.int64) * key_row + head.to(tl.int64) * key_head
    value_start = values + row.to(tl.int64) * value_row + head.to(tl.int64) * value_head
    key_scale_start = key_scales + row.to(tl.int64) * key_scale_row + head.to(tl.int64) * key_scale_head
    value_scale_start = value_scales + row.to(tl.int64) * value_scale_row + head.to(tl.int64) * value_scale_head
    position_start = positions + row.to(tl.int64) * position_row
    end = tl.load(ends + row)
    share = tl.cdiv(tl.cdiv(end, BLOCK_SLOTS), SPLITS) * BLOCK_SLOTS
    first = split * share
    last = tl.minimum(first + share, end)

    largest = tl.full((BLOCK_GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_GROUP,), tl.float32)
    weighted = tl.zeros((BLOCK_GROUP, BLOCK_DIM), tl.float32)
    for start in tl.range(first, last, BLOCK_SLOTS):
        slots = start + tl.arange(0, BLOCK_SLOTS)
        filled = tl.load(position_start + slots, mask=slots < last, other=-1) >= 0
        loaded = filled[:, None] & (channels < HEAD_DIM)[None, :]
        far = slots.to(tl.int64)[:, None]
        k = tl.load(key_start + far * key_slot + channels[None, :] * key_channel, mask=loaded, other=0.0)
        if FLOAT8:
            # Exact: codes have four bits, scales are powers of two.
            scales = tl.load(key_scale_start + slots, mask=filled, other=0.0).to(tl.float32)
            scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scales[None, :] * to_exponent
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * to_exponent
        scores = tl.where(filled[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        # Where nothing was seen yet, -inf - -inf would be NaN.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.sum(weights, axis=1)
        v = tl.load(value_start + far * value_slot + channels[None, :] * value_channel, mask=loaded, other=0.0)
        if FLOAT8:
            scales = tl.load(value_scale_start + slots, mask=filled, other=0.0).to(tl.float32)
            weights *= scales[None, :]
            v = v.to(q.dtype)
        weighted = weighted * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = larger

    if SPLITS == 1:
        result = weighted / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(attended + places, result.to(attended.dtype.element_ty), mask=there)
    else:
        parts = (pair * GROUP + members) * SPLITS + split
        tl.store(partial_max + parts, largest, mask=members < GROUP)
        tl.store(partial_sum + parts, total, mask=members < GROUP)
        tl.store(partial_attended + parts[:, None] * HEAD_DIM + channels[None, :], weighted, mask=there)


@triton.jit
def combine(
    partial_max,
    partial_sum,
    partial_attended,
    attended,
    SPLITS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """Program (row and query head): one softmax of the softmaxes over parts."""
    head = tl.program_id(0)
    splits = tl.arange(0, BLOCK_SPLITS)
    channels = tl.arange(0, BLOCK_DIM)
    parts = head * SPLITS + splits
    largest = tl.load(partial_max + parts, mask=splits < SPLITS, other=float("-inf"))
    total = tl.load(partial_sum + parts, mask=splits < SPLITS, other=0.0)
    there = (splits < SPLITS)[:, None] & (channels < HEAD_DIM)[None, :]
    weighted = tl.load(partial_attended + parts[:, None] * HEAD_DIM + channels[None, :], mask=there, other=0.0)
    overall = tl.max(largest, axis=0)
    share = tl.exp2(largest - tl.where(overall == float("-inf"), 0.0, overall))
    whole = tl.sum(total * share, axis=0)
    result = tl.sum(weighted * share[:, None], axis=0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(attended + head * HEAD_DIM + channels, result.to(attended.dtype.element_ty), mask=channels < HEAD_DIM)
