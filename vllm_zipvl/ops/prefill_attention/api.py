"""Attention of a chunk over its context, dense or gathered."""

from types import ModuleType

import torch

from vllm_zipvl.ops.lazy import triton_module
from vllm_zipvl.ops.prefill_attention import cpu, reference


def _implementation(query: torch.Tensor) -> ModuleType:
    in_triton = triton_module("vllm_zipvl.ops.prefill_attention.triton", query.device.type)
    return in_triton or (cpu if cpu.is_available(query) else reference)


def prefill_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention in which the queries are the last tokens of the keys.

    Query i of m sees the first n - m + 1 + i of the n keys. A gathered subset in its original
    order keeps that property, so sparse and dense prefill share this operation.

    Args:
        query: [num_queries, num_heads, head_size].
        key: [num_tokens, num_kv_heads, head_size], num_tokens at least num_queries.
        value: As `key`.
        scale: Softmax scale.

    Returns:
        [num_queries, num_heads, head_size] in the dtype of `query`; sums are float32.

    Raises:
        ValueError: There are more queries than keys, or heads are not a multiple of KV heads.
    """
    if query.shape[0] > key.shape[0]:
        raise ValueError(f"{query.shape[0]} queries cannot be the last of {key.shape[0]} keys")
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"num_heads {query.shape[1]} must be a multiple of num_kv_heads {key.shape[1]}"
        )
    return _implementation(query).prefill_attention(query, key, value, scale)
