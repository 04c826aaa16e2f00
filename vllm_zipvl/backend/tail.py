"""The newest query of every request: it decides on its tail, or on a prompt that it ends."""

import torch


class TailProbes:
    """Of all layers, by slot; the last slot is for rows that are nobody's.

    Made with the layers, so that vLLM's memory profiling counts them, and written in place, so that
    CUDA graphs can write them.

    Attributes:
        queries: [num_layers, num_slots, num_heads, head_size].
        lse: Log of their softmax denominators, float32 [num_layers, num_slots, num_heads].

    Args:
        shape: num_layers, num_slots, num_heads, head_size.
        dtype: Of queries.
        device: Of everything.
    """

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.queries = torch.zeros(shape, dtype=dtype, device=device)
        self.lse = torch.zeros(shape[:3], dtype=torch.float32, device=device)

    def note(self, layer: int, slots: torch.Tensor, query: torch.Tensor, lse: torch.Tensor) -> None:
        """Keep a step's queries of one layer.

        Args:
            layer: Index of the layer.
            slots: Different ones but for nobody's, int32 [num_queries].
            query: [num_queries, num_heads, head_size].
            lse: float32 [num_queries, num_heads].
        """
        self.queries[layer].index_copy_(0, slots.long(), query)
        self.lse[layer].index_copy_(0, slots.long(), lse)
