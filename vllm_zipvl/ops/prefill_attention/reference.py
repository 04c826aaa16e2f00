"""Causal attention in torch, query chunks against all keys they may see.

o_i = sum_j softmax_j(q_i k_j * scale) v_j,  j <= n - m + i
"""

import torch

from vllm_zipvl.core.packed import PackedAttention, kept_queries
from vllm_zipvl.core.sequences import Chunks

CHUNK = 256


def prefill_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chunks: Chunks, scale: float
) -> torch.Tensor:
    """See `api.prefill_attention`."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for own, tokens in zip(chunks.queries.slices(), chunks.contexts.slices(), strict=True):
        out[own] = attend_one(query[own], key[tokens], value[tokens], scale)[0]
    return out


def attend_among_kept(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    chunks: Chunks,
    scale: float,
) -> PackedAttention:
    """Attention of the kept queries among the kept tokens."""
    is_kept = kept_queries(kept, chunks)
    parts = []
    for own, tokens in zip(chunks.queries.slices(), chunks.contexts.slices(), strict=True):
        mask = kept[tokens]
        parts.append(
            attend_one(query[own][is_kept[own]], key[tokens][mask], value[tokens][mask], scale)
        )
    outs, sums = zip(*parts, strict=True)
    return PackedAttention(torch.cat(outs), torch.cat(sums))


def attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One context: the output, and log-sum-exp of the scores, float32 [num_queries, num_heads]."""
    num_queries, num_heads, _ = query.shape
    num_tokens, num_kv_heads, _ = key.shape
    group = num_heads // num_kv_heads
    offset = num_tokens - num_queries
    k = key.float().repeat_interleave(group, dim=1).permute(1, 2, 0)
    v = value.float().repeat_interleave(group, dim=1).transpose(0, 1)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:2], device=query.device)
    for start in range(0, num_queries, CHUNK):
        stop = min(start + CHUNK, num_queries)
        visible = offset + stop
        scores = query[start:stop].float().transpose(0, 1) @ k[..., :visible] * scale
        last = torch.arange(offset + start, visible, device=query.device)
        hidden = torch.arange(visible, device=query.device) > last[:, None]
        attention = torch.softmax(scores.masked_fill_(hidden, float("-inf")), dim=-1)
        lse[start:stop] = torch.logsumexp(scores, dim=-1).t()
        out[start:stop] = (attention @ v[:, :visible]).transpose(0, 1).to(out.dtype)
    return out, lse
