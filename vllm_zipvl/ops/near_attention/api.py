"""Attention to the nearest and the first tokens, merged with that among kept tokens."""

import torch

from vllm_zipvl.core.packed import PackedAttention
from vllm_zipvl.core.sequences import Chunks
from vllm_zipvl.ops.lazy import triton_module
from vllm_zipvl.ops.near_attention import reference, torch_tiles


def near_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    among_kept: PackedAttention,
    chunks: Chunks,
    scale: float,
    window: int,
    sinks: int,
) -> torch.Tensor:
    """Complete sparse prefill: let every query attend to its neighbourhood too.

    Query i gets the keys j <= i of its context with j > i - `window` or j < `sinks`, less the pairs
    that are both kept: those are in `among_kept` already. The parts are merged by their
    log-sum-exp. A query that sees nothing gives zeros.

    Args:
        query: [num_queries, num_heads, head_size].
        key: [num_tokens, num_kv_heads, head_size].
        value: As `key`.
        kept: Bool mask [num_tokens].
        among_kept: Attention of the kept queries among the kept tokens.
        chunks: Which queries and tokens belong together.
        scale: Softmax scale.
        window: Newest tokens that every query sees, itself among them.
        sinks: First tokens that every query sees.

    Returns:
        [num_queries, num_heads, head_size] in the dtype of `query`; sums are float32.
    """
    device = key.device.type
    in_triton = triton_module("vllm_zipvl.ops.near_attention.triton", device)
    implementation = in_triton or (torch_tiles if device == "cpu" else reference)
    return implementation.near_attention(
        query, key, value, kept, among_kept, chunks, scale, window, sinks
    )
