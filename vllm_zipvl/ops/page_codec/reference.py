"""The page codec in torch."""

from typing import NamedTuple

import torch

from vllm_zipvl.core.geometry import NUM_PARAMS, PARAM_BYTES, UNQUANTISED, PageGeometry
from vllm_zipvl.core.quantization import (
    KeyNorm,
    Quantised,
    clip,
    dequantise,
    normalise_keys,
    pack,
    quantise,
    rotate,
    unpack,
)


class PageParts(NamedTuple):
    """Parts of pages as bytes.

    Attributes:
        keys: [num_pages, num_kv_heads, capacity, code_bytes].
        values: As `keys`.
        params: [num_pages, num_kv_heads, 4, capacity, 2]; None if not quantised.
    """

    keys: torch.Tensor
    values: torch.Tensor
    params: torch.Tensor | None


def _split(pages: torch.Tensor, bits: int, geometry: PageGeometry) -> PageParts:
    """View pages uint8 [num_pages, page_bytes] as their parts."""
    layout = geometry.layout(bits)
    heads = pages.unflatten(1, (geometry.num_kv_heads, geometry.head_page_bytes))
    shape = (layout.capacity, layout.code_bytes)
    keys = heads[..., : layout.value_offset].unflatten(-1, shape)
    values = heads[..., layout.value_offset : layout.param_offset].unflatten(-1, shape)
    if bits == UNQUANTISED:
        return PageParts(keys, values, None)
    param_bytes = NUM_PARAMS * layout.capacity * PARAM_BYTES
    params = heads[..., layout.param_offset : layout.param_offset + param_bytes]
    return PageParts(keys, values, params.unflatten(-1, (NUM_PARAMS, layout.capacity, PARAM_BYTES)))


def _encode(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bytes [..., code_bytes] of vectors [..., head_size], and their parameters [..., 2]."""
    if bits == UNQUANTISED:
        return x.contiguous().view(torch.uint8), None
    codes, scale, zero = quantise(clip(rotate(x), bits), bits)
    return pack(codes, bits), torch.stack([scale, zero], dim=-1)


def write_pages(
    kv: torch.Tensor,
    heap: torch.Tensor,
    page_ids: torch.Tensor,
    first_slot: int,
    bits: int,
    geometry: PageGeometry,
    norm: KeyNorm | None,
) -> None:
    """See `api.write_pages`."""
    capacity = geometry.layout(bits).capacity
    num_tokens = kv.shape[0]
    page_ids = page_ids.long()
    pages = heap[page_ids]
    parts = _split(pages, bits, geometry)
    slots = torch.arange(first_slot, first_slot + num_tokens, device=kv.device)
    page, slot = slots // capacity, slots % capacity
    if bits != UNQUANTISED and norm is not None:
        kv = normalise_keys(kv, norm)
    key, value = kv.chunk(2, dim=-1)
    key_bytes, key_params = _encode(key, bits)
    value_bytes, value_params = _encode(value, bits)
    parts.keys[page, :, slot] = key_bytes
    parts.values[page, :, slot] = value_bytes
    if parts.params is not None and key_params is not None and value_params is not None:
        params = torch.cat([key_params, value_params], dim=-1)[..., None].view(torch.uint8)
        parts.params[page, :, :, slot] = params
    heap[page_ids] = pages


def read_pages(
    heap: torch.Tensor,
    page_ids: torch.Tensor,
    num_tokens: int,
    bits: int,
    dtype: torch.dtype,
    geometry: PageGeometry,
) -> torch.Tensor:
    """See `api.read_pages`."""
    parts = _split(heap[page_ids.long()], bits, geometry)

    def tokens(part: torch.Tensor) -> torch.Tensor:
        return part.transpose(1, 2).flatten(0, 1)[:num_tokens].contiguous()

    keys, values = tokens(parts.keys), tokens(parts.values)
    if parts.params is None:
        return torch.cat([keys.view(dtype), values.view(dtype)], dim=-1).float()
    params = tokens(parts.params.transpose(2, 3)).view(torch.float16)[..., 0]
    decoded = [
        dequantise(Quantised(unpack(packed, bits), params[..., i], params[..., i + 1]))
        for packed, i in ((keys, 0), (values, 2))
    ]
    return torch.cat(decoded, dim=-1)
