"""Causal attention of one chunk's queries over its context, all of it or the kept tokens."""

from vllm_zipvl.ops.prefill_attention.api import (
    find_kernel,
    prefill_attention,
    sparse_prefill_attention,
)

__all__ = ["find_kernel", "prefill_attention", "sparse_prefill_attention"]
