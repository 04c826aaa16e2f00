"""Decode attention in Triton: split-K flash decoding over pages and dense blocks.

A row's context has parts: kept tokens' pages, dense head and tail, the rest's pages. A program
attends with all query heads of one KV head over one share of one part, so that every page is read
once per KV head; a second kernel puts the shares together. Codes are expanded in registers. Queries
are folded and outputs rotated back as in `reference`.
"""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from vllm_zipvl.core.geometry import UNQUANTISED, PageGeometry
from vllm_zipvl.core.quantization import KeyNorm, fold_key_norm, hadamard
from vllm_zipvl.ops.decode_attention.triton_parts import (
    PageLayout,
    attend_pages,
    attend_plain,
    load_query,
    share_of,
)
from vllm_zipvl.ops.tiles import padded, rounded, tile_side

if TYPE_CHECKING:
    from vllm_zipvl.ops.decode_attention.api import CachedContext, DecodeRows

MAX_SHARES = 32
PROGRAMS_PER_PROCESSOR = 4
INTERPRETED_SHARES = 3


@triton.jit(
    do_not_specialize=["block_table_stride"],
    do_not_specialize_on_alignment=["page_table", "page_counts", "block_table"],
)
def _attend(
    query,
    folded,
    offsets,
    scale,
    cache,
    heap,
    parameters,
    elements,
    page_table,
    page_counts,
    block_table,
    slots,
    table_rows,
    head_lens,
    tail_starts,
    context_lens,
    partial,
    partial_top,
    partial_total,
    cache_block_stride,
    block_table_stride,
    page_table_width,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    group_padded: tl.constexpr,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    block_size: tl.constexpr,
    high: tl.constexpr,
    low: tl.constexpr,
    num_shares: tl.constexpr,
    num_parts: tl.constexpr,
    tile_tokens: tl.constexpr,
):
    """One program per query row, KV head and share of a part: kept, dense, the rest."""
    row, head, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    part, index = place // num_shares, place % num_shares
    slot = tl.load(slots + row).to(tl.int64)
    members = tl.arange(0, group_padded)
    is_member = members < group
    heads = (row * num_kv_heads + head).to(tl.int64) * group + members
    share = heads * (num_parts * num_shares) + place
    table = page_table + slot * page_table_width
    top = tl.full([group_padded], float("-inf"), tl.float32)
    total = tl.zeros([group_padded], tl.float32)
    pools = (heap, parameters, elements)
    if part == 0:
        top, total = attend_pages(
            query, folded, offsets, scale, pools, table, 1, tl.load(page_counts + slot * 2),
            index, head, heads, is_member, partial, share, high, head_size, channels_padded,
            num_shares, tile_tokens,
        )  # fmt: skip
    elif part == 1:
        q, mask, channels = load_query(query, heads, is_member, head_size, channels_padded)
        sums = tl.zeros([group_padded, channels_padded], tl.float32)
        table_row = tl.load(table_rows + row).to(tl.int64)
        head_len, tail_start = tl.load(head_lens + row), tl.load(tail_starts + row)
        tail_len = tl.maximum(tl.load(context_lens + row) - tail_start, 0)
        first, last = share_of(head_len + tail_len, index, num_shares, tile_tokens)
        for start in range(first, last, tile_tokens):
            # Of head and tail as if they were one.
            dense = start + tl.arange(0, tile_tokens)
            is_token = dense < last
            tokens = tl.where(dense < head_len, dense, dense + tail_start - head_len)
            blocks = block_table + table_row * block_table_stride + tokens // block_size
            block = tl.load(blocks, mask=is_token, other=0).to(tl.int64)
            keys = block * cache_block_stride + head * block_size * 2 * head_size
            keys += tokens % block_size * 2 * head_size
            top, total, sums = attend_plain(
                q, scale, cache, keys, keys + head_size, is_token, top, total, sums, head_size
            )
        tl.store(partial + share[:, None] * head_size + channels[None, :], sums, mask=mask)
    elif num_parts > 2:
        # The rest's pages lie from the right end towards the left.
        end = table + page_table_width - 1
        top, total = attend_pages(
            query, folded, offsets, scale, pools, end, -1, tl.load(page_counts + slot * 2 + 1),
            index, head, heads, is_member, partial, share, low, head_size, channels_padded,
            num_shares, tile_tokens,
        )  # fmt: skip
    tl.store(partial_top + share, top, mask=is_member)
    tl.store(partial_total + share, total, mask=is_member)


@triton.jit
def _combine(
    partial,
    partial_top,
    partial_total,
    rotation,
    out,
    log_total,
    head_size: tl.constexpr,
    channels_padded: tl.constexpr,
    num_shares: tl.constexpr,
    num_parts: tl.constexpr,
    shares_padded: tl.constexpr,
    high_bits: tl.constexpr,
    low_bits: tl.constexpr,
):
    """Put the shares of one query head together; one program each."""
    head = tl.program_id(0).to(tl.int64)
    all_shares: tl.constexpr = num_parts * num_shares
    shares, channels = tl.arange(0, shares_padded), tl.arange(0, channels_padded)
    is_share, is_channel = shares < all_shares, channels < head_size
    tops = tl.load(partial_top + head * all_shares + shares, mask=is_share, other=float("-inf"))
    totals = tl.load(partial_total + head * all_shares + shares, mask=is_share, other=0)
    top = tl.max(tops, axis=0)
    worth = tl.exp(tops - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(worth * totals, axis=0)
    places = (head * all_shares + shares)[:, None] * head_size + channels[None, :]
    mask = is_share[:, None] & is_channel[None, :]
    sums = worth[:, None] * tl.load(partial + places, mask=mask, other=0)
    part = shares // num_shares
    is_rotated = ((part == 0) & (high_bits != 16)) | ((part == 2) & (low_bits != 16))
    rotated = tl.sum(tl.where(is_rotated[:, None], sums, 0.0), axis=0)
    plain = tl.sum(tl.where(is_rotated[:, None], 0.0, sums), axis=0)
    square = channels[:, None] * head_size + channels[None, :]
    turn = tl.load(rotation + square, mask=is_channel[:, None] & is_channel[None, :], other=0)
    plain += tl.sum(rotated[:, None] * turn, axis=0)
    # A row without context: zeros.
    result = plain / tl.where(total > 0, total, 1.0)
    result = rounded(result, out.dtype.element_ty)
    tl.store(out + head * head_size + channels, result, mask=is_channel)
    tl.store(log_total + head, top + tl.log(total))


def _num_shares(num_programs: int, device: torch.device) -> int:
    """Shares of a row's context, so that all processors have work; fixed by the batch's size.

    A power of two: each number is a kernel of its own.
    """
    if device.type != "cuda":
        return INTERPRETED_SHARES
    wanted = max(1, _programs_at_once(device) // num_programs)
    return min(MAX_SHARES, 1 << (wanted.bit_length() - 1))


def workspace_bytes(
    num_queries: int, num_heads: int, num_kv_heads: int, head_size: int, device: torch.device
) -> int:
    """See `api.workspace_bytes`."""
    programs = num_queries * num_kv_heads * 3
    if device.type == "cuda":
        programs = max(programs, _programs_at_once(device))
    else:
        programs *= INTERPRETED_SHARES
    # A sum, a maximum and a total of every share; queries in float32, in order, scaled and folded;
    # norms of the rows, with the order as int64 too.
    shares = programs * num_heads // num_kv_heads * (head_size + 2)
    vectors = 4 * num_queries * (num_heads + num_kv_heads)
    return torch.float32.itemsize * (shares + vectors * head_size)


def _programs_at_once(device: torch.device) -> int:
    """As many as give all processors of a GPU work; with fewer rows, contexts are cut."""
    properties = torch.cuda.get_device_properties(device)
    return PROGRAMS_PER_PROCESSOR * properties.multi_processor_count


def _layout(geometry: PageGeometry, bits: int) -> PageLayout:
    layout = geometry.layout(bits or UNQUANTISED)
    sizes = (layout.capacity, layout.code_bytes, triton.next_power_of_2(layout.code_bytes))
    return PageLayout(geometry.page_bytes, geometry.head_page_bytes, bits, *sizes)


def decode_attention(
    query: torch.Tensor,
    context: "CachedContext",
    rows: "DecodeRows",
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `api.decode_attention`."""
    geometry, device = context.geometry, query.device
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = geometry.num_kv_heads
    group = num_heads // num_kv_heads
    norm = KeyNorm(*context.key_norms[rows.slots.long()].unbind(1))
    grouped = query.float().view(num_queries, num_kv_heads, group, head_size) * scale
    folded, offsets = fold_key_norm(grouped, norm)
    num_parts = 3 if geometry.low_bits else 2
    num_shares = _num_shares(num_queries * num_kv_heads * num_parts, device)
    floats = {"dtype": torch.float32, "device": device}
    shares = (num_queries, num_heads, num_parts * num_shares)
    partial, sums = torch.empty(*shares, head_size, **floats), torch.empty(2, *shares, **floats)
    log_total = torch.empty(num_queries, num_heads, **floats)
    if num_queries == 0:
        return log_total
    kv_cache = context.kv_cache
    sizes = {
        "head_size": head_size,
        "channels_padded": padded(head_size),
        "num_shares": num_shares,
        "num_parts": num_parts,
    }
    _attend[(num_queries, num_kv_heads, num_parts * num_shares)](
        *(x.contiguous() for x in (query, folded, offsets)),
        scale,
        kv_cache,
        *(context.heap.view(dtype) for dtype in (torch.uint8, torch.float16, kv_cache.dtype)),
        *(context.page_table, context.page_counts, context.block_table),
        *rows,
        partial,
        *sums,
        *(kv_cache.stride(0), context.block_table.stride(0), context.page_table.shape[1]),
        num_kv_heads=num_kv_heads,
        group=group,
        group_padded=padded(group),
        block_size=kv_cache.shape[2],
        tile_tokens=tile_side(head_size, kv_cache.element_size()),
        high=_layout(geometry, geometry.high_bits),
        low=_layout(geometry, geometry.low_bits),
        **sizes,
    )
    _combine[(num_queries * num_heads,)](
        partial,
        *sums,
        hadamard(head_size, device),
        out,
        log_total,
        shares_padded=triton.next_power_of_2(num_parts * num_shares),
        high_bits=geometry.high_bits,
        low_bits=geometry.low_bits,
        **sizes,
    )
    return log_total
