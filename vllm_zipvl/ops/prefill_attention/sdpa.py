"""torch's scaled dot product attention.

On a CPU it makes a mask [num_queries, num_tokens].
"""

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention


def why_not(device: str, dtype: torch.dtype, head_size: int) -> str | None:
    """What keeps this kernel from running, on devices of a type and queries of a dtype and size."""
    if device == "cuda" and dtype == torch.float32:
        return "for float32 on CUDA devices it would make a mask of all queries and tokens"
    return None


def prefill_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """See `api.prefill_attention`."""
    if len(query) == 0:
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    q, k, v = (x[None].transpose(1, 2) for x in (query, key, value))
    mask = causal_lower_right(len(query), len(key))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)
