"""Column sums of the probes' attention."""

from typing import NamedTuple

import torch

from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.ops.lazy import triton_module
from vllm_zipvl.ops.probe_scores import reference


class ProbePlaces(NamedTuple):
    """Where the probes of several contexts are, laid end to end.

    Attributes:
        positions: In their own contexts, int64 [num_probes]; each sees keys 0 to itself.
        is_random: Which of them are random ones, bool [num_probes].
        contexts: How many of them each context has.
    """

    positions: torch.Tensor
    is_random: torch.Tensor
    contexts: Sequences


def probe_scores(
    queries: torch.Tensor,
    probes: ProbePlaces,
    keys: torch.Tensor,
    contexts: Sequences,
    scale: float,
    window: int,
    sinks: int,
) -> torch.Tensor:
    """Sum softmax(Q_probe K^T * scale) over probes and heads, for every visible key.

    What a probe puts on its own neighbourhood (`core.neighbourhood`) is near mass, the rest far.

    Products of the inputs accumulate in float32; scores, softmax and sums are float32.

    Args:
        queries: Probe queries, [num_probes, num_heads, head_size].
        probes: Where they are.
        keys: All keys of all contexts, [num_tokens, num_kv_heads, head_size].
        contexts: How many keys each context has.
        scale: Softmax scale.
        window: Newest keys that a probe has near, itself among them.
        sinks: First keys that all probes have near.

    Returns:
        Far and near mass of random and of recent probes, float32 [2 (random, recent),
        2 (far, near), num_tokens].

    Raises:
        ValueError: Heads are not a multiple of KV heads.
    """
    if queries.shape[1] % keys.shape[1]:
        raise ValueError(
            f"num_heads {queries.shape[1]} must be a multiple of num_kv_heads {keys.shape[1]}"
        )
    in_triton = triton_module("vllm_zipvl.ops.probe_scores.triton", keys.device.type)
    implementation = in_triton or reference
    return implementation.probe_scores(queries, probes, keys, contexts, scale, window, sinks)
