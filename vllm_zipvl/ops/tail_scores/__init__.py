"""Attention that the newest query of each request puts on the tokens of its tail."""

from vllm_zipvl.ops.tail_scores.api import tail_scores

__all__ = ["tail_scores"]
