"""Decode attention over vLLM's own quantised KV caches: fp8, int4_per_token_head and TurboQuant.

Its kernels run as its backends run them, with the default block size, scales and splits. A query
is quantised beforehand where vLLM fuses that into what comes before attention. On the CPU they run
interpreted, with `tests/interpreted_triton` on `PYTHONPATH`.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from attention_cases import DTYPE, Layer, randn

from vllm_zipvl.core.geometry import cdiv
from vllm_zipvl.ops.prefill_attention.flash_attn import find_varlen

FP8 = torch.float8_e4m3fn
FP8_CAPABILITY = (8, 9)
SCALE_BYTES = torch.float32.itemsize


class PagedRows:
    """Rows of one length over random keys and values, in blocks in random order.

    A call is one decode step; it returns [num_rows, num_heads, head_size].

    Attributes:
        cache: uint8 [num_blocks, block_size, num_kv_heads, bytes of a key and a value], which is
            vLLM's layout LBNHC.
        query: [num_rows, num_heads, head_size], as the kernel takes it.
        kernel: Whose kernel it is.
        tolerance: Of the output's RMS error, relative to the output's RMS. bfloat16's epsilon: a
            rotated query, the output and its rotation back are rounded in turn, each by at most
            half of that and independently, which leaves room.
    """

    kernel = "Triton"
    tolerance = torch.finfo(DTYPE).eps

    def __init__(self, layer: Layer, num_rows: int, num_tokens: int, token_head_bytes: int) -> None:
        per_row = cdiv(num_tokens, layer.block_size)
        num_blocks = num_rows * per_row
        self.layer, self.num_tokens = layer, num_tokens
        self.cache = torch.zeros(
            num_blocks, layer.block_size, layer.num_kv_heads, token_head_bytes, dtype=torch.uint8
        )
        self.block_table = torch.randperm(num_blocks).int().view(num_rows, per_row)
        self.seq_lens = torch.full((num_rows,), num_tokens, dtype=torch.int32)
        self.query_start_loc = torch.arange(num_rows + 1, dtype=torch.int32)
        self.query = randn(num_rows, layer.num_heads, layer.head_size)
        self.out = torch.empty_like(self.query)

    @property
    def read_bytes(self) -> int:
        *_, num_kv_heads, token_head_bytes = self.cache.shape
        return len(self.query) * self.num_tokens * num_kv_heads * token_head_bytes

    def fill(self) -> None:
        layer = self.layer
        for blocks in self.block_table.long():
            slots = blocks[:, None] * layer.block_size + torch.arange(layer.block_size)
            key, value = randn(2, self.num_tokens, layer.num_kv_heads, layer.head_size)
            self.store(key, value, slots.flatten()[: self.num_tokens])

    def tokens(self) -> torch.Tensor:
        """The cache's bytes in the order of tokens [num_rows, num_tokens, num_kv_heads, bytes]."""
        return self.cache[self.block_table.long()].flatten(1, 2)[:, : self.num_tokens]

    def store(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        raise NotImplementedError

    def contents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantised keys and values, float32 [num_rows, num_tokens, num_kv_heads, head_size]."""
        raise NotImplementedError

    def __call__(self) -> torch.Tensor:
        raise NotImplementedError


class TritonRows(PagedRows):
    """vLLM's Triton attention backend, at a `--kv-cache-dtype` that it takes."""

    def __init__(
        self, layer: Layer, num_rows: int, num_tokens: int, cache_dtype: str, token_head_bytes: int
    ) -> None:
        from vllm.v1.attention.backends import triton_attn

        super().__init__(layer, num_rows, num_tokens, token_head_bytes)
        self.impl = triton_attn.TritonAttentionImpl(
            layer.num_heads, layer.head_size, layer.scale, layer.num_kv_heads, None, None,
            cache_dtype,
        )  # fmt: skip
        one = torch.ones(())
        self.scales = SimpleNamespace(_q_scale=one, _k_scale=one, _v_scale=one)
        # More rows than this fill the GPU without splitting contexts.
        most_split = triton_attn.MIN_LAUNCH_GRID_SIZE_2D // layer.num_kv_heads
        segments = triton_attn.NUM_PAR_SOFTMAX_SEGMENTS
        shape = (most_split, layer.num_heads, segments)
        self.metadata = triton_attn.TritonAttentionMetadata(
            num_actual_tokens=num_rows,
            max_query_len=1,
            query_start_loc=self.query_start_loc,
            max_seq_len=num_tokens,
            seq_lens=self.seq_lens,
            block_table=self.block_table,
            slot_mapping=torch.empty(0, dtype=torch.int64),
            seq_threshold_3D=most_split,
            num_par_softmax_segments=segments,
            softmax_segm_output=torch.empty(*shape, triton_attn.next_power_of_2(layer.head_size)),
            softmax_segm_max=torch.empty(shape),
            softmax_segm_expsum=torch.empty(shape),
            causal=True,
        )

    def __call__(self) -> torch.Tensor:
        cache = self.cache.transpose(1, 2)
        return self.impl.forward(
            self.scales, self.query, None, None, cache, self.metadata, self.out
        )  # fmt: skip


class Int4Rows(TritonRows):
    """`int4_per_token_head`: a key's nibbles and its scale, then a value's; both rotated."""

    def __init__(self, layer: Layer, num_rows: int, num_tokens: int) -> None:
        token_head_bytes = layer.head_size + 2 * SCALE_BYTES
        super().__init__(layer, num_rows, num_tokens, "int4_per_token_head", token_head_bytes)
        self.fill()

    def store(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        self.impl.do_kv_cache_update(self.scales, key, value, self.cache.transpose(1, 2), slots)

    def contents(self) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self.tokens().chunk(2, dim=-1)
        return self._dequantised(key), self._dequantised(value)

    def _dequantised(self, data: torch.Tensor) -> torch.Tensor:
        from vllm.v1.attention.backends.turboquant_attn import _build_hadamard
        from vllm.v1.attention.ops.int4_per_token_head import _get_rht_signs

        # The zero point lies in the four lowest bits of the scale.
        bits = data[..., -SCALE_BYTES:].contiguous().view(torch.int32)
        rotated = unpacked(data[..., :-SCALE_BYTES], 4) - (bits & 15)
        rotated = rotated * (bits & -16).view(torch.float32)
        size = self.layer.head_size
        turned = rotated @ _build_hadamard(size, str(data.device)) * size**-0.5
        return turned * _get_rht_signs(size, 0, data.device)


class Fp8Values(PagedRows):
    """Keys and values in float8_e4m3fn at scale 1, and queries too; so are attention's weights.

    Next to the rounding of the weights, by at most half of its epsilon, no other one counts.
    """

    tolerance = torch.finfo(FP8).eps / 2

    def fill(self) -> None:
        super().fill()
        self.query = self.query.to(FP8)

    def store(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        self.cache.flatten(0, 1)[slots] = torch.cat([key, value], dim=-1).to(FP8).view(torch.uint8)

    def contents(self) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self.tokens().view(FP8).float().chunk(2, dim=-1)
        return key, value


class TritonFp8Rows(Fp8Values, TritonRows):
    """`fp8` where FlashAttention does not take it."""

    # The interpreter loses half of the carries when a weight is rounded up to a power of two.
    tolerance = torch.finfo(FP8).eps / (1 if triton.knobs.runtime.interpret else 2)

    def __init__(self, layer: Layer, num_rows: int, num_tokens: int) -> None:
        super().__init__(layer, num_rows, num_tokens, "fp8", 2 * layer.head_size)
        self.fill()


class FlashFp8Rows(Fp8Values):
    """`fp8` on Hopper: FlashAttention 3, which chooses its splits by itself."""

    def __init__(self, layer: Layer, num_rows: int, num_tokens: int) -> None:
        found = find_varlen()
        assert found is not None
        super().__init__(layer, num_rows, num_tokens, 2 * layer.head_size)
        self.fill()
        self.kernel = f"FA{found.version}"
        key, value = self.cache.view(FP8).split(layer.head_size, dim=-1)
        descale = torch.ones(()).expand(num_rows, layer.num_kv_heads)
        self.attend = partial(
            found.function, q=self.query, k=key, v=value, out=self.out,
            cu_seqlens_q=self.query_start_loc, max_seqlen_q=1, seqused_k=self.seq_lens,
            max_seqlen_k=num_tokens, softmax_scale=layer.scale, causal=True,
            block_table=self.block_table, q_descale=descale, k_descale=descale,
            v_descale=descale,
        )  # fmt: skip

    def __call__(self) -> torch.Tensor:
        return self.attend()


class TurboQuantRows(PagedRows):
    """A preset of TurboQuant: a rotated key's centroids and norm, or an fp8 key; then a value."""

    def __init__(self, layer: Layer, num_rows: int, num_tokens: int, preset: str) -> None:
        from vllm.config.attention import AttentionConfig
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
        from vllm.v1.attention.backends.turboquant_attn import _build_hadamard

        config = TurboQuantConfig.from_cache_dtype(preset, layer.head_size)
        super().__init__(layer, num_rows, num_tokens, config.slot_size_aligned)
        self.config = config
        self.rotation = _build_hadamard(layer.head_size, str(self.cache.device))
        self.centroids = get_centroids(layer.head_size, config.centroid_bits).to(self.cache.device)
        splits = AttentionConfig().tq_max_kv_splits_for_cuda_graph
        shape = (num_rows, layer.num_heads)
        self.buffers = {
            "mid_o_buf": torch.empty(*shape, splits, layer.head_size + 1),
            "output_buf": self.out,
            "lse_buf": torch.empty(shape),
            "max_num_kv_splits": splits,
        }
        self.fill()

    def store(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

        config, ordered = self.config, self.centroids.sort().values
        triton_turboquant_store(
            key, value, self.cache, slots, self.rotation, (ordered[:-1] + ordered[1:]) / 2,
            mse_bits=config.key_mse_bits, key_packed_size=config.key_packed_size,
            value_quant_bits=config.effective_value_quant_bits, key_fp8=config.key_fp8,
        )  # fmt: skip

    def contents(self) -> tuple[torch.Tensor, torch.Tensor]:
        config, tokens = self.config, self.tokens()
        key = tokens[..., : config.key_packed_size].contiguous()
        value = tokens[..., config.key_packed_size : config.slot_size].contiguous()
        steps = value[..., -4:].contiguous().view(torch.float16).float()
        levels = unpacked(value[..., :-4], config.effective_value_quant_bits)
        values = levels * steps[..., :1] + steps[..., 1:]
        if config.key_fp8:
            return key.view(FP8).float(), values
        directions = self.centroids[unpacked(key[..., :-2], config.key_mse_bits)]
        if config.norm_correction:
            directions = directions / directions.norm(dim=-1, keepdim=True)
        norms = key[..., -2:].contiguous().view(torch.float16).float()
        return directions * norms @ self.rotation, values

    def __call__(self) -> torch.Tensor:
        from vllm.v1.attention.ops.triton_turboquant_decode import (
            triton_turboquant_decode_attention,
        )

        config = self.config
        return triton_turboquant_decode_attention(
            query=self.query, kv_cache=self.cache, block_table=self.block_table,
            seq_lens=self.seq_lens, Pi=self.rotation, centroids=self.centroids,
            scale=self.layer.scale, mse_bits=config.key_mse_bits,
            key_packed_size=config.key_packed_size,
            value_quant_bits=config.effective_value_quant_bits, key_fp8=config.key_fp8,
            norm_correction=config.norm_correction, PiT=self.rotation, **self.buffers,
        )  # fmt: skip


def unpacked(data: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers of a few bits each; the first lies in the lowest bits of the first byte."""
    spread = data[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    digits = spread.flatten(-2).unflatten(-1, (-1, bits)).long()
    return (digits << torch.arange(bits)).sum(-1)


def fp8_rows(layer: Layer, num_rows: int, num_tokens: int) -> PagedRows:
    """What vLLM takes for `fp8`: FlashAttention, or Triton where that does not take it."""
    from vllm.v1.attention.backends import fa_utils

    if fa_utils.flash_attn_supports_kv_cache_dtype("fp8", head_size=layer.head_size):
        return FlashFp8Rows(layer, num_rows, num_tokens)
    return TritonFp8Rows(layer, num_rows, num_tokens)


def why_not(takes_fp8: bool) -> str | None:
    """What keeps vLLM's kernels from running here, those that read float8_e4m3fn or the others."""
    try:
        from vllm.triton_utils import HAS_TRITON
    except ImportError as error:
        return f"vLLM is not importable: {error}"
    if not HAS_TRITON:
        return "vLLM finds no Triton driver; on a CPU, put tests/interpreted_triton on PYTHONPATH"
    if takes_fp8 and torch.cuda.is_available():
        found = torch.cuda.get_device_capability()
        if found < FP8_CAPABILITY:
            return f"float8_e4m3fn needs compute capability {FP8_CAPABILITY}, not {found}"
    return None


def wrong(rows: PagedRows) -> str | None:
    """How far a decode step is from float32 attention over the dequantised cache, if too far."""
    keys, values = rows.contents()
    query = rows.query.float().unflatten(1, (rows.layer.num_kv_heads, -1))
    scores = torch.einsum("rkgd,rtkd->rkgt", query, keys) * rows.layer.scale
    expected = torch.einsum("rkgt,rtkd->rkgd", scores.softmax(-1), values).flatten(1, 2)
    rows.out.fill_(float("nan"))
    error = float((rows().float() - expected).norm() / expected.norm())
    if error <= rows.tolerance:
        return None
    return f"wrong by {error:.3g} of its output's RMS, more than {rows.tolerance:.3g}"


class DecodeBaseline(NamedTuple):
    """A `--kv-cache-dtype` of vLLM; `rows` takes the layer, and the numbers of rows and tokens."""

    name: str
    takes_fp8: bool
    rows: Callable[[Layer, int, int], PagedRows]

    def why_not(self) -> str | None:
        return why_not(self.takes_fp8)


def turboquant(preset: str) -> DecodeBaseline:
    return DecodeBaseline(preset, preset.endswith("k8v4"), partial(TurboQuantRows, preset=preset))


BASELINES = (
    DecodeBaseline("fp8", True, fp8_rows),
    DecodeBaseline("int4_per_token_head", False, Int4Rows),
    turboquant("turboquant_k8v4"),
    turboquant("turboquant_4bit_nc"),
    turboquant("turboquant_3bit_nc"),
)
