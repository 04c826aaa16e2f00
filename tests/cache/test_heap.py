"""The page heap's tables, and that what went in comes out again."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from page_cursor import PageCursor

from vllm_zipvl.cache.heap import HeapTables, Moves, PageHeap
from vllm_zipvl.core.geometry import PageGeometry
from vllm_zipvl.core.quantization import KeyNorm, normalise_keys
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.core.transfer import table_to_device
from vllm_zipvl.ops.page_codec import read_pages, write_pages

NUM_SLOTS = 2
CPU = torch.device("cpu")
MAX_MODEL_LEN = 256
NUM_EXAMPLES = 2 if os.environ.get("TRITON_INTERPRET") == "1" else 30
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
    return PageHeap(memory, geometry, HeapTables(geometry, NUM_SLOTS, MAX_MODEL_LEN))


def make_kv(geometry: PageGeometry, num_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, geometry.num_kv_heads, 2 * geometry.head_size)
    return torch.randn(shape, generator=generator).half()


def page_ids(heap: PageHeap, layer: int, slot: int, precision: int) -> torch.Tensor:
    """The slot's pages in the order in which they filled."""
    bits = heap.geometry.bits[precision]
    num = heap.geometry.num_pages(int(heap.tables.page_counts[layer, slot, precision]), bits)
    table = heap.tables.page_table[layer, slot]
    return table[:num] if precision == 0 else table.flip(0)[:num]


def read(heap: PageHeap, layer: int, slot: int, precision: int) -> torch.Tensor:
    num_tokens = int(heap.tables.page_counts[layer, slot, precision])
    ids = page_ids(heap, layer, slot, precision)
    bits = heap.geometry.bits[precision]
    return read_pages(heap.memory, ids, num_tokens, bits, torch.float16, heap.geometry)


def through_codec(
    kv: torch.Tensor, bits: int, geometry: PageGeometry, norm: KeyNorm
) -> torch.Tensor:
    """What the codec makes of tokens that are written at once, into pages in a row."""
    ids = torch.arange(geometry.num_pages(len(kv), bits))
    memory = torch.zeros(len(ids), geometry.page_bytes, dtype=torch.uint8)
    write_pages(kv, memory, ids, 0, bits, geometry, norm)
    return read_pages(memory, ids, len(kv), bits, torch.float16, geometry)


def assert_holds(heap: PageHeap, layer: int, slot: int, precision: int, kv: torch.Tensor) -> None:
    bits = heap.geometry.bits[precision]
    norm = KeyNorm(*heap.tables.key_norms[layer, slot])
    expected = through_codec(kv, bits, heap.geometry, norm)
    assert torch.equal(read(heap, layer, slot, precision), expected)


def make_moves(
    num_tokens: dict[int, int],
    blocks: list[list[int]],
    first_pages: list[int],
    is_first: bool = False,
) -> Moves:
    """Tokens by slot, in blocks of one token each, one slot's after another's."""
    contexts = Sequences(list(num_tokens.values()), CPU)
    table = table_to_device([range(own.start, own.stop) for own in contexts.slices()], CPU)
    return Moves(
        torch.tensor(list(num_tokens)), table, contexts, torch.tensor(contexts.lengths).int(),
        blocks, torch.tensor(first_pages), [is_first] * len(num_tokens),
    )  # fmt: skip


def store(
    heap: PageHeap,
    slot: int,
    kv: torch.Tensor,
    kept: torch.Tensor,
    blocks: list[int],
    first_page: int = 0,
    takes_norms: bool = False,
) -> int:
    """Write tokens [layers, n, heads, 2 * head_size], some kept [layers, n]; pages in use after."""
    # Blocks of one token each.
    caches = list(kv[:, :, :, None])
    moves = make_moves({slot: kv.shape[1]}, [blocks], [first_page], takes_norms)
    return int(heap.move(moves, caches, kept))


def make_kept(num_kept: list[int], num_tokens: int) -> torch.Tensor:
    """As many tokens of each layer, mixed with the others."""
    generator = torch.Generator().manual_seed(sum(num_kept))
    return torch.stack([torch.randperm(num_tokens, generator=generator) < num for num in num_kept])


def test_pages_are_taken_in_the_order_of_the_cursor() -> None:
    """Layer by layer, kept before the rest; kept from the left, the rest from the right."""
    geometry = make_geometry(8, 4)
    heap = make_heap(geometry)
    per_block = geometry.pages_per_block
    first = per_block - 4
    cursor = PageCursor(BLOCK_IDS, first, per_block)
    held = [[[], []], [[], []]]
    counts = torch.zeros(2, 2, dtype=torch.int32)
    for new in ([[30, 5], [0, 41]], [[1, 0], [17, 3]], [[0, 0], [0, 0]], [[2, 50], [9, 9]]):
        moves = make_moves({1: 60}, [BLOCK_IDS], [first])
        before, num_pages = heap.take_pages(moves, torch.tensor(new).int()[:, None])
        assert torch.equal(before[:, 0], counts)
        counts += torch.tensor(new).int()
        for layer, precision in ((0, 0), (0, 1), (1, 0), (1, 1)):
            bits, pages = geometry.bits[precision], held[layer][precision]
            pages += cursor.take(
                geometry.num_pages(int(counts[layer, precision]), bits) - len(pages)
            )
        assert int(num_pages) == cursor.num_pages
        first = cursor.num_pages
    for layer in range(2):
        table = heap.tables.page_table[layer, 1].tolist()
        kept, rest = held[layer]
        assert table[: len(kept)] == kept
        assert table[::-1][: len(rest)] == rest
        assert not any(table[len(kept) : len(table) - len(rest)])
    assert torch.equal(heap.tables.page_counts[:, 1], counts)
    assert not heap.tables.page_counts[:, 0].any() and not heap.tables.page_table[:, 0].any()


def test_too_small_a_reserve_shows_in_the_count() -> None:
    geometry = make_geometry()
    heap = make_heap(geometry)
    new = torch.full((2, 1, 2), 60, dtype=torch.int32)
    moves = make_moves({0: 120}, [[5]], [geometry.pages_per_block - 1])
    _, num_pages = heap.take_pages(moves, new)
    assert int(num_pages) > geometry.pages_per_block
    table = heap.tables.page_table[:, 0]
    assert set((table[table > 0] // geometry.pages_per_block).tolist()) == {5}


@pytest.mark.parametrize("precision", [0, 1])
def test_appending_in_parts_equals_appending_at_once(precision: int) -> None:
    geometry = make_geometry()
    capacity = geometry.layout(geometry.bits[precision]).capacity
    kv = torch.stack([make_kv(geometry, 3 * capacity + 5, seed) for seed in range(2)])
    # Into an empty page, a partly full one, exactly to its end, over several pages.
    sizes = [1, 1, capacity - 2, 2 * capacity + 1, 4]
    at_once, in_parts = make_heap(geometry), make_heap(geometry)
    for heap, parts in ((at_once, [kv.shape[1]]), (in_parts, sizes)):
        num_pages = 0
        for part in kv.split(parts, dim=1):
            kept = torch.full(part.shape[:2], precision == 0)
            num_pages = store(heap, 0, part, kept, BLOCK_IDS, num_pages)
        assert num_pages == 8
    for layer in range(2):
        for heap in (at_once, in_parts):
            assert_holds(heap, layer, 0, precision, kv[layer])


def test_requests_moved_at_once_are_as_if_one_after_another() -> None:
    """The first has pages already; the second takes its first."""
    geometry = make_geometry()
    kv = torch.stack([make_kv(geometry, 80, seed) for seed in range(2)])
    kept = make_kept([30, 55], 80)
    blocks = BLOCK_IDS[:8], BLOCK_IDS[8:]
    at_once, in_turn = make_heap(geometry), make_heap(geometry)
    first = [store(h, 0, kv[:, :20], kept[:, :20], blocks[0]) for h in (at_once, in_turn)][0]
    moves = make_moves({0: 48, 1: 32}, list(blocks), [first, 0])
    used = at_once.move(moves, list(kv[:, :, :, None]), kept)
    expected = [
        store(in_turn, 0, kv[:, :48], kept[:, :48], blocks[0], first),
        store(in_turn, 1, kv[:, 48:], kept[:, 48:], blocks[1]),
    ]
    assert used.tolist() == expected
    assert torch.equal(at_once.memory, in_turn.memory)
    for name in ("page_table", "page_counts", "compressed_lens", "key_norms"):
        assert torch.equal(getattr(at_once.tables, name), getattr(in_turn.tables, name)), name


def test_evicted_tokens_take_no_page() -> None:
    geometry = make_geometry(4, 0)
    heap = make_heap(geometry)
    kv = torch.stack([make_kv(geometry, 100)] * 2)
    assert store(heap, 0, kv, torch.zeros(2, 100, dtype=torch.bool), []) == 0
    assert not heap.tables.page_counts.any()


@pytest.mark.parametrize("bits", [4, 16])
def test_only_quantised_keys_are_stored_normalised(bits: int) -> None:
    geometry = make_geometry(bits, 2)
    heap = make_heap(geometry)
    kv = torch.stack([make_kv(geometry, 20, seed) * (1 + seed) for seed in range(2)])
    kept = torch.ones(2, 20, dtype=torch.bool)
    num_pages = store(heap, 1, kv, kept, BLOCK_IDS, takes_norms=True)
    # Later tokens use the statistics of the first.
    more = torch.stack([make_kv(geometry, 9, seed=7)] * 2)
    norms = heap.tables.key_norms[:, 1].clone()
    store(heap, 1, more, kept[:, :9], BLOCK_IDS, num_pages)
    assert torch.equal(heap.tables.key_norms[:, 1], norms)
    for layer in range(2):
        keys = kv[layer].float().chunk(2, dim=-1)[0]
        mean, scale = norms[layer]
        assert torch.allclose(mean.float(), keys.mean(0), atol=1e-2)
        assert torch.allclose(scale.float(), keys.std(0, correction=0), atol=1e-2)
        assert_holds(heap, layer, 1, 0, torch.cat([kv[layer], more[layer]]))
    held = read(heap, 0, 1, 0)
    both = torch.cat([kv[0], more[0]])
    if bits == 16:
        assert torch.equal(held, both.float())
    else:
        normalised = normalise_keys(both, KeyNorm(*norms[0]))
        plain = KeyNorm(torch.zeros_like(norms[0, 0]), torch.ones_like(norms[0, 1]))
        assert torch.allclose(held, through_codec(normalised, bits, geometry, plain), atol=1e-3)
    heap.reset(1)
    assert not heap.tables.key_norms[:, 1, 0].any() and (heap.tables.key_norms[:, 1, 1] == 1).all()


def test_a_reset_empties_one_slot_only() -> None:
    geometry = make_geometry()
    heap = make_heap(geometry)
    kept = torch.ones(2, 30, dtype=torch.bool)
    kvs = [torch.stack([make_kv(geometry, 30, seed=slot)] * 2) for slot in range(NUM_SLOTS)]
    for slot, kv in enumerate(kvs):
        store(heap, slot, kv, kept, BLOCK_IDS[8 * slot :])
        heap.tables.compressed_lens[slot] = 32
    heap.reset(0)
    assert heap.tables.compressed_lens.tolist() == [0, 32]
    assert heap.tables.page_counts[0, :, 0].tolist() == [0, 30]
    assert_holds(heap, 0, 1, 0, kvs[1][0])

    store(heap, 0, kvs[1][:, :3], kept[:, :3], BLOCK_IDS)
    assert_holds(heap, 0, 0, 0, kvs[1][0, :3])


@settings(max_examples=NUM_EXAMPLES, derandomize=True, database=None, deadline=None)
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
        kv = torch.stack([make_kv(geometry, num_tokens, 2 * number + layer) for layer in range(2)])
        kept = make_kept(num_kept, num_tokens)
        now = store(heap, 0, kv, kept, reserve, num_pages, takes_norms=number == 0)
        for layer in range(2):
            written[layer, 0].append(kv[layer, kept[layer]])
            written[layer, 1].append(kv[layer, ~kept[layer]])
        assert now - num_pages <= bound
        num_pages = now
    used = []
    for (layer, precision), parts in written.items():
        if bits[precision] == 0:
            continue
        used += page_ids(heap, layer, 0, precision).tolist()
        assert_holds(heap, layer, 0, precision, torch.cat(parts))
    assert len(set(used)) == len(used) == num_pages
    assert {page // geometry.pages_per_block for page in used} <= set(BLOCK_IDS)
