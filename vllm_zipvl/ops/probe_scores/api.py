"""Column sums of the probes' attention."""

from typing import NamedTuple

import torch

from vllm_zipvl.ops.lazy import triton_module
from vllm_zipvl.ops.probe_scores import reference


class ProbeMass(NamedTuple):
    """Attention mass per token, summed over probes and heads, float32 [num_tokens] each."""

    random: torch.Tensor
    recent: torch.Tensor


def probe_scores(
    queries: torch.Tensor,
    positions: torch.Tensor,
    num_random: int,
    keys: torch.Tensor,
    scale: float,
) -> ProbeMass:
    """Sum softmax(Q_probe K^T * scale) over probes and heads, for every visible key.

    Products of the inputs accumulate in float32; scores, softmax and sums are float32.

    Args:
        queries: Probe queries, random ones first, [num_probes, num_heads, head_size].
        positions: Position of each probe, int64 [num_probes]; it sees keys 0 to itself.
        num_random: How many of the probes are random ones.
        keys: All keys of the context, [num_tokens, num_kv_heads, head_size].
        scale: Softmax scale.

    Raises:
        ValueError: Heads are not a multiple of KV heads.
    """
    if queries.shape[1] % keys.shape[1]:
        raise ValueError(
            f"num_heads {queries.shape[1]} must be a multiple of num_kv_heads {keys.shape[1]}"
        )
    in_triton = triton_module("vllm_zipvl.ops.probe_scores.triton", keys.device.type)
    implementation = in_triton or reference
    return ProbeMass(*implementation.probe_scores(queries, positions, num_random, keys, scale))
