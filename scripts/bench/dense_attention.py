"""The best dense attention at hand on a GPU: vLLM's FlashAttention 3 or 2, else torch's own."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from attention_cases import Layer, randn

from vllm_zipvl.core.geometry import cdiv
from vllm_zipvl.ops.prefill_attention.flash_attn import find_varlen

PAGE = 16
"""Tokens of a block of the paged cache that FlashAttention decodes from."""


class DenseAttention:
    """Dense prefill and decode of one layer, bfloat16.

    Attributes:
        name: Which implementation it is.
    """

    def __init__(self, layer: Layer) -> None:
        found = find_varlen()
        # The flash-attn package's function does not take a paged cache.
        self.layer, self.flash = layer, found if found and found.version else None
        self.name = f"FA{self.flash.version}" if self.flash else "torch SDPA"

    def _flash(self, **arguments: Any) -> torch.Tensor:
        assert self.flash is not None
        return self.flash.function(softmax_scale=self.layer.scale, causal=True, **arguments)

    def prefill(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> Callable[[], torch.Tensor]:
        """Causal attention of a whole prompt [num_tokens, heads, head_size]."""
        num_tokens = len(query)
        if self.flash is None:
            q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
            options = {"is_causal": True, "enable_gqa": True, "scale": self.layer.scale}
            return lambda: F.scaled_dot_product_attention(q, k, v, **options)
        starts = torch.tensor([0, num_tokens], dtype=torch.int32)
        return lambda: self._flash(
            q=query, k=key, v=value, cu_seqlens_q=starts, cu_seqlens_k=starts,
            max_seqlen_q=num_tokens, max_seqlen_k=num_tokens,
        )  # fmt: skip

    def decode(self, query: torch.Tensor, num_tokens: int) -> Callable[[], torch.Tensor]:
        """One query per row over random keys and values, `num_tokens` each."""
        layer, num_rows = self.layer, len(query)
        if self.flash is None:
            q = query[:, :, None]
            k, v = randn(2, num_rows, layer.num_kv_heads, num_tokens, layer.head_size)
            options = {"enable_gqa": True, "scale": layer.scale}
            return lambda: F.scaled_dot_product_attention(q, k, v, **options)
        per_row = cdiv(num_tokens, PAGE)
        cache = randn(2, num_rows * per_row, PAGE, layer.num_kv_heads, layer.head_size)
        blocks = torch.randperm(num_rows * per_row).int().view(num_rows, per_row)
        starts = torch.arange(num_rows + 1, dtype=torch.int32)
        lengths = torch.full((num_rows,), num_tokens, dtype=torch.int32)
        return lambda: self._flash(
            q=query, k=cache[0], v=cache[1], cu_seqlens_q=starts, seqused_k=lengths,
            max_seqlen_q=1, max_seqlen_k=num_tokens, block_table=blocks,
        )  # fmt: skip
