"""Attention of a chunk over its context, dense or gathered."""

from types import ModuleType

import torch

from vllm_zipvl.ops.lazy import triton_module
from vllm_zipvl.ops.prefill_attention import cpu, reference


def _triton(query: torch.Tensor) -> ModuleType | None:
    return triton_module("vllm_zipvl.ops.prefill_attention.triton", query.device.type)


def _implementation(query: torch.Tensor) -> ModuleType:
    return _triton(query) or (cpu if cpu.is_available(query) else reference)


def _check(query: torch.Tensor, key: torch.Tensor) -> None:
    if query.shape[0] > key.shape[0]:
        raise ValueError(f"{query.shape[0]} queries cannot be the last of {key.shape[0]} keys")
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"num_heads {query.shape[1]} must be a multiple of num_kv_heads {key.shape[1]}"
        )


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
    _check(query, key)
    return _implementation(query).prefill_attention(query, key, value, scale)


def sparse_prefill_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention among the kept tokens; the other queries give zeros.

    Args:
        query: [num_queries, num_heads, head_size], the last tokens of the keys.
        key: [num_tokens, num_kv_heads, head_size].
        value: As `key`.
        kept: Bool mask [num_tokens].
        scale: Softmax scale.

    Returns:
        As `prefill_attention`.

    Raises:
        ValueError: As `prefill_attention`.
    """
    _check(query, key)
    in_triton = _triton(query)
    if in_triton is not None:
        return in_triton.sparse_prefill_attention(query, key, value, kept, scale)
    if bool(kept.all()):
        return prefill_attention(query, key, value, scale)
    tokens = kept.nonzero().flatten()
    queries = kept[len(key) - len(query) :].nonzero().flatten()
    out = torch.zeros_like(query)
    out[queries] = prefill_attention(query[queries], key[tokens], value[tokens], scale)
    return out
