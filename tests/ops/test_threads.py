"""Every parallel kernel takes as many threads as torch."""

import numba
import pytest
import torch
from kernels import numba_only

from vllm_zipvl.core.geometry import PageGeometry
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.ops.decode_attention import CachedContext, DecodeRows, decode_attention
from vllm_zipvl.ops.dense_blocks import gather_kv, store_kv
from vllm_zipvl.ops.page_codec import write_pages
from vllm_zipvl.ops.threads import match_num_threads, torchs_openmp

pytestmark = numba_only
GEOMETRY = PageGeometry(1, 1, 64, 4, 16, 4, 2)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says one thread; an engine of this process may have made setting it do nothing."""
    match_num_threads()
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def decode() -> None:
    cache, zero = torch.zeros(1, 1, 16, 128), torch.zeros(1, dtype=torch.int32)
    heap = cache.view(torch.uint8).view(-1, GEOMETRY.page_bytes)
    counts, norms = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 2, 1, 64).half()
    context = CachedContext(cache, heap, zero[None], counts, zero[None], GEOMETRY, norms)
    decode_attention(
        torch.zeros(1, 1, 64), context, DecodeRows(*[zero] * 5), 1.0, torch.empty(1, 1, 64)
    )


def store() -> None:
    kv = torch.zeros(1, 1, 64)
    store_kv(kv, kv, torch.zeros(1, 1, 16, 128), torch.tensor([0]))


def gather() -> None:
    gather_kv(torch.zeros(1, 1, 16, 128), torch.tensor([[0]]), Sequences([1], torch.device("cpu")))


def write() -> None:
    heap = torch.zeros(1, GEOMETRY.page_bytes, dtype=torch.uint8)
    write_pages(torch.zeros(1, 1, 128), heap, torch.tensor([0]), 0, 4, GEOMETRY)


@pytest.mark.parametrize("operation", [decode, store, gather, write])
def test_numba_takes_as_many_threads_as_torch(operation) -> None:  # type: ignore[no-untyped-def]
    operation()
    assert numba.get_num_threads() == 1


@pytest.mark.parametrize("operation", [decode, store, gather, write])
def test_regions_of_torch_do_not_nest(operation) -> None:  # type: ignore[no-untyped-def]
    """numba lets them; products within torch's flash attention would start threads of their own."""
    operation()
    openmp = torchs_openmp()
    assert openmp is not None and openmp.omp_get_nested() == 0
