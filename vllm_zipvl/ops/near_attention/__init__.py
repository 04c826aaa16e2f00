"""The neighbourhood that every query of a sparse prefill attends to, beside what is kept."""

from vllm_zipvl.ops.near_attention.api import near_attention

__all__ = ["near_attention"]
