"""The newest query of every request: it decides on its tail, or on a prompt that it ends."""

import torch


class TailProbes:
    """Of one layer, by slot; the last slot is for rows that are nobody's.

    Made with the layer, so that vLLM's memory profiling counts them, and written in place, so that
    CUDA graphs can write them.

    Attributes:
        queries: [num_slots, num_heads, head_size].
        lse: Softmax denominators, float32 [num_slots, num_heads].
        scale: Softmax scale.

    Args:
        shape: num_slots, num_heads, head_size.
        scale: Softmax scale.
        dtype: Of queries.
        device: Of everything.
    """

    def __init__(
        self, shape: tuple[int, int, int], scale: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.queries = torch.zeros(shape, dtype=dtype, device=device)
        self.lse = torch.zeros(shape[:2], dtype=torch.float32, device=device)
        self.scale = scale

    def note(self, slots: torch.Tensor, query: torch.Tensor, lse: torch.Tensor) -> None:
        """Keep a step's queries.

        Args:
            slots: Different ones but for nobody's, int32 [num_queries].
            query: [num_queries, num_heads, head_size].
            lse: float32 [num_queries, num_heads].
        """
        self.queries.index_copy_(0, slots.long(), query)
        self.lse.index_copy_(0, slots.long(), lse)

    def mass(self, slot: int, key: torch.Tensor) -> torch.Tensor:
        """Attention of a slot's query, summed over heads, float32 [num_tokens].

        Args:
            slot: Whose query.
            key: Some keys of its context, [num_tokens, num_kv_heads, head_size].
        """
        query = self.queries[slot].float().unflatten(0, (key.shape[1], -1))
        scores = query @ key.float().permute(1, 2, 0) * self.scale
        lse = self.lse[slot].unflatten(0, (key.shape[1], -1))[..., None]
        return torch.exp(scores - lse).sum((0, 1))
