"""Sizes in bytes, tokens and pages: every count that memory or a kernel depends on."""

from dataclasses import dataclass
from typing import NamedTuple

PAGE_TOKENS = 4
"""Dense tokens of one layer whose bytes make one page."""

PARAM_BYTES = 2
"""Bytes of one quantisation parameter: a float16, or two scales."""

NUM_PARAMS = 4
"""Parameters per token and head: scales of key and value, both zeros of the key, the value's."""

UNQUANTISED = 16
"""The `bits` that stand for the model's own dtype."""


def cdiv(a: int, b: int) -> int:
    """The smallest integer not below a / b, for b above 0."""
    return -(-a // b)


class PageLayout(NamedTuple):
    """Byte offsets inside one KV head's part of a page, and the page's capacity.

    Attributes:
        capacity: Tokens that a page holds.
        code_bytes: Bytes of one token's key (or value) of one head.
        value_offset: Where the values [capacity, code_bytes] start; keys start at 0.
        param_offset: Where the parameters [4, capacity] start (quantised only).
    """

    capacity: int
    code_bytes: int
    value_offset: int
    param_offset: int


@dataclass(frozen=True)
class PageGeometry:
    """The shape of dense blocks and of heap pages on one rank.

    A block holds `block_size` tokens of all `num_layers` layers. Used as heap memory it is
    cut into pages of equal size, each used by one layer at one precision.

    Attributes:
        num_layers: Attention layers that share a block.
        num_kv_heads: KV heads on this rank.
        head_size: Channels per head, equal for keys and values.
        itemsize: Bytes of one unquantised element.
        block_size: Tokens per block; a multiple of `PAGE_TOKENS`.
        high_bits: Bits of the kept tokens.
        low_bits: Bits of the rest; 0 when they are evicted.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    itemsize: int
    block_size: int
    high_bits: int
    low_bits: int

    @property
    def bits(self) -> tuple[int, int]:
        """Precision of class 0 (kept) and class 1 (rest)."""
        return self.high_bits, self.low_bits

    @property
    def head_page_bytes(self) -> int:
        """Bytes of one page that belong to one KV head."""
        return PAGE_TOKENS * 2 * self.head_size * self.itemsize

    @property
    def page_bytes(self) -> int:
        return self.num_kv_heads * self.head_page_bytes

    @property
    def pages_per_block(self) -> int:
        return self.num_layers * self.block_size // PAGE_TOKENS

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: all layers."""
        return self.pages_per_block * self.page_bytes

    def token_head_bytes(self, bits: int) -> int:
        """Bytes of one token's key and value of one head of one layer, parameters included."""
        if bits == 0:
            return 0
        if bits == UNQUANTISED:
            return 2 * self.head_size * self.itemsize
        return 2 * self.head_size * bits // 8 + NUM_PARAMS * PARAM_BYTES

    def layout(self, bits: int) -> PageLayout:
        """Where the parts of a page lie at `bits`, which is not 0."""
        per_token = self.token_head_bytes(bits)
        quantised = bits != UNQUANTISED
        code_bytes = self.head_size * bits // 8 if quantised else self.head_size * self.itemsize
        capacity = self.head_page_bytes // per_token
        return PageLayout(capacity, code_bytes, capacity * code_bytes, 2 * capacity * code_bytes)

    def num_pages(self, num_tokens: int, bits: int) -> int:
        """Pages that `num_tokens` of one layer fill at `bits`, from an empty page on."""
        if bits == 0 or num_tokens == 0:
            return 0
        return cdiv(num_tokens, self.layout(bits).capacity)

    def max_new_pages(self, num_tokens: int, max_high: int) -> int:
        """Upper bound of the pages that compressing `num_tokens` of every layer takes.

        Args:
            num_tokens: Tokens compressed per layer.
            max_high: Upper bound, mean over layers, of the tokens among them that are kept.
        """
        if num_tokens == 0:
            return 0
        high = min(num_tokens, max_high)
        low = num_tokens - high
        pages = cdiv(self.num_layers * high, self.layout(self.high_bits).capacity) + self.num_layers
        if self.low_bits:
            # Precisions may share their tokens out unevenly over the layers, so each layer
            # may leave a page of either precision partly filled.
            pages += cdiv(self.num_layers * low, self.layout(self.low_bits).capacity)
            pages += self.num_layers
        return pages

    def max_pages_per_layer(self, num_tokens: int) -> int:
        """Upper bound of the pages of one layer that hold `num_tokens`, in any split."""
        widest = max(self.token_head_bytes(bits) for bits in self.bits if bits)
        return cdiv(num_tokens, self.head_page_bytes // widest) + 2

    def num_blocks(self, num_pages: int) -> int:
        return cdiv(num_pages, self.pages_per_block)


def head_len(sinks: int, block_size: int) -> int:
    """First tokens of a context that stay dense: the sinks, in whole blocks."""
    return cdiv(sinks, block_size) * block_size


def compressible_end(num_tokens: int, sinks: int, residual: int, block_size: int) -> int:
    """Where the tokens end, from the head on, that are compressed; 0 if there are none.

    Whole blocks; the newest `residual` tokens stay dense.
    """
    end = num_compressible(num_tokens, residual, block_size)
    return end if end > head_len(sinks, block_size) else 0


def num_compressible(num_tokens: int, residual: int, block_size: int) -> int:
    """Tokens of whole blocks without the newest `residual`."""
    return max(0, num_tokens - residual) // block_size * block_size
