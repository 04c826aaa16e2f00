"""Reads and writes of heap pages.

A page belongs to one layer at one precision. It is cut into one part per KV head, and a part
holds keys [capacity, code_bytes], values [capacity, code_bytes] and, if quantised, float16
parameters [4, capacity] (scale and zero of the keys, scale and zero of the values). Quantised
keys are stored normalised, quantised keys and values rotated and clipped (`core.quantization`),
unquantised ones as they are.
"""

from types import ModuleType

import torch

from vllm_zipvl.core.geometry import UNQUANTISED, PageGeometry
from vllm_zipvl.core.quantization import KeyNorm
from vllm_zipvl.ops.lazy import numba_module, triton_module
from vllm_zipvl.ops.page_codec import reference


def _implementation(kv: torch.Tensor, bits: int) -> ModuleType:
    device = kv.device.type
    in_numba = device == "cpu" and bits != UNQUANTISED
    return (
        triton_module("vllm_zipvl.ops.page_codec.triton", device)
        or (in_numba and numba_module("vllm_zipvl.ops.page_codec.cpu"))
        or reference
    )


def write_pages(
    kv: torch.Tensor,
    heap: torch.Tensor,
    page_ids: torch.Tensor,
    first_slot: int,
    bits: int,
    geometry: PageGeometry,
    norm: KeyNorm | None = None,
) -> None:
    """Encode tokens and append them to pages.

    Args:
        kv: [num_tokens, num_kv_heads, 2 * head_size], keys beside values.
        heap: uint8 [num_pages, page_bytes], written in place.
        page_ids: Pages that the tokens fill, integers; the first may be partly full.
        first_slot: Tokens that the first page holds already.
        bits: Precision, not 0.
        geometry: Page shapes.
        norm: What quantised keys are normalised by, if at all.
    """
    codec = _implementation(kv, bits)
    codec.write_pages(kv, heap, page_ids, first_slot, bits, geometry, norm)


def read_pages(
    heap: torch.Tensor,
    page_ids: torch.Tensor,
    num_tokens: int,
    bits: int,
    dtype: torch.dtype,
    geometry: PageGeometry,
) -> torch.Tensor:
    """Decode the first `num_tokens` tokens of `page_ids`.

    Returns:
        float32 [num_tokens, num_kv_heads, 2 * head_size]; as stored, so rotated if quantised.
    """
    return reference.read_pages(heap, page_ids, num_tokens, bits, dtype, geometry)
