"""Attention of chunks over their contexts: to all tokens, or to kept ones and near ones.

A kernel's module has `prefill_attention`, to all, and `attend_among_kept`, of kept queries to kept
tokens.
"""

from types import ModuleType

import torch

from vllm_zipvl.core.sequences import Chunks
from vllm_zipvl.ops.lazy import triton_module
from vllm_zipvl.ops.near_attention import near_attention
from vllm_zipvl.ops.prefill_attention import cpu, flash_attn, reference

AUTO = "auto"
_IN_ORDER = ("flash_attn", "triton", "cpu", "reference")
"""What `auto` takes: the first that runs."""
_MODULES = {module.__name__.rpartition(".")[2]: module for module in (flash_attn, cpu, reference)}


def find_kernel(choice: str, device: str, dtype: torch.dtype, head_size: int) -> str:
    """The name of the kernel that a choice comes down to.

    Args:
        choice: "auto", or a kernel's name.
        device: A device type.
        dtype: Of queries, keys and values.
        head_size: Of queries, keys and values.

    Raises:
        ValueError: The kernel does not run here; the message says why.
    """
    if choice != AUTO:
        if reason := _why_not(choice, device, dtype, head_size):
            raise ValueError(f"{choice} does not run here: {reason}; choose {AUTO}")
        return choice
    return next(name for name in _IN_ORDER if not _why_not(name, device, dtype, head_size))


def _why_not(name: str, device: str, dtype: torch.dtype, head_size: int) -> str | None:
    if name == "triton":
        return None if _module(name, device) else f"Triton does not run on {device}"
    if name == "reference":
        return None
    return _MODULES[name].why_not(device, dtype, head_size)


def _module(name: str, device: str) -> ModuleType | None:
    if name == "triton":
        return triton_module("vllm_zipvl.ops.prefill_attention.triton", device)
    return _MODULES[name]


def _kernel(choice: str, query: torch.Tensor) -> ModuleType:
    device = query.device.type
    module = _module(find_kernel(choice, device, query.dtype, query.shape[-1]), device)
    assert module is not None
    return module


def _as_chunks(query: torch.Tensor, key: torch.Tensor, chunks: Chunks | None) -> Chunks:
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"num_heads {query.shape[1]} must be a multiple of num_kv_heads {key.shape[1]}"
        )
    return chunks or Chunks([len(query)], [len(key)], query.device)


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    kernel: str = AUTO,
    chunks: Chunks | None = None,
) -> torch.Tensor:
    """Causal attention in which the queries are the last tokens of their contexts.

    Query i of m sees the first n - m + 1 + i of its context's n keys.

    Args:
        query: [num_queries, num_heads, head_size].
        key: [num_tokens, num_kv_heads, head_size].
        value: As `key`.
        scale: Softmax scale.
        kernel: "auto" or one of those that `find_kernel` knows.
        chunks: Which queries and tokens belong together; without it all do.

    Returns:
        [num_queries, num_heads, head_size] in the dtype of `query`; sums are float32.

    Raises:
        ValueError: A context has more queries than keys, heads are not a multiple of KV heads, or
            the kernel does not run here.
    """
    chunks = _as_chunks(query, key, chunks)
    return _kernel(kernel, query).prefill_attention(query, key, value, chunks, scale)


def sparse_prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kept: torch.Tensor,
    scale: float,
    window: int,
    sinks: int,
    kernel: str = AUTO,
    chunks: Chunks | None = None,
) -> torch.Tensor:
    """Causal attention to the pairs that `core.neighbourhood.visible_pairs` names.

    Kept queries attend among the kept tokens, and every query to its neighbourhood.

    Args:
        query: [num_queries, num_heads, head_size].
        key: [num_tokens, num_kv_heads, head_size].
        value: As `key`.
        kept: Bool mask [num_tokens].
        scale: Softmax scale.
        window: Newest tokens that every query sees, itself among them.
        sinks: First tokens of its context that every query sees.
        kernel: As for `prefill_attention`.
        chunks: As for `prefill_attention`.

    Returns:
        As `prefill_attention`; zeros for a query that sees nothing.

    Raises:
        ValueError: As `prefill_attention`.
    """
    chunks = _as_chunks(query, key, chunks)
    among_kept = _kernel(kernel, query).attend_among_kept(query, key, value, kept, chunks, scale)
    return near_attention(query, key, value, kept, among_kept, chunks, scale, window, sinks)
