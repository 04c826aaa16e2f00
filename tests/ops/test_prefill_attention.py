from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from kernels import DEVICE, IN_TRITON, INTERPRETED, name_of, numba_only, seed

from vllm_zipvl.core.neighbourhood import visible_pairs
from vllm_zipvl.core.sequences import Chunks
from vllm_zipvl.ops.lazy import triton_module
from vllm_zipvl.ops.prefill_attention import (
    cpu,
    find_kernel,
    flash_attn,
    prefill_attention,
    reference,
    sparse_prefill_attention,
)

if not IN_TRITON:
    import vllm._custom_ops  # noqa: F401  (loads the CPU kernel)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LONG = 200 if INTERPRETED else 1000
SHAPES = [(1, 1), (63, 63), (111, 111), (LONG, LONG), (1, 111), (63, LONG), (LONG - 63, LONG)]
SPARSE_SHAPES = [(1, 1), (63, 63), (20, 111), (1, 111), (LONG, LONG)]
kernel = triton_module("vllm_zipvl.ops.prefill_attention.triton", DEVICE) or cpu
LIBRARIES = [
    library for library in (flash_attn,) if library.why_not(DEVICE, torch.bfloat16, 64) is None
]
EACH = pytest.mark.parametrize("implementation", [kernel, reference, *LIBRARIES], ids=name_of)


def eager(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """Causal attention in `dtype`, weights rounded to `weight_dtype` before they meet V."""
    group = query.shape[1] // key.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, dim=1).transpose(0, 1) for x in (key, value))
    scores = query.to(dtype).transpose(0, 1) @ k.transpose(1, 2) * query.shape[-1] ** -0.5
    last = torch.arange(len(key) - len(query), len(key))
    hidden = torch.arange(len(key)) > last[:, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(weight_dtype).to(dtype)
    return (weights @ v).transpose(0, 1)


def check(
    implementation: ModuleType, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> None:
    dtype = query.dtype
    if implementation in LIBRARIES and (why := implementation.why_not(DEVICE, dtype, 64)):
        pytest.skip(why)
    out = prefill_attention(query, key, value, query.shape[-1] ** -0.5, name_of(implementation))
    assert out.dtype == dtype
    exact = eager(query, key, value, torch.float64, torch.float64)
    same = eager(query, key, value, torch.float32, dtype).to(dtype)
    eps = torch.finfo(dtype).eps * value.abs().max()
    assert (out.double() - exact).abs().max() <= 3 * (same - exact).abs().max() + eps


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(6, 2), (3, 3)] if INTERPRETED else [(28, 4), (8, 8)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(shape, heads, dtype, implementation) -> None:  # type: ignore[no-untyped-def]
    seed(sum(shape))
    query = torch.randn(shape[0], heads[0], 64).to(dtype)
    key, value = (torch.randn(shape[1], heads[1], 64).to(dtype) for _ in range(2))
    check(implementation, query, key, value)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
def test_slices_of_a_fused_projection(
    head_size: int, dtype: torch.dtype, implementation: ModuleType
) -> None:
    seed(head_size)
    fused = torch.randn(111, 8 + 2 * 2, head_size).to(dtype)
    query, key, value = fused.split([8, 2, 2], dim=1)
    check(implementation, query[-63:], key, value)


@EACH
@pytest.mark.parametrize("num_tokens", [0, 5])
def test_no_queries(num_tokens: int, implementation: ModuleType) -> None:
    kv = torch.randn(num_tokens, 2, 64)
    out = prefill_attention(torch.empty(0, 4, 64), kv, kv, 0.125, name_of(implementation))
    assert out.shape == (0, 4, 64)


NEIGHBOURHOODS = [(0, 0), (1, 0), (7, 2), (64, 4), (0, 20), (300, 3)]


def masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: torch.Tensor,
    scale: float, dtype: torch.dtype, weight_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """As `eager`, over the visible pairs; zeros where there is none."""
    group = query.shape[1] // key.shape[1]
    k, v = (x.to(dtype).repeat_interleave(group, dim=1).transpose(0, 1) for x in (key, value))
    scores = query.to(dtype).transpose(0, 1) @ k.transpose(1, 2) * scale
    weights = scores.masked_fill(~pairs, float("-inf")).softmax(-1).nan_to_num(0)
    return (weights.to(weight_dtype).to(dtype) @ v).transpose(0, 1)


def check_sparse(
    shape: tuple[int, int],
    dtype: torch.dtype,
    window: int,
    sinks: int,
    choice: str = "auto",
    heads: tuple[int, int] = (6, 2),
    head_size: int = 64,
) -> None:
    seed(sum(shape) + window)
    query, scale = torch.randn(shape[0], heads[0], head_size).to(dtype), head_size**-0.5
    key, value = torch.randn(2, shape[1], heads[1], head_size).to(dtype)
    positions = torch.arange(shape[1] - shape[0], shape[1])
    for share in (0.0, 0.4, 1.0):
        kept = torch.rand(shape[1]) < share
        kept[-1] = True
        pairs = visible_pairs(positions, kept, window, sinks)
        out = sparse_prefill_attention(query, key, value, kept, scale, window, sinks, choice)
        assert out.dtype == dtype
        assert not out[~pairs.any(-1)].any()
        exact = masked(query, key, value, pairs, scale, torch.float64, torch.float64)
        same = masked(query, key, value, pairs, scale, torch.float32, dtype).to(dtype)
        eps = torch.finfo(dtype).eps * value.abs().max()
        assert (out.double() - exact).abs().max() <= 3 * (same - exact).abs().max() + eps


SPARSE_CASES = [
    (shape, DTYPES[(i + j) % len(DTYPES)], *near)
    for i, shape in enumerate(SPARSE_SHAPES)
    for j, near in enumerate(NEIGHBOURHOODS)
]


@pytest.mark.parametrize(("shape", "dtype", "window", "sinks"), SPARSE_CASES, ids=str)
def test_kept_tokens_are_global_and_near_ones_local(
    shape: tuple[int, int], dtype: torch.dtype, window: int, sinks: int
) -> None:
    check_sparse(shape, dtype, window, sinks)


@pytest.mark.parametrize("library", LIBRARIES, ids=name_of)
@pytest.mark.parametrize("shape", SPARSE_SHAPES, ids=str)
def test_libraries_attend_among_kept_tokens(shape: tuple[int, int], library: ModuleType) -> None:
    check_sparse(shape, torch.bfloat16, 7, 2, name_of(library))


KERNELS = pytest.mark.parametrize("choice", ["auto", *map(name_of, LIBRARIES)])


@KERNELS
@pytest.mark.parametrize("is_sparse", [False, True])
def test_chunks_side_by_side_are_as_each_alone(is_sparse: bool, choice: str) -> None:
    """Whole prompts and later chunks, among them one query, and one of which nothing is kept."""
    seed(0)
    lengths = [(70, 70), (1, 1), (9, 100), (1, 33), (80, 150), (5, 40)]
    num_queries, num_tokens = zip(*lengths, strict=True)
    chunks = Chunks(num_queries, num_tokens, torch.device(DEVICE))
    query = torch.randn(sum(num_queries), 6, 64).bfloat16()
    key, value = torch.randn(2, sum(num_tokens), 2, 64).bfloat16()
    kept = torch.rand(sum(num_tokens)) < 0.4
    kept[-5:] = False
    if is_sparse:
        found = sparse_prefill_attention(query, key, value, kept, 0.125, 9, 2, choice, chunks)
    else:
        found = prefill_attention(query, key, value, 0.125, choice, chunks)
    for own, tokens in zip(chunks.queries.slices(), chunks.contexts.slices(), strict=True):
        q, k, v, mask = query[own], key[tokens], value[tokens], kept[tokens]
        if is_sparse:
            expected = sparse_prefill_attention(q, k, v, mask, 0.125, 9, 2, choice)
        else:
            expected = prefill_attention(q, k, v, 0.125, choice)
        # A library may cut contexts elsewhere when there are several.
        error = (found[own].float() - expected.float()).abs().max()
        assert error <= torch.finfo(query.dtype).eps * value.abs().max()


def varlen(  # type: ignore[no-untyped-def]
    query, key, value, *, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, wants_lse=False,
    **bounds,
) -> Any:  # fmt: skip
    """What FlashAttention does: rows that belong to no sequence are left as they were."""
    assert causal
    out, lse = torch.full_like(query, torch.nan), torch.full(query.shape[:2], torch.nan)
    for (first, m), (start, n) in zip(
        pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
    ):
        assert m - first <= bounds["max_seqlen_q"] and n - start <= bounds["max_seqlen_k"]
        own = query[first:m], key[start:n], value[start:n]
        out[first:m], lse[first:m] = reference.attend_one(*own, softmax_scale)
    return (out, lse.t().contiguous(), None) if wants_lse else out


@numba_only
@pytest.mark.parametrize("shape", SPARSE_SHAPES, ids=str)
def test_what_flash_attention_is_asked(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = flash_attn.VarlenAttention(varlen, None, "wants_lse")
    monkeypatch.setattr(flash_attn, "find_varlen", lambda: found)
    monkeypatch.setattr(flash_attn, "why_not", lambda *what: None)
    for window, sinks in NEIGHBOURHOODS:
        check_sparse(shape, torch.bfloat16, window, sinks, "flash_attn")
    query, key = torch.randn(shape[0], 6, 64), torch.randn(shape[1], 2, 64)
    expected = prefill_attention(query, key, key, 0.125, "reference")
    assert torch.equal(prefill_attention(query, key, key, 0.125, "flash_attn"), expected)
    for is_sparse in (False, True):
        test_chunks_side_by_side_are_as_each_alone(is_sparse, "flash_attn")


def test_no_query_is_kept() -> None:
    kv = torch.randn(9, 2, 64)
    kept = torch.arange(9) < 5
    assert not sparse_prefill_attention(torch.randn(3, 4, 64), kv, kv, kept, 0.125, 0, 0).any()


@numba_only
def test_what_the_kernel_lacks_uses_the_reference() -> None:
    assert find_kernel("auto", "cpu", torch.float32, 64) == "cpu"
    assert find_kernel("auto", "cpu", torch.float32, 48) == "reference"
    assert find_kernel("auto", "cpu", torch.float64, 64) == "reference"
    query, kv = torch.randn(5, 4, 48), torch.randn(2, 9, 2, 48)
    expected = prefill_attention(query, kv[0], kv[1], 0.2, "reference")
    assert torch.equal(prefill_attention(query, kv[0], kv[1], 0.2), expected)
    kept = torch.arange(9) % 2 == 0
    for dtype in (torch.float32, torch.float64):
        q, k, v = query.to(dtype), *kv.to(dtype)
        out = sparse_prefill_attention(q, k, v, kept, 0.2, 2, 1)
        pairs = visible_pairs(torch.arange(4, 9), kept, 2, 1)
        exact = masked(q, k, v, pairs, 0.2, torch.float64, torch.float64)
        assert torch.allclose(out.double(), exact, atol=1e-5)


@numba_only
def test_a_kernel_that_does_not_run_here_says_why() -> None:
    kv = torch.randn(5, 2, 64)
    for name, why in (
        ("flash_attn", "it runs on CUDA devices, not on cpu; choose auto"),
        ("triton", "Triton does not run on cpu; choose auto"),
    ):
        with pytest.raises(ValueError, match=f"{name} does not run here: {why}"):
            prefill_attention(kv, kv, kv, 1.0, name)


def test_heads_must_share_kv_heads_evenly() -> None:
    with pytest.raises(ValueError, match="num_heads 3 must be a multiple of num_kv_heads 2"):
        prefill_attention(torch.rand(1, 3, 64), torch.rand(2, 2, 64), torch.rand(2, 2, 64), 1.0)


def test_more_queries_than_keys() -> None:
    with pytest.raises(ValueError, match="3 queries cannot be the last of 2 keys"):
        prefill_attention(torch.rand(3, 1, 64), torch.rand(2, 1, 64), torch.rand(2, 1, 64), 1.0)
