"""Reads and writes of heap pages.

A page belongs to one layer at one precision. It is cut into one part per KV head, and a part
holds keys [capacity, code_bytes], values [capacity, code_bytes] and, if quantised, parameters
[4, capacity] of two bytes: the scale of the key beside that of the value, a byte each, and as
float16 the two zeros of the key and the zero of the value. Quantised keys are stored normalised,
quantised keys and values rotated and clipped (`core.quantization`, `core.codes`), unquantised ones
as they are.
"""

from collections.abc import Sequence
from types import ModuleType

import torch

from vllm_zipvl.core.geometry import UNQUANTISED, PageGeometry
from vllm_zipvl.core.quantization import KeyNorm, key_norm
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.ops.dense_blocks import gather_kv
from vllm_zipvl.ops.lazy import numba_module, triton_module
from vllm_zipvl.ops.page_codec import reference
from vllm_zipvl.ops.page_codec.tables import PageTables


def write_tokens(
    kv_caches: Sequence[torch.Tensor],
    block_table: torch.Tensor,
    contexts: Sequences,
    kept: torch.Tensor,
    tables: PageTables,
    is_first: Sequence[bool],
) -> None:
    """Encode tokens of several requests from dense blocks into pages, all layers.

    Args:
        kv_caches: Per layer, dense blocks [num_blocks, num_kv_heads, block_size, 2 * head_size].
        block_table: Blocks that hold each request's tokens, from the first on, integers
            [num_requests, any].
        contexts: How many tokens each has.
        kept: Which tokens go to high precision, the rest to low, bool [num_layers, num_tokens].
        tables: Where they go; `heap` is written in place.
        is_first: Of each request, whether these are its first tokens, whose key statistics are
            taken into `tables.key_norms` then.
    """
    in_triton = triton_module("vllm_zipvl.ops.page_codec.triton", kept.device.type)
    if in_triton is not None:
        in_triton.write_tokens(kv_caches, block_table, contexts, kept, tables, is_first)
        return
    for layer, (mask, kv_cache) in enumerate(zip(kept, kv_caches, strict=True)):
        for row, tokens in enumerate(contexts.slices()):
            own, blocks = mask[tokens], block_table[row, None]
            kv = gather_kv(kv_cache, blocks, Sequences([len(own)], own.device))
            if is_first[row]:
                norm = key_norm(kv.chunk(2, dim=-1)[0])
                tables.key_norms[layer, int(tables.slots[row])] = torch.stack(norm)
            for precision, part in enumerate((own, ~own)):
                _write_class(kv[part], tables, layer, row, precision)


def _write_class(
    kv: torch.Tensor, tables: PageTables, layer: int, row: int, precision: int
) -> None:
    """One layer's tokens of one request and precision."""
    geometry, slot = tables.geometry, int(tables.slots[row])
    bits = geometry.bits[precision]
    if bits == 0 or len(kv) == 0:
        return
    pages = tables.page_table[layer, slot]
    before, width = int(tables.before[layer, row, precision]), len(pages)
    capacity = geometry.layout(bits).capacity
    first, end = before // capacity, geometry.num_pages(before + len(kv), bits)
    ids = pages[first:end] if precision == 0 else pages[width - end : width - first].flip(0)
    norm = KeyNorm(*tables.key_norms[layer, slot])
    write_pages(kv, tables.heap, ids, before - first * capacity, bits, geometry, norm)


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
