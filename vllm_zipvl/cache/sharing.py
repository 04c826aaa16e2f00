"""Which blocks of the prefix cache a request may find, where sparse prefill computed some of them.

Blocks of prompts that are prefilled sparsely are cached as those of a group of their own, which
only prompts of at least `min_tokens` look into. A request counts by its length alone: chunks of a
long prompt that are still short attend densely, but perhaps to blocks of another prompt that did
not.
"""

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

DENSE_GROUP, SPARSE_GROUP = 0, 1
"""vLLM's own group, and one that it does not have."""


class EitherGroup:
    """A block pool as prompts see it that are prefilled sparsely: exact blocks come first.

    Args:
        pool: The pool.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.hash_block_size = pool.hash_block_size

    def get_cached_block(
        self, block_hash: BlockHash, kv_cache_group_ids: list[int]
    ) -> list[KVCacheBlock] | None:
        """The pool's exact block, else one of sparse prefill."""
        assert kv_cache_group_ids == [DENSE_GROUP]
        found = self._pool.get_cached_block(block_hash, kv_cache_group_ids)
        return found or self._pool.get_cached_block(block_hash, [SPARSE_GROUP])
