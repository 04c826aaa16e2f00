"""Attention of queries whose softmax denominators are known, on part of their contexts."""

from collections.abc import Sequence

import torch

from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.ops.lazy import triton_module
from vllm_zipvl.ops.tail_scores import reference


def tail_scores(
    queries: torch.Tensor,
    lse: torch.Tensor,
    kv_caches: Sequence[torch.Tensor],
    block_table: torch.Tensor,
    tails: Sequences,
    scale: float,
) -> torch.Tensor:
    """exp(q K^T * scale - lse), summed over heads, for all layers.

    Args:
        queries: One of each request, [num_layers, num_requests, num_heads, head_size].
        lse: Log of their softmax denominators, float32 [num_layers, num_requests, num_heads].
        kv_caches: Per layer, dense blocks [num_blocks, num_kv_heads, block_size, 2 * head_size].
        block_table: Blocks of each tail from its first token on, integers [num_requests, any].
        tails: How many tokens each has.
        scale: Softmax scale.

    Returns:
        float32 [num_layers, tails.num_tokens].
    """
    device = queries.device.type
    in_triton = triton_module("vllm_zipvl.ops.tail_scores.triton", device)
    implementation = in_triton or reference
    return implementation.tail_scores(queries, lse, kv_caches, block_table, tails, scale)
