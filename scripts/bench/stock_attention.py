"""vLLM's own CPU attention kernel, called as its backend calls it."""

import torch
import vllm._custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_zipvl.core.geometry import cdiv

BLOCK_SIZE = 32


class StockAttention:
    """Sequences of one length in vLLM's own cache layout, their blocks in random order.

    Attributes:
        query: [num_queries, num_heads, head_size].
        out: As `query`.
    """

    def __init__(self, query: torch.Tensor, num_rows: int, context_len: int, kv_heads: int) -> None:
        self.query, self.out = query, torch.empty_like(query)
        num_heads, head_size = query.shape[1:]
        num_blocks = cdiv(context_len, BLOCK_SIZE)
        self._isa = _get_attn_isa(query.dtype, BLOCK_SIZE, head_size, "auto")
        cache = torch.randn(num_rows * num_blocks, kv_heads, 2 * BLOCK_SIZE, head_size)
        self._key_cache, self._value_cache = cache.to(query.dtype).chunk(2, dim=2)
        self._block_table = torch.randperm(num_rows * num_blocks).int().view(num_rows, -1)
        per_row = query.shape[0] // num_rows
        self._query_start_loc = torch.arange(num_rows + 1, dtype=torch.int32) * per_row
        self._seq_lens = torch.full((num_rows,), context_len, dtype=torch.int32)
        slots = self._block_table[0].long()[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
        self._slots = slots.flatten()[:context_len]
        # vLLM plans once per step for all layers, so this is not timed.
        self._plan = ops.cpu_attn_get_scheduler_metadata(
            num_rows, num_heads, kv_heads, head_size, self._seq_lens, query.dtype,
            self._query_start_loc, True, -1, self._isa, True,
        )  # fmt: skip

    def store(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the first row's keys and values into its blocks."""
        ops.cpu_attn_reshape_and_cache(
            key, value, self._key_cache, self._value_cache, self._slots, self._isa
        )

    def attend(self) -> torch.Tensor:
        ops.cpu_attention_with_kv_cache(
            self.query, self._key_cache, self._value_cache, self.out, self._query_start_loc,
            self._seq_lens, self.query.shape[-1] ** -0.5, True, None, -1, self._block_table,
            0.0, self._plan, None,
        )  # fmt: skip
        return self.out
