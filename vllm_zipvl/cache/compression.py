"""Moving tokens of one request from dense blocks into heap pages, all layers in one pass."""

import torch

from vllm_zipvl.cache.heap import PageHeap
from vllm_zipvl.cache.messages import CompressionPlan, CompressionReport


class Compression:
    """A compression that was launched; a GPU may still be at it.

    Args:
        figures: Pages in use, then tokens kept in each layer, int64 [1 + num_layers].
        num_reserved_pages: Pages that the plan had room for.
    """

    def __init__(self, figures: torch.Tensor, num_reserved_pages: int) -> None:
        self._num_reserved_pages = num_reserved_pages
        self._done: torch.cuda.Event | None = None
        if figures.is_cuda:
            self._figures = torch.empty_like(figures, device="cpu", pin_memory=True)
            self._figures.copy_(figures, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._figures = figures

    def report(self) -> CompressionReport:
        """The outcome; waits for it.

        Raises:
            IndexError: The scheduler's reserve was too small.
        """
        if self._done is not None:
            self._done.synchronize()
        num_pages, *num_kept = self._figures.tolist()
        if num_pages > self._num_reserved_pages:
            raise IndexError(f"{num_pages} pages do not fit into {self._num_reserved_pages}")
        return CompressionReport(num_pages, num_kept)


def compress(
    plan: CompressionPlan,
    kept: list[torch.Tensor],
    kv_caches: list[torch.Tensor],
    block_ids: torch.Tensor,
    heap: PageHeap,
) -> Compression:
    """Copy tokens [start, end) into pages; dense blocks are only read.

    Args:
        plan: Which tokens, from which blocks, into which.
        kept: Per layer, bool mask [end - start] of the tokens kept at high precision.
        kv_caches: Per layer, the dense blocks.
        block_ids: Those of the plan, on the device.
        heap: Receives the pages.
    """
    masks = torch.stack(kept)
    num_pages = heap.move(
        plan.slot,
        kv_caches,
        block_ids,
        masks,
        plan.heap_block_ids,
        plan.first_page,
        takes_norms=plan.start == 0,
    )
    num_reserved = len(plan.heap_block_ids) * heap.geometry.pages_per_block
    return Compression(torch.cat([num_pages[None], masks.sum(1)]), num_reserved)
