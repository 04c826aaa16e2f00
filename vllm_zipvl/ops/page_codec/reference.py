"""The page codec in torch."""

from typing import NamedTuple

import torch

from vllm_zipvl.core.codes import (
    Quantised,
    byte_to_scale,
    clip,
    dequantise,
    pack,
    quantise,
    scale_to_byte,
    unpack,
)
from vllm_zipvl.core.geometry import NUM_PARAMS, PARAM_BYTES, UNQUANTISED, PageGeometry
from vllm_zipvl.core.quantization import KEY_ZEROS, KeyNorm, normalise_keys, rotate


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


def _params(key: Quantised, value: Quantised) -> torch.Tensor:
    """The bytes of vectors' parameters, [..., 4, 2]: both scales, the key's zeros, the value's."""
    scales = torch.stack([scale_to_byte(key.scale), scale_to_byte(value.scale)], dim=-1)
    zeros = torch.cat([key.zero, value.zero], dim=-1)[..., None].view(torch.uint8)
    return torch.cat([scales[..., None, :], zeros], dim=-2)


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
    key, value = kv.chunk(2, dim=-1)
    if parts.params is None:
        parts.keys[page, :, slot] = key.contiguous().view(torch.uint8)
        parts.values[page, :, slot] = value.contiguous().view(torch.uint8)
    else:
        key = key if norm is None else normalise_keys(key, norm)
        keys = quantise(clip(rotate(key), bits, KEY_ZEROS), bits, KEY_ZEROS)
        values = quantise(clip(rotate(value), bits), bits)
        parts.keys[page, :, slot] = pack(keys.codes, bits)
        parts.values[page, :, slot] = pack(values.codes, bits)
        parts.params[page, :, :, slot] = _params(keys, values)
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
    params = tokens(parts.params.transpose(2, 3))
    scales = byte_to_scale(params[..., 0, :])
    zeros = params[..., 1:, :].contiguous().view(torch.float16)[..., 0]
    stored = ((keys, zeros[..., :KEY_ZEROS]), (values, zeros[..., KEY_ZEROS:]))
    decoded = [
        dequantise(Quantised(unpack(packed, bits), scales[..., side], zero))
        for side, (packed, zero) in enumerate(stored)
    ]
    return torch.cat(decoded, dim=-1)
