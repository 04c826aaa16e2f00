"""`attn_implementation="zipvl"` in transformers' attention interface."""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vllm_zipvl.hf.cache import layer_of

NAME = "zipvl"


def register() -> None:
    """Make the name known to transformers."""
    AttentionInterface.register(NAME, zipvl_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def zipvl_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend, select and compress, each row of the batch by itself.

    Args:
        module: The attention layer; one that is not causal, as in a vision tower, attends as SDPA.
        query: [batch, num_heads, num_queries, head_size].
        key: What `ZipVLCache.update` returned, [batch, num_kv_heads, num_tokens, head_size].
        value: As `key`.
        attention_mask: Bool [batch, 1, num_queries, num_tokens]; None where nothing is padded.
        scaling: Softmax scale; None is head_size^-0.5.
        **kwargs: Passed on to SDPA.

    Returns:
        The output [batch, num_queries, num_heads, head_size], zeros for padding and for queries
        that see nothing; no attention weights.

    Raises:
        ValueError: The model runs without a `ZipVLCache`, or padding is not on the left.
    """
    if not module.is_causal:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    layer = layer_of(key)
    if layer is None:
        raise ValueError(
            f"attn_implementation={NAME!r} needs a cache of its own: "
            "pass past_key_values=ZipVLCache(ZipVLConfig(...)) to generate() or forward()"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    num_queries, num_tokens = query.shape[2], key.shape[2]
    out = torch.zeros_like(query)
    for row in range(query.shape[0]):
        first = 0 if attention_mask is None else _num_padding(attention_mask[row, 0, -1])
        first_query = max(0, first - (num_tokens - num_queries))
        # Views: what is compressed below stays in the cache.
        queries = query[row, :, first_query:]
        out[row, :, first_query:] = layer.attend(
            row, queries, key[row, :, first:], value[row, :, first:], scale
        )
    return out.transpose(1, 2).contiguous(), None


def _num_padding(is_real: torch.Tensor) -> int:
    """Padding tokens of a row, whose last query sees all others; they must come first."""
    first = int(is_real.int().argmax())
    if not bool(is_real[first:].all()):
        raise ValueError("zipvl needs padding on the left: set processor.tokenizer.padding_side")
    return first
