from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import DEVICE, IN_TRITON, kernels, name_of, seed

from vllm_zipvl.core.geometry import PageGeometry
from vllm_zipvl.core.quantization import (
    KeyNorm,
    clip,
    dequantise,
    pack,
    quantise,
    rotate,
    unpack,
)
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.core.transfer import table_to_device
from vllm_zipvl.ops.page_codec import (
    PageTables,
    read_pages,
    reference,
    write_pages,
    write_tokens,
)

own = kernels("page_codec")
ALL_BITS = (16, 8, 4, 2)
CODECS = pytest.mark.parametrize(
    ("codec", "bits"),
    [
        *((own, bits) for bits in (ALL_BITS if IN_TRITON else ALL_BITS[1:])),
        *((reference, bits) for bits in ALL_BITS),
    ],
    ids=lambda x: name_of(x) if isinstance(x, ModuleType) else str(x),
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    seed(0)


def make_geometry(dtype: torch.dtype = torch.bfloat16, head_size: int = 64) -> PageGeometry:
    return PageGeometry(2, 3, head_size, dtype.itemsize, 16, 4, 2)


def assert_same(found: torch.Tensor, expected: torch.Tensor, step: float) -> None:
    """Equal, but for the few ranges and codes between two: Triton sums in another order."""
    if not IN_TRITON:
        assert torch.equal(found, expected)
    differs = found != expected
    assert differs.float().mean() < 0.01
    assert ((found.float() - expected.float()).abs()[differs] <= step).all()


def make_heap(geometry: PageGeometry, num_pages: int) -> torch.Tensor:
    return torch.full((num_pages, geometry.page_bytes), 255, dtype=torch.uint8)


@given(
    st.sampled_from([8, 4, 2]), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing(bits: int, num_vectors: int, quads: int, seed: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    codes = torch.randint(0, 2**bits, (num_vectors, 4 * quads), generator=generator).byte()
    packed = pack(codes, bits)
    assert packed.shape == (num_vectors, 4 * quads * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


def test_packing_puts_codes_a_width_apart() -> None:
    assert pack(torch.tensor([[1, 2, 3, 4]]), 4).tolist() == [[0x31, 0x42]]
    assert pack(torch.tensor([[0, 1, 2, 3]]), 2).tolist() == [[0b11100100]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 128])
@CODECS
def test_pages_give_back_what_was_quantised(
    codec: ModuleType, bits: int, head_size: int, dtype: torch.dtype
) -> None:
    geometry = make_geometry(dtype, head_size)
    kv = torch.randn(111, 3, 2 * head_size).to(dtype)
    page_ids = torch.randperm(40, dtype=torch.int32)[: geometry.num_pages(111, bits)]
    heap = make_heap(geometry, 40)
    codec.write_pages(kv, heap, page_ids, 0, bits, geometry, None)
    expected = kv.float()
    if bits != 16:
        parts = [dequantise(quantise(clip(rotate(part), bits), bits)) for part in kv.chunk(2, -1)]
        expected = torch.cat(parts, -1)
    # A step of the widest vector here, with a margin for the float16 of its own range.
    step = 1.01 * float(expected.max() - expected.min()) / (2**bits - 1)
    assert_same(read_pages(heap, page_ids, 111, bits, dtype, geometry), expected, step)


@pytest.mark.parametrize("cuts", [(1,), (63,), (29, 30), (1, 2, 3, 100)], ids=str)
@CODECS
def test_appending_equals_writing_at_once(
    codec: ModuleType, bits: int, cuts: tuple[int, ...]
) -> None:
    geometry = make_geometry()
    capacity = geometry.layout(bits).capacity
    kv = torch.randn(111, 3, 128).bfloat16()
    page_ids = torch.randperm(30, dtype=torch.int32)[: geometry.num_pages(111, bits)]
    whole, parts = make_heap(geometry, 30), make_heap(geometry, 30)
    codec.write_pages(kv, whole, page_ids, 0, bits, geometry, None)
    for start, end in zip((0, *cuts), (*cuts, 111), strict=True):
        ids = page_ids[start // capacity : geometry.num_pages(end, bits)]
        codec.write_pages(kv[start:end], parts, ids, start % capacity, bits, geometry, None)
    assert torch.equal(parts, whole)


@CODECS
def test_only_named_pages_are_written(codec: ModuleType, bits: int) -> None:
    geometry, heap = make_geometry(), make_heap(make_geometry(), 12)
    page_ids = torch.tensor([7, 2, 5])[: geometry.num_pages(9, bits)]
    zeros = torch.zeros(9, 3, 128).bfloat16()
    codec.write_pages(zeros, heap, page_ids, 0, bits, geometry, None)
    untouched = torch.ones(12, dtype=torch.bool)
    untouched[page_ids] = False
    assert (heap[untouched] == 255).all()
    assert not (heap[page_ids] == 255).all(dim=1).any()


@CODECS
def test_a_vector_with_nan_stays_nan(codec: ModuleType, bits: int) -> None:
    geometry = make_geometry(torch.float32)
    kv = torch.randn(9, 3, 128)
    kv[4, 1, 50] = torch.nan
    page_ids = torch.arange(geometry.num_pages(9, bits))
    heap = make_heap(geometry, len(page_ids))
    codec.write_pages(kv, heap, page_ids, 0, bits, geometry, None)
    nan = read_pages(heap, page_ids, 9, bits, torch.float32, geometry).isnan()
    keys = nan[..., :64].any(-1)
    assert keys.nonzero().tolist() == [[4, 1]]
    assert not nan[..., 64:].any()
    assert bits == 16 or nan[4, 1, :64].all()


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_any_precision_has_a_codec(bits: int) -> None:
    geometry = make_geometry()
    kv, page_ids = torch.randn(9, 3, 128).bfloat16(), torch.arange(geometry.num_pages(9, bits))
    heap, expected = make_heap(geometry, len(page_ids)), make_heap(geometry, len(page_ids))
    write_pages(kv, heap, page_ids, 0, bits, geometry)
    reference.write_pages(kv, expected, page_ids, 0, bits, geometry, None)
    assert_same(heap, expected, 255)


def check_tokens_of_all_layers(bits: tuple[int, int], num_heads: int, head_size: int) -> None:
    """Of several requests; twice, so that the second lot begins in partly full pages."""
    num_layers, num_blocks, block_size, num_slots = 3, 12, 16, 4
    geometry = PageGeometry(num_layers, num_heads, head_size, 2, block_size, *bits)
    kv = torch.randn(num_blocks, num_layers, num_heads, block_size, 2 * head_size).bfloat16()
    caches = list(kv.unbind(1))
    heap, expected = make_heap(geometry, 500), make_heap(geometry, 500)
    pages = torch.randperm(500, dtype=torch.int32)[:480].view(num_layers, num_slots, 40)
    before = torch.zeros(num_layers, num_slots, 2, dtype=torch.int32)
    norms = torch.full((num_layers, num_slots, 2, num_heads, head_size), torch.nan).half()
    rounds = (
        {2: ([7, 2, 5], True), 0: ([4], True)},
        {3: ([1, 9], True), 2: ([8, 0], False), 0: ([11, 3, 6], False)},
    )
    for requests in rounds:
        slots = list(requests)
        block_ids = [blocks for blocks, _ in requests.values()]
        is_first = [first for _, first in requests.values()]
        lengths = [len(blocks) * block_size for blocks in block_ids]
        contexts = Sequences(lengths, torch.device(DEVICE))
        kept = torch.rand(num_layers, sum(lengths)) < 0.4
        table = table_to_device(block_ids, torch.device(DEVICE))
        tables = PageTables(heap, pages, torch.tensor(slots), before[:, slots], norms, geometry)
        write_tokens(caches, table, contexts, kept, tables, is_first)
        for row, (slot, mine) in enumerate(zip(slots, kept.split(lengths, dim=1), strict=True)):
            for layer, mask in enumerate(mine):
                tokens = caches[layer][block_ids[row]].transpose(1, 2).flatten(0, 1)
                if is_first[row]:
                    keys = tokens[..., :head_size].float()
                    exact = torch.stack([keys.mean(0), keys.std(0, correction=0)])
                    assert torch.allclose(norms[layer, slot].float(), exact, atol=2e-3)
                norm = KeyNorm(*norms[layer, slot])
                for precision, part in enumerate((tokens[mask], tokens[~mask])):
                    if geometry.bits[precision] == 0:
                        continue
                    capacity = geometry.layout(geometry.bits[precision]).capacity
                    start = int(before[layer, slot, precision])
                    own = pages[layer, slot]
                    own = own if precision == 0 else own.flip(0)
                    reference.write_pages(
                        part, expected, own[start // capacity :][: len(part)], start % capacity,
                        geometry.bits[precision], geometry, norm,
                    )  # fmt: skip
            before[:, slot] += torch.stack([mine.sum(1), (~mine).sum(1)], dim=1).int()
    assert_same(heap, expected, 255)
    assert not torch.equal(heap, make_heap(geometry, 500))
    # Nobody's statistics are as they were.
    assert norms[:, 1].isnan().all() and not norms[:, [0, 2, 3]].isnan().any()


@pytest.mark.parametrize("bits", [(4, 2), (8, 4), (16, 2), (4, 0), (16, 16)], ids=str)
def test_tokens_of_all_layers_are_what_is_written_one_by_one(bits: tuple[int, int]) -> None:
    check_tokens_of_all_layers(bits, 3, 64)


@pytest.mark.parametrize("codec", [own, reference], ids=name_of)
def test_a_vector_with_infinity_has_no_range_at_two_bits(codec: ModuleType) -> None:
    geometry, kv = make_geometry(torch.float32), torch.randn(9, 3, 128)
    kv[4, 1, 50] = torch.inf
    page_ids = torch.arange(geometry.num_pages(9, 2))
    heap = make_heap(geometry, len(page_ids))
    codec.write_pages(kv, heap, page_ids, 0, 2, geometry, None)
    nan = read_pages(heap, page_ids, 9, 2, torch.float32, geometry).isnan()
    assert nan[4, 1, :64].all()
    assert nan.sum() == 64
