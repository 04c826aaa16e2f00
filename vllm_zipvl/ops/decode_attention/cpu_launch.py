"""What a launch of the decode kernel hands over: memory, tables, sizes and offsets."""

from typing import NamedTuple

import numpy as np

KEPT, REST, DENSE = range(3)
"""Classes of tokens: where `Tables` list their pages or blocks."""


class Inputs(NamedTuple):
    """The queries, and what stands between them and stored keys.

    Attributes:
        queries: float32 [num_rows, num_heads, head_size].
        norms: As in `CachedContext`, float16 as uint16.
        scale: Softmax scale over log 2.
        rotated: Whether any tokens are quantised.
    """

    queries: np.ndarray
    norms: np.ndarray
    scale: np.float32
    rotated: bool


class Stores(NamedTuple):
    """Flat views of memory: bytes of the dense blocks, heap as bytes and as uint16."""

    dense: np.ndarray
    heap: np.ndarray
    halves: np.ndarray


class Tables(NamedTuple):
    """Where contexts lie: as in `CachedContext`, and rows int32 [num_rows, 5].

    A row is (slot, row of the block table, head length, tail start, context length).
    """

    page_table: np.ndarray
    page_counts: np.ndarray
    block_table: np.ndarray
    rows: np.ndarray


class Shape(NamedTuple):
    """Sizes of the launch.

    Attributes:
        num_kv_heads: KV heads.
        group: Queries that a micro-kernel takes together.
        num_queries: Queries per KV head, padded to a multiple of `group`.
        head_size: Channels stored per head.
        padded_size: Channels of queries and sums, a multiple of 64.
        row: Floats from one query's scores to the next one's, a multiple of 16.
        num_splits: Parts that each context is cut into.
        heads_per_item: KV heads of a work item.
    """

    num_kv_heads: int
    group: int
    num_queries: int
    head_size: int
    padded_size: int
    row: int
    num_splits: int
    heads_per_item: int


class Record(NamedTuple):
    """What one work item reads and writes: offsets into its float32 record.

    Attributes:
        query: Queries [2, num_queries, padded_size], plain and rotated.
        offsets: What adds to the scores of unquantised tokens, [num_queries].
        query_sums: Sums of the rotated queries, [num_queries].
        sums: Unnormalised outputs [2, num_queries, padded_size], plain and rotated.
        state: [2, num_queries]: maximum and denominator.
        scores: [num_queries, row].
        params: [4, row]: scale and zero of the key, scale and zero of the value.
        widened: Vectors [row, padded_size] of heads that are padded.
        size: Floats of the record.
    """

    query: int
    offsets: int
    query_sums: int
    sums: int
    state: int
    scores: int
    params: int
    widened: int
    size: int


class TokenClass(NamedTuple):
    """Where tokens of one precision lie: in pages, or in dense blocks cut into tiles.

    Attributes:
        kind: Kind of the stored elements; -1 if the class is never kept.
        quantised: 1 if quantised (hence rotated), else 0.
        table: KEPT, REST or DENSE: where its pages or blocks are listed.
        capacity: Tokens of a tile.
        unit_tokens: Tokens of a page, which is one tile, or of a block, a multiple of `capacity`.
        unit_bytes: Bytes from one page, or one block of the layer, to the next.
        head_bytes: Bytes of one KV head in it.
        stride: Bytes from token to token.
        value_offset: Bytes from a token's key to its value.
        param_offset: Bytes from the start of the head to its parameters.
        fetch_bytes: Half of the bytes of one KV head in a tile.
    """

    kind: int
    quantised: int
    table: int
    capacity: int
    unit_tokens: int
    unit_bytes: int
    head_bytes: int
    stride: int
    value_offset: int
    param_offset: int
    fetch_bytes: int
