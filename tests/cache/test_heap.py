"""The page heap's tables, and that what went in comes out again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_zipvl.cache.heap import PageCursor, PageHeap
from vllm_zipvl.core.geometry import PageGeometry
from vllm_zipvl.ops.page_codec import read_pages, write_pages

NUM_SLOTS = 2
MAX_MODEL_LEN = 256
# Permuted, with a gap, and without the null block.
BLOCK_IDS = [7, 2, 9, 4, 1, 8, 3, 11, 5, 12, 6, 14, 13, 15, 10, 16]


def make_geometry(high_bits: int = 4, low_bits: int = 2) -> PageGeometry:
    return PageGeometry(
        num_layers=2,
        num_kv_heads=2,
        head_size=32,
        itemsize=2,
        block_size=16,
        high_bits=high_bits,
        low_bits=low_bits,
    )


def make_heap(geometry: PageGeometry) -> PageHeap:
    num_pages = (max(BLOCK_IDS) + 1) * geometry.pages_per_block
    memory = torch.full((num_pages, geometry.page_bytes), 0xA5, dtype=torch.uint8)
    return PageHeap(memory, geometry, NUM_SLOTS, MAX_MODEL_LEN)


def make_kv(geometry: PageGeometry, num_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, geometry.num_kv_heads, 2 * geometry.head_size)
    return torch.randn(shape, generator=generator).half()


def page_ids(heap: PageHeap, layer: int, slot: int, precision: int) -> torch.Tensor:
    """The slot's pages in the order in which they filled."""
    bits = heap.geometry.bits[precision]
    num = heap.geometry.num_pages(int(heap.page_counts[layer, slot, precision]), bits)
    table = heap.page_table[layer, slot]
    return table[:num] if precision == 0 else table.flip(0)[:num]


def read(heap: PageHeap, layer: int, slot: int, precision: int) -> torch.Tensor:
    num_tokens = int(heap.page_counts[layer, slot, precision])
    ids = page_ids(heap, layer, slot, precision)
    bits = heap.geometry.bits[precision]
    return read_pages(heap.memory, ids, num_tokens, bits, torch.float16, heap.geometry)


def through_codec(kv: torch.Tensor, bits: int, geometry: PageGeometry) -> torch.Tensor:
    """What the codec makes of tokens that are written at once, into pages in a row."""
    ids = torch.arange(geometry.num_pages(len(kv), bits))
    memory = torch.zeros(len(ids), geometry.page_bytes, dtype=torch.uint8)
    write_pages(kv, memory, ids, 0, bits, geometry)
    return read_pages(memory, ids, len(kv), bits, torch.float16, geometry)


def assert_holds(heap: PageHeap, layer: int, slot: int, precision: int, kv: torch.Tensor) -> None:
    bits = heap.geometry.bits[precision]
    expected = through_codec(kv, bits, heap.geometry)
    assert torch.equal(read(heap, layer, slot, precision), expected)


def test_a_cursor_hands_out_the_pages_of_its_blocks_in_order() -> None:
    cursor = PageCursor([5, 2], first_page=3, pages_per_block=4)
    assert cursor.take(0) == []
    assert cursor.take(3) == [5 * 4 + 3, 2 * 4 + 0, 2 * 4 + 1]
    assert cursor.num_pages == 6
    assert cursor.take(2) == [2 * 4 + 2, 2 * 4 + 3]


def test_a_cursor_with_too_small_a_reserve_raises() -> None:
    cursor = PageCursor([5, 2], first_page=7, pages_per_block=4)
    with pytest.raises(IndexError):
        cursor.take(2)


@pytest.mark.parametrize("precision", [0, 1])
def test_appending_in_parts_equals_appending_at_once(precision: int) -> None:
    geometry = make_geometry()
    capacity = geometry.layout(geometry.bits[precision]).capacity
    kv = make_kv(geometry, 3 * capacity + 5)
    # Into an empty page, a partly full one, exactly to its end, nothing, over several pages.
    sizes = [1, 1, capacity - 2, 0, 2 * capacity + 1, 4]
    at_once, in_parts = make_heap(geometry), make_heap(geometry)
    for heap, parts in ((at_once, [len(kv)]), (in_parts, sizes)):
        cursor = PageCursor(BLOCK_IDS, 0, geometry.pages_per_block)
        for part in kv.split(parts):
            heap.append(1, 0, precision, part, cursor)
        assert cursor.num_pages == 4
    assert torch.equal(at_once.page_table, in_parts.page_table)
    assert torch.equal(at_once.page_counts, in_parts.page_counts)
    assert torch.equal(at_once.memory, in_parts.memory)
    assert_holds(in_parts, 1, 0, precision, kv)


def test_kept_pages_grow_from_the_left_and_the_rest_from_the_right() -> None:
    geometry = make_geometry(8, 4)
    heap = make_heap(geometry)
    high, low = (geometry.layout(bits).capacity for bits in geometry.bits)
    per_block = geometry.pages_per_block
    cursor = PageCursor(BLOCK_IDS, per_block - 4, per_block)
    heap.append(0, 1, 0, make_kv(geometry, 2 * high), cursor)
    heap.append(0, 1, 1, make_kv(geometry, low), cursor)
    heap.append(0, 1, 0, make_kv(geometry, 1), cursor)
    heap.append(0, 1, 1, make_kv(geometry, 1), cursor)

    pages = [*range(8 * per_block - 4, 8 * per_block), 2 * per_block]
    table = heap.page_table[0, 1].tolist()
    assert table[:3] == [pages[0], pages[1], pages[3]]
    assert table[-2:] == [pages[4], pages[2]]
    assert not any(table[3:-2])
    assert heap.page_counts[0, 1].tolist() == [2 * high + 1, low + 1]
    assert not heap.page_table[1].any() and not heap.page_table[0, 0].any()


def test_evicted_tokens_take_no_page() -> None:
    geometry = make_geometry(4, 0)
    heap = make_heap(geometry)
    cursor = PageCursor([], 0, geometry.pages_per_block)
    heap.append(0, 0, 1, make_kv(geometry, 100), cursor)
    heap.append(0, 0, 0, make_kv(geometry, 0), cursor)
    assert cursor.num_pages == 0
    assert not heap.page_counts.any()


@pytest.mark.parametrize("bits", [4, 16])
def test_only_quantised_keys_are_stored_normalised(bits: int) -> None:
    geometry = make_geometry(bits, 2)
    heap = make_heap(geometry)
    cursor = PageCursor(BLOCK_IDS, 0, geometry.pages_per_block)
    kv = make_kv(geometry, 20)
    keys, values = kv.float().chunk(2, dim=-1)
    heap.set_key_norm(0, 1, 3 * keys + 5)
    mean, scale = heap.key_norms[0, 1]
    heap.append(0, 1, 0, kv, cursor)
    heap.append(1, 1, 0, kv, cursor)

    normalised = torch.cat([(keys - mean) / scale, values], dim=-1)
    assert_holds(heap, 0, 1, 0, kv if bits == 16 else normalised)
    # The other layer has no statistics of its own yet.
    assert_holds(heap, 1, 1, 0, kv)
    heap.reset(1)
    assert not heap.key_norms[:, 1, 0].any() and (heap.key_norms[:, 1, 1] == 1).all()


def test_a_reset_empties_one_slot_only() -> None:
    geometry = make_geometry()
    heap = make_heap(geometry)
    cursor = PageCursor(BLOCK_IDS, 0, geometry.pages_per_block)
    for slot in range(NUM_SLOTS):
        heap.append(0, slot, 0, make_kv(geometry, 30, seed=slot), cursor)
        heap.compressed_lens[slot] = 32
    heap.reset(0)
    assert heap.compressed_lens.tolist() == [0, 32]
    assert heap.page_counts[0, :, 0].tolist() == [0, 30]
    assert_holds(heap, 0, 1, 0, make_kv(geometry, 30, seed=1))

    kv = make_kv(geometry, 3, seed=2)
    heap.append(0, 0, 0, kv, cursor)
    assert_holds(heap, 0, 0, 0, kv)


@settings(max_examples=30, derandomize=True, database=None, deadline=None)
@given(
    bits=st.sampled_from([(16, 16), (8, 4), (4, 2), (4, 0)]),
    rounds=st.lists(
        st.tuples(st.integers(1, 4), st.lists(st.floats(0, 1), min_size=2, max_size=2)),
        min_size=1,
        max_size=3,
    ),
)
def test_rounds_of_compression_stay_within_the_bound_and_never_mix(
    bits: tuple[int, int], rounds: list[tuple[int, list[float]]]
) -> None:
    """As prompts and tails are compressed: some blocks of all layers, shares drawn per layer."""
    geometry = make_geometry(*bits)
    heap = make_heap(geometry)
    written = {(layer, p): [] for layer in range(2) for p in range(2)}
    num_pages = 0
    for number, (num_blocks, shares) in enumerate(rounds):
        num_tokens = num_blocks * geometry.block_size
        num_kept = [round(share * num_tokens) for share in shares]
        bound = geometry.max_new_pages(num_tokens, max_high=-(-sum(num_kept) // 2))
        reserve = BLOCK_IDS[: geometry.num_blocks(num_pages + bound)]
        cursor = PageCursor(reserve, num_pages, geometry.pages_per_block)
        for layer in range(2):
            kv = make_kv(geometry, num_tokens, seed=2 * number + layer)
            parts = kv.split([num_kept[layer], num_tokens - num_kept[layer]])
            for precision, part in enumerate(parts):
                heap.append(layer, 0, precision, part, cursor)
                written[layer, precision].append(part)
        assert cursor.num_pages - num_pages <= bound
        num_pages = cursor.num_pages
    used = []
    for (layer, precision), parts in written.items():
        if bits[precision] == 0:
            continue
        used += page_ids(heap, layer, 0, precision).tolist()
        assert_holds(heap, layer, 0, precision, torch.cat(parts))
    assert len(set(used)) == len(used) == num_pages
    assert {page // geometry.pages_per_block for page in used} <= set(BLOCK_IDS)
