"""Decode attention on the CPU: prepares the launch of the numba kernel and joins its parts."""

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_zipvl.core.geometry import UNQUANTISED, PageGeometry
from vllm_zipvl.ops.decode_attention.cpu_kernels import STEP_TOKENS, attend_rows, finish_rows
from vllm_zipvl.ops.decode_attention.cpu_launch import (
    DENSE,
    KEPT,
    REST,
    Inputs,
    Record,
    Shape,
    Stores,
    Tables,
    TokenClass,
)
from vllm_zipvl.ops.decode_attention.cpu_vectors import (
    BFLOAT16,
    CODES2,
    CODES4,
    CODES8,
    FLOAT16,
    FLOAT32,
    GROUPS,
    LANES,
)
from vllm_zipvl.ops.threads import match_num_threads

if TYPE_CHECKING:
    from vllm_zipvl.ops.decode_attention.api import CachedContext, DecodeRows

_DTYPE_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_BITS_KINDS = {8: CODES8, 4: CODES4, 2: CODES2}
_CHANNEL_STEP = 64
_SPLIT_TOKENS = 1024
"""The longest context is not cut into parts shorter than this."""


def _page_class(geometry: PageGeometry, table: int, dtype: torch.dtype) -> TokenClass:
    bits = geometry.bits[table]
    if bits == 0:
        return TokenClass(-1, 0, table, 1, 1, 0, 0, 0, 0, 0, 0)
    layout = geometry.layout(bits)
    return TokenClass(
        kind=_BITS_KINDS.get(bits, _DTYPE_KINDS[dtype]),
        quantised=int(bits != UNQUANTISED),
        table=table,
        capacity=layout.capacity,
        unit_tokens=layout.capacity,
        unit_bytes=geometry.page_bytes,
        head_bytes=geometry.head_page_bytes,
        stride=layout.code_bytes,
        value_offset=layout.value_offset,
        param_offset=layout.param_offset,
        fetch_bytes=geometry.head_page_bytes // 2,
    )


def _dense_class(kv_cache: torch.Tensor) -> TokenClass:
    _, _, block_size, width = kv_cache.shape
    itemsize = kv_cache.itemsize
    return TokenClass(
        kind=_DTYPE_KINDS[kv_cache.dtype],
        quantised=0,
        table=DENSE,
        capacity=math.gcd(block_size, STEP_TOKENS),
        unit_tokens=block_size,
        unit_bytes=kv_cache.stride(0) * itemsize,
        head_bytes=block_size * width * itemsize,
        stride=width * itemsize,
        value_offset=width // 2 * itemsize,
        param_offset=0,
        fetch_bytes=math.gcd(block_size, STEP_TOKENS) * width * itemsize // 2,
    )


def _flat_bytes(kv_cache: torch.Tensor) -> torch.Tensor:
    """Bytes from the first block's first to the last block's last, other layers' between."""
    num_blocks = kv_cache.shape[0]
    extent = (num_blocks - 1) * kv_cache.stride(0) + kv_cache[0].numel()
    return kv_cache.as_strided((extent,), (1,)).view(torch.uint8)


def _shape(query: torch.Tensor, num_kv_heads: int, capacity: int, longest: int) -> Shape:
    """Sizes for tiles of up to `capacity` tokens and contexts of up to `longest`."""
    num_queries, num_heads, head_size = query.shape
    queries_per_head = num_heads // num_kv_heads
    group = next((g for g in GROUPS if g >= queries_per_head), GROUPS[-1])
    wanted = -(-4 * torch.get_num_threads() // (num_queries * num_kv_heads))
    return Shape(
        num_kv_heads=num_kv_heads,
        group=group,
        num_queries=-(-queries_per_head // group) * group,
        head_size=head_size,
        padded_size=-(-head_size // _CHANNEL_STEP) * _CHANNEL_STEP,
        row=-(-max(capacity, STEP_TOKENS) // LANES) * LANES + LANES,
        num_splits=max(1, min(wanted, longest // _SPLIT_TOKENS)),
        heads_per_item=max(1, num_kv_heads // torch.get_num_threads()),
    )


def _record(shape: Shape) -> Record:
    vectors = 2 * shape.num_queries * shape.padded_size
    widened = shape.row * shape.padded_size if shape.padded_size > shape.head_size else 0
    sizes = [
        vectors, shape.num_queries, 2 * shape.num_queries, vectors, 2 * shape.num_queries,
        shape.num_queries * shape.row, 5 * shape.row, widened,
    ]  # fmt: skip
    starts = [0, *itertools.accumulate(-(-size // LANES) * LANES for size in sizes)]
    return Record(*starts)


def decode_attention(
    query: torch.Tensor,
    context: "CachedContext",
    rows: "DecodeRows",
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `api.decode_attention`."""
    if len(query) == 0:
        return torch.empty(query.shape[:2])
    dtype = context.kv_cache.dtype
    classes = [_page_class(context.geometry, table, dtype) for table in (KEPT, REST)]
    classes.append(_dense_class(context.kv_cache))
    capacity, longest = max(tokens.capacity for tokens in classes), int(rows.context_lens.max())
    shape = _shape(query, context.geometry.num_kv_heads, capacity, longest)
    record = _record(shape)
    inputs = Inputs(
        queries=query.float().numpy(),
        norms=context.key_norms.view(torch.uint16).numpy(),
        scale=np.float32(scale / math.log(2)),
        rotated=any(tokens.quantised for tokens in classes),
    )
    places = torch.stack(tuple(rows), dim=1).int()
    tables = (context.page_table, context.page_counts, context.block_table, places)
    heap = context.heap.flatten()
    stores = (_flat_bytes(context.kv_cache), heap, heap.view(torch.uint16))
    num_records = shape.num_kv_heads * shape.num_splits * query.shape[0]
    work = torch.empty(num_records * record.size)
    result = torch.empty(query.shape)
    lse = torch.empty(query.shape[:2])
    match_num_threads()
    attend_rows(
        inputs,
        Stores(*(store.numpy() for store in stores)),
        *classes,
        Tables(*(table.contiguous().numpy() for table in tables)),
        shape,
        record,
        work.numpy(),
        work.view(torch.uint8).numpy(),
    )
    finish_rows(inputs, shape, record, work.numpy(), result.numpy(), lse.numpy())
    out.copy_(result)
    return lse
