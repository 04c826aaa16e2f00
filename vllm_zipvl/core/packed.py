"""Attention of a prompt's kept queries, packed."""

from typing import NamedTuple

import torch

from vllm_zipvl.core.sequences import Chunks


class PackedAttention(NamedTuple):
    """What the kept queries of chunks give among the kept tokens.

    Attributes:
        out: Row r is the r-th kept query's, [num_rows, num_heads, head_size]; rows after the last
            one hold anything.
        lse: Log-sum-exp of their scores, float32 [num_rows, num_heads].
    """

    out: torch.Tensor
    lse: torch.Tensor


def kept_queries(kept: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    """Which queries of chunks are kept, bool [num_queries], of a mask [num_tokens]."""
    return kept if chunks.are_whole else kept[chunks.places]
