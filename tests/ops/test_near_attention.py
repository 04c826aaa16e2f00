from types import ModuleType

import pytest
import torch
from kernels import DEVICE, IN_TRITON, name_of, seed
from test_prefill_attention import masked

from vllm_zipvl.core.neighbourhood import visible_pairs
from vllm_zipvl.core.sequences import Chunks
from vllm_zipvl.ops.lazy import triton_module
from vllm_zipvl.ops.near_attention import reference, torch_tiles
from vllm_zipvl.ops.prefill_attention import reference as among

kernel = triton_module("vllm_zipvl.ops.near_attention.triton", DEVICE) or torch_tiles
EACH = pytest.mark.parametrize("implementation", [kernel, reference], ids=name_of)


def run(
    implementation: ModuleType, lengths: list[tuple[int, int]], window: int, sinks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is found for chunks side by side, and what is exact."""
    seed(window + sinks)
    num_queries, num_tokens = zip(*lengths, strict=True)
    chunks = Chunks(num_queries, num_tokens, torch.device(DEVICE))
    query = torch.randn(sum(num_queries), 6, 32)
    key, value = torch.randn(2, sum(num_tokens), 2, 32)
    kept = torch.rand(sum(num_tokens)) < 0.4
    packed = among.attend_among_kept(query, key, value, kept, chunks, 0.2)
    found = implementation.near_attention(
        query, key, value, kept, packed, chunks, 0.2, window, sinks
    )
    exact = torch.empty(found.shape, dtype=torch.float64)
    for own, tokens in zip(chunks.queries.slices(), chunks.contexts.slices(), strict=True):
        n = tokens.stop - tokens.start
        positions = torch.arange(n - (own.stop - own.start), n)
        pairs = visible_pairs(positions, kept[tokens], window, sinks)
        parts = query[own], key[tokens], value[tokens]
        exact[own] = masked(*parts, pairs, 0.2, torch.float64, torch.float64)
    return found, exact


@EACH
@pytest.mark.parametrize(
    ("window", "sinks"), [(0, 0), (1, 0), (0, 3), (5, 2), (64, 4), (10**6, 0), (3, 10**6)]
)
def test_what_is_near_joins_what_is_kept(
    window: int, sinks: int, implementation: ModuleType
) -> None:
    """Whole prompts and later chunks; windows and sinks far beyond their ends."""
    found, exact = run(implementation, [(70, 70), (1, 1), (9, 100), (1, 33)], window, sinks)
    assert torch.allclose(found.double(), exact, atol=1e-5)


@pytest.mark.skipif(IN_TRITON, reason="about gathering in parts")
def test_queries_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_tiles, "MAX_PAIRS", 1)
    found, exact = run(torch_tiles, [(200, 200), (150, 190)], 20, 2)
    assert torch.allclose(found.double(), exact, atol=1e-5)
