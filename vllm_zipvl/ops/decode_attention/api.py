"""Decode attention over what a request holds: dense head, pages at two precisions, dense tail."""

from types import ModuleType
from typing import NamedTuple

import torch

from vllm_zipvl.core.geometry import PageGeometry
from vllm_zipvl.ops.decode_attention import reference
from vllm_zipvl.ops.lazy import numba_module, triton_module


class CachedContext(NamedTuple):
    """One layer's cached keys and values, as decode attention reads them.

    Attributes:
        kv_cache: Dense blocks, [num_blocks, num_kv_heads, block_size, 2 * head_size]; the
            last three dimensions are contiguous.
        heap: The same memory as pages, uint8 [num_pages, page_bytes], contiguous.
        page_table: int32 [num_slots, width]. Pages of kept tokens from the left, in order;
            pages of the rest from the right end, in order towards the left.
        page_counts: int32 [num_slots, 2]: tokens in pages, kept and rest; the rest's count
            is ignored where `geometry.low_bits` is 0.
        block_table: int32 [num_rows, max_blocks]: dense blocks of each row.
        geometry: Page shapes.
        key_norms: What quantised keys of each slot were normalised by, mean and scale,
            float16 [num_slots, 2, num_kv_heads, head_size].
    """

    kv_cache: torch.Tensor
    heap: torch.Tensor
    page_table: torch.Tensor
    page_counts: torch.Tensor
    block_table: torch.Tensor
    geometry: PageGeometry
    key_norms: torch.Tensor


class DecodeRows(NamedTuple):
    """The queries of a decode step: one per row, each with its place in the tables.

    Attributes:
        slots: Slot of the row's pages in `page_table`, int32 [num_queries].
        rows: Row of `block_table`, int32 [num_queries].
        head_lens: Tokens from the first on that are in dense blocks, a multiple of the block
            size. int32 [num_queries].
        tail_starts: From which token on all are in dense blocks again, a multiple of the block
            size; those between are in pages or evicted. int32 [num_queries].
        context_lens: Tokens visible to the query, itself included. int32 [num_queries].
    """

    slots: torch.Tensor
    rows: torch.Tensor
    head_lens: torch.Tensor
    tail_starts: torch.Tensor
    context_lens: torch.Tensor


def _implementation(query: torch.Tensor) -> ModuleType:
    device = query.device.type
    return (
        triton_module("vllm_zipvl.ops.decode_attention.triton", device)
        or (device == "cpu" and numba_module("vllm_zipvl.ops.decode_attention.cpu"))
        or reference
    )


def workspace_bytes(
    num_queries: int, num_heads: int, num_kv_heads: int, head_size: int, device: torch.device
) -> int:
    """What a call takes at most of a GPU's memory while it runs, for as many queries or fewer."""
    in_triton = triton_module("vllm_zipvl.ops.decode_attention.triton", device.type)
    if in_triton is None:
        return 0
    return in_triton.workspace_bytes(num_queries, num_heads, num_kv_heads, head_size, device)


def decode_attention(
    query: torch.Tensor, context: CachedContext, rows: DecodeRows, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """Attend with one query per row over head, pages and tail.

    Scores, softmax and sums are float32. A row without any context gives zeros and a log of
    -inf.

    Args:
        query: [num_queries, num_heads, head_size].
        context: What the layer caches.
        rows: Where each query's context lies.
        scale: Softmax scale.
        out: Written in place, [num_queries, num_heads, head_size].

    Returns:
        log of the softmax denominator per query and head, float32 [num_queries, num_heads].

    Raises:
        ValueError: Heads are not a multiple of KV heads.
    """
    num_heads, num_kv_heads = query.shape[1], context.geometry.num_kv_heads
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}")
    return _implementation(query).decode_attention(query, context, rows, scale, out)
