"""Decode attention against fp64 truth, with everything that must not be read set to NaN."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from kernels import IN_TRITON, INTERPRETED, implementations, kernels, numba_only, seed

from vllm_zipvl.core.geometry import PageGeometry
from vllm_zipvl.core.quantization import KeyNorm, hadamard, plain_norm, rotate
from vllm_zipvl.ops.decode_attention import (
    CachedContext,
    DecodeRows,
    decode_attention,
    reference,
    workspace_bytes,
)
from vllm_zipvl.ops.dense_blocks import store_kv
from vllm_zipvl.ops.page_codec import read_pages, write_pages

own = kernels("decode_attention")
BOTH = implementations("decode_attention")
BLOCK_SIZE, NUM_LAYERS, LAYER = 16, 2, 1
PAIRS = [(h, low) for h in (16, 8, 4) for low in (16, 8, 4, 2, 0) if low <= h]
GROUPS = range(1, 9)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(3, 32), (20, 64), (12, 96), (7, 128), (5, 160), (5, 192), (4, 256)]
if INTERPRETED:
    PAIRS, GROUPS = [(16, 16), (8, 0), (8, 4), (4, 2)], (1, 3, 8)


class Row(NamedTuple):
    """Tokens of a row: kept pages, rest pages, dense tail and head; evicted ones are nowhere."""

    kept: int
    rest: int
    tail: int
    head: int = 0


LONG = Row(30, 130, 40, 32) if INTERPRETED else Row(275, 685, 40, 80)
HEADS = [(6, 2)] if INTERPRETED else [(28, 4), (8, 8), (32, 8)]
ROWS = (
    Row(0, 0, 1), Row(7, 9, 47), Row(20, 44, 47, 16), LONG, Row(0, 64, 33),
    Row(64, 0, 16, 64), Row(30, 34, 0), Row(30, 34, 0, 16),
)  # fmt: skip


class Case(NamedTuple):
    context: CachedContext
    rows: DecodeRows
    truth_kv: list[torch.Tensor]


class Memory:
    """Blocks in permuted order, one layer of which is used; what is not written is NaN.

    Those before `first_block` are never touched, so that they need no memory.
    """

    def __init__(
        self, geometry: PageGeometry, dtype: torch.dtype, num_blocks: int, first_block: int
    ) -> None:
        self.geometry, self.dtype = geometry, dtype
        storage = torch.empty(first_block + num_blocks, geometry.block_bytes, dtype=torch.uint8)
        storage[first_block:] = 255
        self.heap = storage.view(-1, geometry.page_bytes)
        shape = (len(storage), NUM_LAYERS, geometry.num_kv_heads, BLOCK_SIZE, -1)
        self.kv_cache = storage.view(dtype).view(shape)[:, LAYER]
        self.blocks = (first_block + torch.randperm(num_blocks)).tolist()
        self.unused = self.blocks.pop()

    def take_pages(self, num_pages: int) -> torch.Tensor:
        per_block = self.geometry.pages_per_block
        blocks = [self.blocks.pop() for _ in range(self.geometry.num_blocks(num_pages))]
        pages = torch.tensor(blocks, dtype=torch.int32)[:, None] * per_block
        pages = (pages + torch.arange(per_block)).flatten()
        return pages[torch.randperm(len(pages))][:num_pages].int()

    def put_pages(
        self, kv: torch.Tensor, bits: int, norm: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write tokens to pages; returns the pages and what they hold, fp64."""
        ids = self.take_pages(self.geometry.num_pages(len(kv), bits))
        if bits == 0 or len(kv) == 0:
            return ids, kv[:0].double()
        write_pages(kv, self.heap, ids, 0, bits, self.geometry, KeyNorm(*norm))
        held = read_pages(self.heap, ids, len(kv), bits, self.dtype, self.geometry).double()
        if bits != 16:
            turn = hadamard(self.geometry.head_size, held.device).double()
            key, value = (part @ turn for part in held.chunk(2, dim=-1))
            key = key * norm[1].double() + norm[0].double()
            key = torch.zeros_like(key).scatter(-1, norm[2].long().expand_as(key), key)
            held = torch.cat([key, value], dim=-1)
        return ids, held

    def put_dense(self, kv: torch.Tensor) -> torch.Tensor:
        """Write tokens to dense blocks; returns the blocks."""
        ids = torch.tensor([self.blocks.pop() for _ in range(-(-len(kv) // BLOCK_SIZE))])
        slots = (ids.long()[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[: len(kv)]
        store_kv(*kv.chunk(2, dim=-1), self.kv_cache, slots)
        return ids.int()


def num_blocks_of(shape: tuple[Row, ...], geometry: PageGeometry) -> int:
    """Blocks that rows of the given shape take at most, and one that nobody uses."""
    pages = [geometry.max_pages_per_layer(row.kept + row.rest) for row in shape]
    tails = [row.tail // BLOCK_SIZE + row.head // BLOCK_SIZE + 1 for row in shape]
    # Kept tokens and the rest are in blocks of their own.
    return sum(geometry.num_blocks(n) + 1 for n in pages) + sum(tails) + 1


def make_case(
    geometry: PageGeometry,
    dtype: torch.dtype,
    shape: tuple[Row, ...],
    normalised: bool = False,
    first_block: int = 0,
) -> Case:
    """Rows of the given shape; slots are permuted, unused table entries lead to NaN."""
    seed(len(shape))
    memory = Memory(geometry, dtype, max(200, num_blocks_of(shape, geometry)), first_block)
    num_rows, heads = len(shape), (geometry.num_kv_heads, geometry.head_size)
    longest = max(sum(counts) for counts in shape)
    width = max(600, geometry.max_pages_per_layer(longest))
    page_table = torch.full((num_rows, width), memory.unused * geometry.pages_per_block).int()
    block_table = torch.full((num_rows, max(250, longest // BLOCK_SIZE + 2)), memory.unused).int()
    norms = torch.stack(plain_norm(*heads)).repeat(num_rows, 1, 1, 1)
    if normalised:
        order = torch.rand(num_rows, *heads).argsort(-1)
        norms = torch.stack([torch.randn(order.shape), torch.rand(order.shape) + 0.5, order], dim=1)
        norms = norms.half()
    slots, starts, truth = torch.randperm(num_rows), [], []
    for row, counts in enumerate(shape):
        slot = int(slots[row])
        kv = torch.randn(sum(counts), heads[0], 2 * heads[1]).to(dtype)
        kept, rest, tail, head = kv.split(list(counts))
        kept_ids, kept = memory.put_pages(kept, geometry.high_bits, norms[slot])
        rest_ids, rest = memory.put_pages(rest, geometry.low_bits, norms[slot])
        page_table[slot, : len(kept_ids)] = kept_ids
        page_table[slot, width - len(rest_ids) :] = rest_ids.flip(0)
        starts.append(-(-(counts.head + counts.kept + counts.rest) // BLOCK_SIZE) * BLOCK_SIZE)
        for part, first in ((head, 0), (tail, starts[-1] // BLOCK_SIZE)):
            blocks = memory.put_dense(part)
            block_table[row, first : first + len(blocks)] = blocks
        truth.append(torch.cat([kept, rest, tail.double(), head.double()]))
    page_counts = torch.zeros(num_rows, 2, dtype=torch.int32)
    for row, counts in enumerate(shape):
        rest = counts.rest if geometry.low_bits else 0
        page_counts[slots[row]] = torch.tensor([counts.kept, rest]).int()
    context = CachedContext(
        memory.kv_cache, memory.heap, page_table, page_counts, block_table, geometry, norms
    )
    lengths = torch.tensor(starts) + torch.tensor([counts.tail for counts in shape])
    heads_in_rows = torch.tensor([counts.head for counts in shape])
    rows = (slots, torch.arange(num_rows), heads_in_rows, torch.tensor(starts), lengths)
    return Case(context, DecodeRows(*(column.int() for column in rows)), truth)


def eager(query: torch.Tensor, kv: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log denominator of one query in fp64."""
    num_kv_heads, head_size = kv.shape[1], kv.shape[2] // 2
    q = query.double().view(num_kv_heads, -1, head_size) * scale
    key, value = kv.permute(1, 0, 2).chunk(2, dim=-1)
    scores = q @ key.transpose(1, 2)
    return (scores.softmax(-1) @ value).flatten(0, 1), scores.logsumexp(-1).flatten()


def eager_on_codes(
    query: torch.Tensor, kv: torch.Tensor, norm: torch.Tensor, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `eager` in float32, with the sums that codes need: normalised, rotated, zeros apart.

    What the codes are multiplied by is rounded to `dtype` first.
    """
    num_kv_heads, head_size = kv.shape[1], kv.shape[2] // 2
    plain_q = query.float().view(num_kv_heads, -1, head_size) * scale
    mean, std, order = norm[:, :, None]
    plain_q = plain_q.gather(-1, order.long().expand_as(plain_q))
    whole_q = rotate(plain_q * std)
    q = whole_q.to(dtype).float()
    key, value = kv.float().permute(1, 0, 2).chunk(2, dim=-1)
    key = rotate((key.gather(-1, order.long().expand_as(key)) - mean) / std)
    value = rotate(value)
    key_zero = key.unflatten(-1, (2, -1)).amin(-1, keepdim=True).expand(*key.shape[:2], 2, -1)
    value_zero = value.amin(-1, keepdim=True)
    codes = (key.unflatten(-1, (2, -1)) - key_zero).flatten(-2)
    scores = q @ codes.transpose(1, 2)
    halves = whole_q.unflatten(-1, (2, -1)).sum(-1)
    scores = scores + halves @ key_zero[..., 0].transpose(1, 2)
    scores = scores + (plain_q * mean).sum(-1, keepdim=True)
    weights = scores.softmax(-1).to(dtype).float()
    out = rotate(weights @ (value - value_zero) + weights @ value_zero)
    return out.flatten(0, 1), scores.logsumexp(-1).flatten()


def check(
    num_heads: int,
    geometry: PageGeometry,
    dtype: torch.dtype,
    shape: tuple[Row, ...],
    normalised: bool = False,
    first_block: int = 0,
) -> None:
    case = make_case(geometry, dtype, shape, normalised, first_block)
    query = torch.randn(len(shape), num_heads, geometry.head_size).to(dtype)
    scale = geometry.head_size**-0.5
    out, oracle = (torch.full_like(query, torch.nan) for _ in range(2))
    lse = decode_attention(query, case.context, case.rows, scale, out)
    oracle_lse = reference.decode_attention(query, case.context, case.rows, scale, oracle)
    for i, kv in enumerate(case.truth_kv):
        truth, truth_lse = eager(query[i], kv, scale)
        product_dtype = dtype if IN_TRITON else torch.float32
        norm = case.context.key_norms[case.rows.slots[i]]
        same, same_lse = eager_on_codes(query[i], kv, norm, scale, product_dtype)
        rounding = torch.finfo(torch.float32).eps * kv.abs().max()
        budget = 4 * (same - truth).abs().max() + 4 * rounding
        budget = budget + torch.finfo(dtype).eps / 2 * truth.abs()
        budget_lse = 4 * (same_lse - truth_lse).abs().max() + 4 * rounding
        for result, result_lse in ((out[i], lse[i]), (oracle[i], oracle_lse[i])):
            assert ((result.double() - truth).abs() <= budget).all()
            assert ((result_lse.double() - truth_lse).abs() <= budget_lse).all()


@pytest.mark.parametrize("bits", PAIRS, ids=str)
def test_all_bit_pairs(bits: tuple[int, int]) -> None:
    check(8, PageGeometry(NUM_LAYERS, 2, 64, 2, BLOCK_SIZE, *bits), torch.bfloat16, ROWS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [(16, 0), (4, 2)], ids=str)
@pytest.mark.parametrize("head_size", [80] if INTERPRETED else [64, 80, 128])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_shapes_and_dtypes(
    heads: tuple[int, int], head_size: int, bits: tuple[int, int], dtype: torch.dtype
) -> None:
    geometry = PageGeometry(NUM_LAYERS, heads[1], head_size, dtype.itemsize, BLOCK_SIZE, *bits)
    check(heads[0], geometry, dtype, ROWS[:4] if heads == HEADS[-1] else ROWS[3:])


@pytest.mark.parametrize("group", GROUPS)
def test_group_sizes(group: int) -> None:
    check(2 * group, PageGeometry(NUM_LAYERS, 2, 64, 4, BLOCK_SIZE, 8, 4), torch.float32, ROWS[1:4])


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16] if INTERPRETED else DTYPES, ids=str
)
@pytest.mark.parametrize("bits", [(8, 4), (4, 2)], ids=str)
@pytest.mark.parametrize(("group", "head_size"), SIZES)
def test_head_sizes(group: int, head_size: int, bits: tuple[int, int], dtype: torch.dtype) -> None:
    geometry = PageGeometry(NUM_LAYERS, 1, head_size, dtype.itemsize, BLOCK_SIZE, *bits)
    check(group, geometry, dtype, (Row(40, 70, 20, 16), Row(16, 29, 3)), normalised=True)


@pytest.mark.parametrize("bits", [(4, 2), (16, 2), (8, 0)], ids=str)
def test_normalised_keys(bits: tuple[int, int]) -> None:
    geometry = PageGeometry(NUM_LAYERS, 2, 64, 2, BLOCK_SIZE, *bits)
    check(8, geometry, torch.bfloat16, ROWS, normalised=True)


@pytest.mark.parametrize("bits", [(4, 2), (16, 0)], ids=str)
def test_a_pool_of_more_elements_than_int32_counts(bits: tuple[int, int]) -> None:
    geometry = PageGeometry(NUM_LAYERS, 2, 64, 2, BLOCK_SIZE, *bits)
    first_block = 2**31 * torch.bfloat16.itemsize // geometry.block_bytes + 1
    check(8, geometry, torch.bfloat16, ROWS[1:3], first_block=first_block)


def test_long_context_of_one_row_is_split() -> None:
    geometry = PageGeometry(NUM_LAYERS, 1, 64, 4, BLOCK_SIZE, 4, 2)
    row = Row(100, 500, 70) if INTERPRETED else Row(1000, 2000, 300)
    check(4, geometry, torch.float32, (row,))


@numba_only
@pytest.mark.parametrize("bits", [(4, 2), (16, 0)], ids=str)
def test_splits_of_several_rows_and_heads(
    bits: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = own._shape
    forced = {"num_splits": 3, "heads_per_item": 2}
    monkeypatch.setattr(own, "_shape", lambda *args: original(*args)._replace(**forced))
    check(9, PageGeometry(NUM_LAYERS, 3, 64, 4, BLOCK_SIZE, *bits), torch.float32, ROWS[1:4])


@numba_only
def test_only_long_contexts_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry, original, shapes = (
        PageGeometry(NUM_LAYERS, 1, 64, 4, BLOCK_SIZE, 4, 2),
        own._shape,
        [],
    )
    monkeypatch.setattr(own, "_shape", lambda *args: shapes.append(original(*args)) or shapes[-1])
    for kept in (7, 1900, 2100):
        check(4, geometry, torch.float32, (Row(kept, 0, 20),))
    assert [shape.num_splits for shape in shapes] == [1, 1, 2]


@BOTH
def test_a_row_without_context_is_harmless(implementation: ModuleType) -> None:
    geometry = PageGeometry(NUM_LAYERS, 2, 64, 2, BLOCK_SIZE, 4, 2)
    case = make_case(geometry, torch.bfloat16, (Row(7, 9, 20),))
    case.context.page_counts.zero_()
    rows = case.rows._replace(context_lens=case.rows.tail_starts)
    out = torch.full((1, 4, 64), torch.nan).bfloat16()
    query = torch.randn(1, 4, 64).bfloat16()
    lse = implementation.decode_attention(query, case.context, rows, 1.0, out)
    assert not out.any()
    assert (lse == -torch.inf).all()


@BOTH
def test_no_rows(implementation: ModuleType) -> None:
    geometry = PageGeometry(NUM_LAYERS, 2, 64, 2, BLOCK_SIZE, 4, 2)
    case = make_case(geometry, torch.bfloat16, (Row(7, 9, 20),))
    rows, query = DecodeRows(*(column[:0] for column in case.rows)), torch.empty(0, 4, 64)
    lse = implementation.decode_attention(query, case.context, rows, 1.0, query)
    assert lse.shape == (0, 4)
    assert lse.dtype == torch.float32


@BOTH
def test_counts_of_evicted_tokens_are_ignored(implementation: ModuleType) -> None:
    geometry = PageGeometry(NUM_LAYERS, 2, 64, 2, BLOCK_SIZE, 4, 0)
    case = make_case(geometry, torch.bfloat16, (Row(7, 9, 20),))
    query = torch.randn(1, 4, 64).bfloat16()
    out, same = torch.empty_like(query), torch.empty_like(query)
    implementation.decode_attention(query, case.context, case.rows, 0.1, out)
    case.context.page_counts[:, 1] = 9
    implementation.decode_attention(query, case.context, case.rows, 0.1, same)
    assert torch.equal(same, out)


@BOTH
@pytest.mark.parametrize("token", [0, 20, 39])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_a_key_that_is_not_finite_shows(
    value: float, token: int, implementation: ModuleType
) -> None:
    geometry = PageGeometry(NUM_LAYERS, 1, 64, 4, BLOCK_SIZE, 4, 2)
    case = make_case(geometry, torch.float32, (Row(7, 9, 40),))
    block = case.context.block_table[0, 1 + token // BLOCK_SIZE]
    case.context.kv_cache[block, 0, token % BLOCK_SIZE, 3] = value
    query = torch.rand(1, 4, 64)
    out = torch.zeros_like(query)
    lse = implementation.decode_attention(query, case.context, case.rows, 0.1, out)
    assert out.isnan().all()
    assert not lse.isfinite().any()
    assert not (lse == -torch.inf).any()


@BOTH
@pytest.mark.parametrize("bits", [(4, 2), (16, 0)], ids=str)
def test_a_query_that_is_nan_shows(bits: tuple[int, int], implementation: ModuleType) -> None:
    geometry = PageGeometry(NUM_LAYERS, 1, 64, 4, BLOCK_SIZE, *bits)
    case = make_case(geometry, torch.float32, (Row(7, 9, 40),))
    query = torch.rand(1, 4, 64)
    query[0, 1, 5] = torch.nan
    out = torch.zeros_like(query)
    lse = implementation.decode_attention(query, case.context, case.rows, 0.1, out)
    assert out[0].isnan().all(dim=1).tolist() == [False, True, False, False]
    assert lse[0].isnan().tolist() == [False, True, False, False]


def test_heads_must_share_kv_heads_evenly() -> None:
    geometry = PageGeometry(NUM_LAYERS, 2, 64, 2, BLOCK_SIZE, 4, 2)
    case = make_case(geometry, torch.bfloat16, (Row(7, 9, 20),))
    query = torch.randn(1, 3, 64).bfloat16()
    with pytest.raises(ValueError, match="num_heads 3 must be a multiple of num_kv_heads 2"):
        decode_attention(query, case.context, case.rows, 1.0, torch.empty_like(query))


def test_rows_do_not_touch_each_other() -> None:
    geometry = PageGeometry(NUM_LAYERS, 2, 64, 2, BLOCK_SIZE, 4, 2)
    case = make_case(geometry, torch.bfloat16, ROWS)
    query = torch.randn(len(ROWS), 8, 64).bfloat16()
    order = torch.tensor([3, 0, 6, 2, 7, 5, 1, 4])
    out, shuffled = torch.empty_like(query), torch.empty_like(query)
    decode_attention(query, case.context, case.rows, 0.1, out)
    rows = DecodeRows(*(column[order] for column in case.rows))
    decode_attention(query[order], case.context, rows, 0.1, shuffled)
    assert torch.equal(shuffled, out[order])


WITHOUT_AVX512 = """
import sys
from numba.core.registry import cpu_target
from vllm_zipvl.ops.decode_attention.cpu_vectors import HAS_LOOKUP

assert "+avx512f" not in cpu_target.target_context.codegen().magic_tuple()[2]
assert not HAS_LOOKUP
if sys.argv[1:]:
    import pytest
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def run_without_avx512(environment: dict[str, str], *arguments: str) -> None:
    command = [sys.executable, "-c", WITHOUT_AVX512, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@numba_only
def test_a_machine_without_avx512(tmp_path: Path) -> None:
    """The same kernels compiled for another machine; its name alone keeps this one's features."""
    features = "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse4.2"
    haswell = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
    cached = {"NUMBA_CACHE_DIR": str(tmp_path)}
    run_without_avx512(haswell | cached, f"{__file__}::test_all_bit_pairs")


@numba_only
def test_the_lookup_heeds_what_numba_leaves_out() -> None:
    run_without_avx512({"NUMBA_ENABLE_AVX": "0"})


@pytest.mark.skipif(not IN_TRITON, reason="the kernels on a CPU work in the process's own memory")
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_call_takes_no_more_than_it_says(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = PageGeometry(NUM_LAYERS, 2, 64, 2, BLOCK_SIZE, 4, 2)
    case = make_case(geometry, torch.bfloat16, ROWS[:num_rows])
    query = torch.randn(num_rows, 6, 64).bfloat16()
    out, taken = torch.empty_like(query), []
    empty = torch.empty

    def noting_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        taken.append(empty(*args, **kwargs))
        return taken[-1]

    monkeypatch.setattr(torch, "empty", noting_empty)
    decode_attention(query, case.context, case.rows, 0.1, out)
    assert taken
    used = sum(x.numel() * x.element_size() for x in taken)
    assert used <= workspace_bytes(num_rows, 6, 2, 64, query.device)
