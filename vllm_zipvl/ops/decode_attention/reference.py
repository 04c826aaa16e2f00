"""Decode attention in torch, row by row.

    keys, values = pages at high precision ++ pages at low precision ++ dense head and tail
    o = softmax(q K^T * scale) V

Quantised pages hold rotated keys and values: (R q)(R k) = q k as R is orthonormal, and their
share of the output is rotated back once. Their keys are normalised by channel first, which is
undone in the query and in the scores (`core.quantization.KeyNorm`).
"""

from typing import TYPE_CHECKING

import torch

from vllm_zipvl.core.geometry import UNQUANTISED
from vllm_zipvl.core.quantization import KeyNorm, fold_key_norm, rotate
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.ops.dense_blocks import gather_kv
from vllm_zipvl.ops.page_codec import read_pages

if TYPE_CHECKING:
    from vllm_zipvl.ops.decode_attention.api import CachedContext, DecodeRows


def _segments(context: "CachedContext", row: tuple[int, ...]) -> list[tuple[torch.Tensor, bool]]:
    """Keys beside values, float32 [n, num_kv_heads, 2 * head_size], and whether quantised."""
    slot, table_row, head_len, tail_start, context_len = row
    geometry = context.geometry
    segments = []
    for precision, bits in enumerate(geometry.bits):
        num_tokens = int(context.page_counts[slot, precision])
        if num_tokens == 0 or bits == 0:
            continue
        num_pages = geometry.num_pages(num_tokens, bits)
        table = context.page_table[slot]
        page_ids = table[:num_pages] if precision == 0 else table.flip(0)[:num_pages]
        kv = read_pages(context.heap, page_ids, num_tokens, bits, context.kv_cache.dtype, geometry)
        segments.append((kv, bits != UNQUANTISED))
    for start, end in ((0, head_len), (tail_start, context_len)):
        if end > start:
            blocks = context.block_table[table_row, None, start // context.kv_cache.shape[2] :]
            length = Sequences([end - start], blocks.device)
            segments.append((gather_kv(context.kv_cache, blocks, length).float(), False))
    return segments


def decode_attention(
    query: torch.Tensor,
    context: "CachedContext",
    rows: "DecodeRows",
    scale: float,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `api.decode_attention`."""
    num_queries, num_heads, head_size = query.shape
    num_kv_heads = context.geometry.num_kv_heads
    lse = torch.empty(num_queries, num_heads, dtype=torch.float32, device=query.device)
    for i, row in enumerate(zip(*(column.tolist() for column in rows), strict=True)):
        segments = _segments(context, row)
        if not segments:
            out[i], lse[i] = 0, float("-inf")
            continue
        q = query[i].float().view(num_kv_heads, -1, head_size) * scale
        stored_q, offset = fold_key_norm(q, KeyNorm(*context.key_norms[row[0]]))
        scores = [
            stored_q @ kv[..., :head_size].permute(1, 2, 0) + offset[..., None]
            if quantised
            else q @ kv[..., :head_size].permute(1, 2, 0)
            for kv, quantised in segments
        ]
        joined = torch.cat(scores, dim=-1)
        lse[i] = torch.logsumexp(joined, dim=-1).flatten()
        weights = torch.softmax(joined, dim=-1).split([s.shape[-1] for s in scores], dim=-1)
        result = torch.zeros_like(q)
        for (kv, quantised), weight in zip(segments, weights, strict=True):
            part = weight @ kv[..., head_size:].transpose(0, 1)
            result += rotate(part) if quantised else part
        out[i] = result.view(num_heads, head_size).to(out.dtype)
    return lse
