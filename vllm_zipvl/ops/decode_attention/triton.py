"""Decode attention in Triton: split-K flash decoding over pages and dense blocks.

A row's context has parts: kept tokens' pages, dense head and tail, the rest's pages. Tiles of all
of them are cut into equal shares, and a program of one warp attends with all query heads of one KV
head over one share, so that every page is read once per KV head and no warp waits for another; what
it finds in each part is a piece, and a second kernel puts the pieces together. Codes are expanded
in registers (`triton_codes`). Queries are folded before, and outputs rotated back after.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from vllm_zipvl.core.geometry import UNQUANTISED, PageGeometry, cdiv
from vllm_zipvl.ops.decode_attention.triton_codes import PageLayout
from vllm_zipvl.ops.decode_attention.triton_parts import (
    NUM_SUMS,
    attend_dense,
    attend_pages,
    num_tiles,
)
from vllm_zipvl.ops.decode_attention.triton_rotation import combine, fold
from vllm_zipvl.ops.tiles import padded

if TYPE_CHECKING:
    from vllm_zipvl.ops.decode_attention.api import CachedContext, DecodeRows

MAX_SHARES, MAX_WAVES = 128, 4
PROGRAMS_PER_PROCESSOR = 12
"""Of one warp, as many as registers are for."""
WIDE_PROGRAMS_PER_PROCESSOR = 8
INTERPRETED_SHARES = 3
SHARE_COST = 0.004
"""What beginning a share takes, in terms of a context of many tokens."""
MIN_TILES = 2
"""Of a share; shorter contexts have fewer shares."""
MIN_HEADS = 8
"""Of a tile, as few as tensor cores take."""
TILE_PLACES = 16
"""Of sums that are put together at once, and of as many more that are loaded meanwhile."""
PLAIN_TOKENS = 16
"""Of a tile that is not quantised, as few as tensor cores take: a warp holds all of it."""


class Launch(NamedTuple):
    """How the kernel works through pages, if codes are its operands in float16.

    Attributes:
        tile_slots: Places for tokens in a tile, of one page or two.
        ahead: Whether the values of a tile are loaded before the tile ahead is done.
        num_warps: Of a program.
        max_registers: Of a thread, or None.
    """

    tile_slots: int = 32
    ahead: bool = True
    num_warps: int = 1
    max_registers: int | None = 168


LAUNCH = Launch()
MOST_SUMS = 128 * MIN_HEADS
"""What a warp holds beside others, as the launch has it."""
WIDE_LAUNCH = Launch(ahead=False, max_registers=None)
MOST_WIDE_SUMS = 2 * MOST_SUMS
"""What a warp holds that has all registers it can have; more of them are for more warps."""


@triton.jit(
    do_not_specialize=["num_shares", "min_tiles", "block_table_stride"],
    do_not_specialize_on_alignment=["page_table", "page_counts", "block_table"],
)
def _attend(
    query,
    folded,
    folded_sums,
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
    num_shares,
    min_tiles,
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
    num_parts: tl.constexpr,
    tile_tokens: tl.constexpr,
    ahead: tl.constexpr,
):
    """One program per KV head, share and query row; it goes through the parts that it has of."""
    head, share, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row).to(tl.int64)
    table = page_table + slot * page_table_width
    num_kept = tl.load(page_counts + slot * 2)
    head_len, tail_start = tl.load(head_lens + row), tl.load(tail_starts + row)
    num_dense = head_len + tl.maximum(tl.load(context_lens + row) - tail_start, 0)
    kept_end = num_tiles(num_kept, high, tile_tokens)
    dense_end = kept_end + tl.cdiv(num_dense, tile_tokens)
    end, num_rest = dense_end, 0
    if num_parts > 2:
        num_rest = tl.load(page_counts + slot * 2 + 1)
        end += num_tiles(num_rest, low, tile_tokens)
    num_used = tl.maximum(tl.minimum(num_shares, tl.cdiv(end, min_tiles)), 1)
    first = tl.minimum(share, num_used) * end // num_used
    last = tl.minimum(share + 1, num_used) * end // num_used

    members = tl.arange(0, group_padded)
    is_member = members < group
    heads = (row * num_kv_heads + head).to(tl.int64) * group + members
    piece = heads * (num_parts * num_shares) + share
    # Later shares have later parts, so these are places of pieces, too, and fewer.
    target = partial + (heads * (num_shares + num_parts - 1) + share) * head_size
    pools = (heap, parameters, elements)
    queries = (query, folded, folded_sums)
    top = tl.full([group_padded], float("-inf"), tl.float32)
    total = tl.zeros([group_padded], tl.float32)
    if first < kept_end and first < last:
        top, total = attend_pages(
            queries, scale, pools, table, 1, num_kept, first, tl.minimum(last, kept_end), head,
            heads, is_member, target, high, head_size, channels_padded,
            tile_tokens, ahead,
        )  # fmt: skip
    tl.store(partial_top + piece, top, mask=is_member)
    tl.store(partial_total + piece, total, mask=is_member)

    piece += num_shares
    top = tl.full([group_padded], float("-inf"), tl.float32)
    total = tl.zeros([group_padded], tl.float32)
    dense_first, dense_last = tl.maximum(first, kept_end), tl.minimum(last, dense_end)
    if dense_first < dense_last:
        blocks = block_table + tl.load(table_rows + row).to(tl.int64) * block_table_stride
        top, total = attend_dense(
            query, scale, cache, blocks, cache_block_stride, head_len, tail_start, num_dense,
            dense_first - kept_end, dense_last - kept_end, head, heads, is_member,
            target + head_size, head_size, channels_padded, block_size, tile_tokens,
        )  # fmt: skip
    tl.store(partial_top + piece, top, mask=is_member)
    tl.store(partial_total + piece, total, mask=is_member)

    if num_parts > 2:
        piece += num_shares
        top = tl.full([group_padded], float("-inf"), tl.float32)
        total = tl.zeros([group_padded], tl.float32)
        first = tl.maximum(first, dense_end)
        if first < last:
            # The rest's pages lie from the right end towards the left.
            top, total = attend_pages(
                queries, scale, pools, table + page_table_width - 1, -1, num_rest,
                first - dense_end, last - dense_end, head, heads, is_member,
                target + 2 * head_size, low, head_size, channels_padded, tile_tokens, ahead,
            )  # fmt: skip
        tl.store(partial_top + piece, top, mask=is_member)
        tl.store(partial_total + piece, total, mask=is_member)


@lru_cache(maxsize=4096)
def _shares_of(num_programs: int, at_once: int) -> int:
    """Shares by which as many contexts of one length take the shortest time.

    Their programs run in waves, of as many as run at once.
    """

    def time(num_shares: int) -> float:
        return cdiv(num_programs * num_shares, at_once) * (1 / num_shares + SHARE_COST)

    most = min(MAX_SHARES, max(1, MAX_WAVES * at_once // num_programs))
    return min(range(1, most + 1), key=time)


def _group_padded(group: int) -> int:
    return max(MIN_HEADS, triton.next_power_of_2(group))


def _num_sums(num_heads: int, num_kv_heads: int, head_size: int) -> int:
    """Of a program, for the query heads of one KV head."""
    return padded(head_size) * _group_padded(num_heads // num_kv_heads)


def _num_shares(num_programs: int, num_sums: int, device: torch.device) -> int:
    """Shares of a row's context, so that all processors have work; fixed by the batch's size."""
    if device.type != "cuda" or num_programs == 0:
        return INTERPRETED_SHARES
    return _shares_of(num_programs, _programs_at_once(num_sums, device))


def _workspace_floats(
    num_queries: int, num_heads: int, num_kv_heads: int, head_size: int, device: torch.device
) -> int:
    num_sums = _num_sums(num_heads, num_kv_heads, head_size)
    num_shares = _num_shares(num_queries * num_kv_heads, num_sums, device)
    # Sums of pieces, of each part a maximum and a total; queries folded, their sums and totals.
    a_head = (num_shares + 2) * head_size + 3 * num_shares * 2
    return num_queries * num_heads * (a_head + head_size + NUM_SUMS.value + 1)


def workspace_bytes(
    num_queries: int, num_heads: int, num_kv_heads: int, head_size: int, device: torch.device
) -> int:
    """See `api.workspace_bytes`."""
    shape = (num_heads, num_kv_heads, head_size, device)
    most = max(_workspace_floats(n, *shape) for n in range(num_queries + 1))
    return torch.float32.itemsize * most


def _programs_at_once(num_sums: int, device: torch.device) -> int:
    """As many as the processors of a GPU hold."""
    properties = torch.cuda.get_device_properties(device)
    programs = PROGRAMS_PER_PROCESSOR if num_sums <= MOST_SUMS else WIDE_PROGRAMS_PER_PROCESSOR
    return programs * properties.multi_processor_count


def _layout(geometry: PageGeometry, bits: int, tile_slots: int) -> PageLayout:
    layout = geometry.layout(bits or UNQUANTISED)
    slots = triton.next_power_of_2(layout.capacity)
    pages = 1 if slots >= tile_slots else 2
    words = triton.next_power_of_2(layout.code_bytes // 4)
    return PageLayout(
        geometry.page_bytes, geometry.head_page_bytes, bits, layout.capacity, layout.code_bytes,
        slots, pages, words,
    )  # fmt: skip


def _launch(dtype: torch.dtype, num_sums: int) -> Launch:
    """How programs run that have as many sums to keep."""
    if dtype == torch.float32 or num_sums > MOST_WIDE_SUMS:
        return Launch(ahead=False, num_warps=8, max_registers=None)
    return LAUNCH if num_sums <= MOST_SUMS else WIDE_LAUNCH


def _rotated_together(head_size: int) -> int:
    """Channels of a Hadamard matrix: the largest power of two in the head size."""
    return head_size & -head_size


def _folded(
    query: torch.Tensor, context: "CachedContext", rows: "DecodeRows", scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `fold` makes of queries: operands of their shape, and sums [..., NUM_SUMS]."""
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = context.geometry.num_kv_heads
    operand = torch.float32 if query.dtype == torch.float32 else torch.float16
    folded = torch.empty_like(query, dtype=operand)
    sums = query.new_empty(num_queries, num_heads, NUM_SUMS.value, dtype=torch.float32)
    fold[(num_queries * num_heads,)](
        query,
        context.key_norms,
        rows.slots,
        scale,
        folded,
        sums,
        context.key_norms.stride(0),
        num_kv_heads=num_kv_heads,
        group=num_heads // num_kv_heads,
        block=_rotated_together(head_size),
        head_size=head_size,
        channels_padded=padded(head_size),
    )
    return folded, sums


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
    num_parts = 3 if geometry.low_bits else 2
    num_sums = _num_sums(num_heads, num_kv_heads, head_size)
    num_shares = _num_shares(num_queries * num_kv_heads, num_sums, device)
    floats = {"dtype": torch.float32, "device": device}
    heads = (num_queries, num_heads)
    partial = torch.empty(*heads, num_shares + num_parts - 1, head_size, **floats)
    sums = torch.empty(2, *heads, num_parts, num_shares, **floats)
    log_total = torch.empty(*heads, **floats)
    if num_queries == 0:
        return log_total
    query = query.contiguous()
    sizes = {"head_size": head_size, "channels_padded": padded(head_size)}
    kv_cache = context.kv_cache
    launch = _launch(query.dtype, num_sums)
    _attend[(num_kv_heads, num_shares, num_queries)](
        query,
        *_folded(query, context, rows, scale),
        scale,
        kv_cache,
        *(context.heap.view(dtype) for dtype in (torch.int32, torch.uint16, kv_cache.dtype)),
        *(context.page_table, context.page_counts, context.block_table),
        *rows,
        partial,
        *sums,
        num_shares,
        MIN_TILES,
        *(kv_cache.stride(0), context.block_table.stride(0), context.page_table.shape[1]),
        num_kv_heads=num_kv_heads,
        group=group,
        group_padded=_group_padded(group),
        block_size=kv_cache.shape[2],
        high=_layout(geometry, geometry.high_bits, launch.tile_slots),
        low=_layout(geometry, geometry.low_bits, launch.tile_slots),
        num_parts=num_parts,
        tile_tokens=PLAIN_TOKENS,
        ahead=launch.ahead,
        num_warps=launch.num_warps,
        maxnreg=launch.max_registers,
        **sizes,
    )
    combine[(num_queries * num_heads,)](
        partial,
        *sums,
        out,
        log_total,
        num_shares,
        block=_rotated_together(head_size),
        num_parts=num_parts,
        max_pieces=triton.next_power_of_2(num_parts * MAX_SHARES),
        high_bits=geometry.high_bits,
        low_bits=geometry.low_bits,
        tile_places=TILE_PLACES,
        **sizes,
    )
    return log_total
