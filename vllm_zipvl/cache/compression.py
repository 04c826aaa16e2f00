"""Moving tokens of one request from dense blocks into heap pages, all layers in one pass."""

import torch

from vllm_zipvl.cache.heap import PageCursor, PageHeap
from vllm_zipvl.cache.messages import CompressionPlan, CompressionReport
from vllm_zipvl.ops.dense_blocks import gather_kv


def compress(
    plan: CompressionPlan,
    kept: list[torch.Tensor],
    kv_caches: list[torch.Tensor],
    heap: PageHeap,
) -> CompressionReport:
    """Copy tokens [start, end) into pages; dense blocks are only read.

    Args:
        plan: Which tokens, from which blocks, into which.
        kept: Per layer, bool mask [end - start] of the tokens kept at high precision.
        kv_caches: Per layer, the dense blocks.
        heap: Receives the pages.
    """
    cursor = PageCursor(plan.heap_block_ids, plan.first_page, heap.geometry.pages_per_block)
    num_tokens = plan.end - plan.start
    block_ids = torch.tensor(plan.dense_block_ids, device=heap.memory.device)
    for layer, (mask, kv_cache) in enumerate(zip(kept, kv_caches, strict=True)):
        kv = gather_kv(kv_cache, block_ids, 0, num_tokens)
        if plan.start == 0:
            heap.set_key_norm(layer, plan.slot, kv.chunk(2, dim=-1)[0])
        heap.append(layer, plan.slot, 0, kv[mask], cursor)
        heap.append(layer, plan.slot, 1, kv[~mask], cursor)
    heap.compressed_lens[plan.slot] = plan.end
    return CompressionReport(cursor.num_pages, [int(mask.sum()) for mask in kept])
