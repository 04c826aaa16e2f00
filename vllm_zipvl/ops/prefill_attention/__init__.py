"""Causal attention of chunks' queries over their contexts, all of them or the kept tokens."""

from vllm_zipvl.ops.prefill_attention.api import (
    find_kernel,
    prefill_attention,
    sparse_prefill_attention,
)

__all__ = ["find_kernel", "prefill_attention", "sparse_prefill_attention"]
