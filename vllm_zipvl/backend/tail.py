"""The newest query of every request, which decides what of a tail is kept."""

import torch


class TailProbes:
    """Of one layer, by slot; one slot more is for rows that are nobody's.

    Made with the layer, so that vLLM's memory profiling counts them, and written in place, so that
    CUDA graphs can write them.

    Attributes:
        queries: [num_slots + 1, num_heads, head_size].
        lse: Softmax denominators, float32 [num_slots + 1, num_heads].
        scale: Softmax scale.
    """

    def __init__(self, num_slots: int, num_heads: int, head_size: int, scale: float) -> None:
        self.queries = torch.zeros(num_slots + 1, num_heads, head_size)
        self.lse = torch.zeros(num_slots + 1, num_heads, dtype=torch.float32)
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
