"""Moving tokens of requests from dense blocks into heap pages, all layers in one pass."""

from collections.abc import Sequence

import torch

from vllm_zipvl.cache.heap import Moves, PageHeap
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.core.transfer import table_to_device, to_device
from vllm_zipvl.plan import CompressionPlan, CompressionReport


class CompressionPass:
    """Compressions that were launched together; a GPU may still be at it.

    Args:
        figures: Of each plan, pages in use, then tokens kept in each layer, int64
            [num_plans, 1 + num_layers].
        num_reserved_pages: By plan id and in the same order, pages that the plan had room for.
    """

    def __init__(self, figures: torch.Tensor, num_reserved_pages: dict[int, int]) -> None:
        self._num_reserved_pages = num_reserved_pages
        self._done: torch.cuda.Event | None = None
        if figures.is_cuda:
            self._figures = torch.empty_like(figures, device="cpu", pin_memory=True)
            self._figures.copy_(figures, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._figures = figures

    def reports(self) -> dict[int, CompressionReport]:
        """The outcomes by plan id; waits for them.

        Raises:
            IndexError: The scheduler's reserve was too small.
        """
        if self._done is not None:
            self._done.synchronize()
        reports = {}
        for figures, (plan_id, num_reserved) in zip(
            self._figures.tolist(), self._num_reserved_pages.items(), strict=True
        ):
            num_pages, *num_kept = figures
            if num_pages > num_reserved:
                raise IndexError(f"{num_pages} pages do not fit into {num_reserved}")
            reports[plan_id] = CompressionReport(num_pages, num_kept)
        return reports


def moves_of_plans(plans: Sequence[CompressionPlan], device: torch.device) -> Moves:
    """Each plan's tokens [start, end), from its dense blocks into its heap blocks."""
    return Moves(
        slots=to_device([plan.slot for plan in plans], device),
        block_table=table_to_device([plan.dense_block_ids for plan in plans], device),
        contexts=Sequences([plan.end - plan.start for plan in plans], device),
        ends=to_device([plan.end for plan in plans], device, torch.int32),
        heap_block_ids=[plan.heap_block_ids for plan in plans],
        first_pages=to_device([plan.first_page for plan in plans], device),
        is_first=[plan.is_first for plan in plans],
    )


def compress(
    plans: Sequence[CompressionPlan],
    moves: Moves,
    kept: torch.Tensor,
    kv_caches: Sequence[torch.Tensor],
    heap: PageHeap,
) -> CompressionPass:
    """Copy each plan's tokens [start, end) into pages; dense blocks are only read.

    Args:
        plans: Which tokens, from which blocks, into which.
        moves: The same on the device.
        kept: The plans' tokens that are kept at high precision, bool [num_layers, num_tokens].
        kv_caches: Per layer, the dense blocks.
        heap: Receives the pages.
    """
    num_pages = heap.move(moves, kv_caches, kept)
    figures = torch.cat([num_pages[:, None], moves.contexts.counts(kept).t()], dim=1)
    per_block = heap.geometry.pages_per_block
    reserved = {plan.plan_id: len(plan.heap_block_ids) * per_block for plan in plans}
    return CompressionPass(figures, reserved)
