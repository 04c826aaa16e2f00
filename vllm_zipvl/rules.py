"""What follows from settings and shapes: when to compress, and the room that it may take."""

import math
import sys
from dataclasses import dataclass

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import PageGeometry, compressible_end, head_len


@dataclass(frozen=True)
class CacheRules:
    """The settings and the page shapes of one engine; equal on scheduler and workers."""

    config: ZipVLConfig
    geometry: PageGeometry

    @property
    def head_len(self) -> int:
        """First tokens of a context that stay dense: the sinks, in whole blocks."""
        return head_len(self.config.sinks, self.geometry.block_size)

    def compressible_end(self, num_tokens: int) -> int:
        """Where the tokens end, from the head on, that may be in pages; 0 if there are none."""
        if not self.config.compress:
            return 0
        config = self.config
        return compressible_end(num_tokens, config.sinks, config.residual, self.geometry.block_size)

    def num_compressible(self, num_tokens: int) -> int:
        """How many tokens of a context may be in pages."""
        return max(0, self.compressible_end(num_tokens) - self.head_len)

    def interval_due(self, compressed_len: int) -> int:
        """Tokens from which on a compression of the tail is due."""
        if not self.config.compress:
            return sys.maxsize
        # Whole blocks are compressed, and both lengths are whole blocks.
        interval = max(self.config.interval, self.geometry.block_size)
        return max(compressed_len, self.head_len) + self.config.residual + interval

    def interval_end(self, compressed_len: int, num_tokens: int) -> int | None:
        """Where the next compression of the tail ends, or None if none is due."""
        if num_tokens < self.interval_due(compressed_len):
            return None
        return self.compressible_end(num_tokens)

    def num_reserved_pages(self, num_prompt_tokens: int) -> int:
        """Upper bound of the pages that compressing a prompt takes, over all layers."""
        max_high = num_prompt_tokens
        if self.config.chooses_for_cache:
            max_kept = math.floor(self.config.max_kept * num_prompt_tokens)
            max_high = max_kept + self.config.probe_recent
        return self.geometry.max_new_pages(self.num_compressible(num_prompt_tokens), max_high)

    def max_heap_blocks(self, num_tokens: int) -> int:
        """Upper bound of the heap blocks of a request, whatever part of it is its prompt."""
        num_new = self.num_compressible(num_tokens)
        # `max_kept` bounds what is kept of a prompt; of a tail all may be kept.
        num_pages = self.geometry.max_new_pages(num_new, max_high=num_new)
        return self.geometry.num_blocks(max(num_pages, self.num_reserved_pages(num_tokens)))
