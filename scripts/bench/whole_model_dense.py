"""Dense attention of a whole model: the caches that it reads, bfloat16 or fp8.

As in vLLM 0.32, FlashAttention decodes from blocks of 16 tokens, and with an fp8 cache also
queries are fp8 and every scale is 1. vLLM fuses the conversion to fp8 into its other kernels;
here it is a kernel of its own.
"""

import torch
import torch.nn.functional as F
from attention_cases import DTYPE
from dense_attention import PAGE, DenseAttention
from whole_model_decoder import ModelShape

from vllm_zipvl.core.geometry import cdiv
from vllm_zipvl.ops.dense_blocks import store_kv

FP8 = torch.float8_e4m3fn


def why_no_fp8(dense: DenseAttention) -> str | None:
    if dense.flash is None or dense.flash.version != 3:
        return f"vLLM's FlashAttention 3 does not run here; dense attention is {dense.name}"
    return None


def request_bytes(shape: ModelShape, num_tokens: int, dtype: torch.dtype) -> int:
    """KV memory of one request, in whole blocks."""
    layer = shape.layer
    per_token = 2 * shape.num_layers * layer.num_kv_heads * layer.head_size * dtype.itemsize
    return cdiv(num_tokens, PAGE) * PAGE * per_token


class DenseRequests:
    """Requests of one length; the first one's prompt is computed and copied to the others.

    A decode step computes the last of `num_tokens` tokens, again and again.

    Args:
        shape: The model's.
        dense: Attention of one layer.
        num_requests: How many decode at once.
        num_tokens: Of each request.
        dtype: Of keys and values; fp8 only with FlashAttention 3.
    """

    def __init__(
        self,
        shape: ModelShape,
        dense: DenseAttention,
        num_requests: int,
        num_tokens: int,
        dtype: torch.dtype = DTYPE,
    ) -> None:
        self.shape, self.dense, self.dtype = shape, dense, dtype
        self.num_tokens, self.num_requests = num_tokens, num_requests
        self.positions = torch.full((num_requests,), num_tokens - 1)
        cache = FlashCache if dense.flash else TorchCache
        self.cache = cache(shape, dense, num_requests, num_tokens, dtype)

    def prefill(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        query, key, value = (x.to(self.dtype) for x in (query, key, value))
        self.cache.store_prompt(layer, key, value)
        out = self.dense.prefill(query, key, value)()
        return out if self.dense.flash else out[0].transpose(0, 1)

    def fill(self) -> None:
        """Give all requests the first one's prompt."""
        for i in range(1, self.num_requests):
            self.cache.copy_first(i)

    def begin(self) -> None:
        """Nothing changes from step to step."""

    def after(self) -> None:
        """Nothing is due between steps."""

    def rewind(self) -> None:
        """There is nothing to undo."""

    def decode(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        query, key, value = (x.to(self.dtype) for x in (query, key, value))
        return self.cache.decode(layer, query, key, value)


class FlashCache:
    """Blocks [num_blocks, num_kv_heads, PAGE, 2 * head_size] of each layer, in random order."""

    def __init__(
        self,
        shape: ModelShape,
        dense: DenseAttention,
        num_requests: int,
        num_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        layer, per_request = shape.layer, cdiv(num_tokens, PAGE)
        num_blocks = num_requests * per_request
        self.dense, self.dtype, self.num_tokens = dense, dtype, num_tokens
        # Storing copies bytes where Triton may not know the dtype.
        self.stored_dtype = torch.uint8 if dtype == FP8 else dtype
        self.blocks = torch.zeros(
            shape.num_layers, num_blocks, layer.num_kv_heads, PAGE, 2 * layer.head_size,
            dtype=self.stored_dtype,
        )  # fmt: skip
        self.table = torch.randperm(num_blocks).int().view(num_requests, per_request)
        self.starts = torch.arange(num_requests + 1, dtype=torch.int32)
        self.lengths = torch.full((num_requests,), num_tokens, dtype=torch.int32)
        last, offset = divmod(num_tokens - 1, PAGE)
        self.last_slots = self.table[:, last].long() * PAGE + offset
        offsets = torch.arange(PAGE)
        self.prompt_slots = (self.table[0].long()[:, None] * PAGE + offsets).flatten()
        self.descales = {}
        if dtype == FP8:
            ones = torch.ones(1).expand(num_requests, layer.num_kv_heads)
            self.descales = {f"{name}_descale": ones for name in "qkv"}

    def _store(self, layer: int, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor):
        key, value = (x.view(self.stored_dtype) for x in (key, value))
        store_kv(key, value, self.blocks[layer], slots)

    def store_prompt(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._store(layer, key, value, self.prompt_slots[: len(key)])

    def copy_first(self, request: int) -> None:
        for blocks in self.blocks:
            blocks[self.table[request].long()] = blocks[self.table[0].long()]

    def decode(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        self._store(layer, key, value, self.last_slots)
        keys, values = self.blocks[layer].view(self.dtype).transpose(1, 2).chunk(2, dim=-1)
        return self.dense.flash.function(
            q=query, k=keys, v=values, cu_seqlens_q=self.starts, seqused_k=self.lengths,
            max_seqlen_q=1, max_seqlen_k=self.num_tokens, block_table=self.table,
            softmax_scale=self.dense.layer.scale, causal=True, **self.descales,
        )  # fmt: skip


class TorchCache:
    """Keys and values [num_requests, num_kv_heads, num_tokens, head_size] of each layer."""

    def __init__(
        self,
        shape: ModelShape,
        dense: DenseAttention,
        num_requests: int,
        num_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        layer = shape.layer
        self.dense = dense
        self.keys, self.values = torch.zeros(
            2, shape.num_layers, num_requests, layer.num_kv_heads, num_tokens, layer.head_size,
            dtype=dtype,
        )  # fmt: skip

    def store_prompt(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.keys[layer, 0, :, : len(key)] = key.transpose(0, 1)
        self.values[layer, 0, :, : len(key)] = value.transpose(0, 1)

    def copy_first(self, request: int) -> None:
        self.keys[:, request] = self.keys[:, 0]
        self.values[:, request] = self.values[:, 0]

    def decode(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        self.keys[layer, :, :, -1], self.values[layer, :, :, -1] = key, value
        out = F.scaled_dot_product_attention(
            query[:, :, None], self.keys[layer], self.values[layer],
            enable_gqa=True, scale=self.dense.layer.scale,
        )  # fmt: skip
        return out[:, :, 0]
