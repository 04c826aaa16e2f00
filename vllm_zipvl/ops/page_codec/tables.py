"""Where tokens of requests lie in pages."""

from typing import NamedTuple

import torch

from vllm_zipvl.core.geometry import PageGeometry


class PageTables(NamedTuple):
    """Where the tokens of some requests go, in all layers.

    Attributes:
        heap: uint8 [num_pages, page_bytes].
        page_table: Pages of each slot, int32 [num_layers, num_slots, width]: of kept tokens from
            the left, of the rest from the right end.
        slots: Those of the requests, int64 [num_requests].
        before: Tokens that they have in pages already, kept and rest, int32
            [num_layers, num_requests, 2].
        key_norms: What quantised keys of each slot are normalised by, mean, scale and order of
            the channels, float16 [num_layers, num_slots, 3, num_kv_heads, head_size].
        geometry: Page shapes.
    """

    heap: torch.Tensor
    page_table: torch.Tensor
    slots: torch.Tensor
    before: torch.Tensor
    key_norms: torch.Tensor
    geometry: PageGeometry
