"""Attention mass that the probes of chunks put on every token of their contexts."""

from vllm_zipvl.ops.probe_scores.api import ProbePlaces, probe_scores

__all__ = ["ProbePlaces", "probe_scores"]
