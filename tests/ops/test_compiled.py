"""The Triton kernels compile for GPUs, of which this machine needs none; what they use there.

The API's own calls are made on tensors of the CPU, and every launch is a compilation instead, so
that types, alignments and constants are those of real calls.
"""

import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels import IN_TRITON
from test_decode_attention import ROWS, make_case

from vllm_zipvl.core.geometry import PageGeometry
from vllm_zipvl.core.quantization import plain_norm
from vllm_zipvl.core.sequences import Chunks, Sequences
from vllm_zipvl.core.transfer import table_to_device
from vllm_zipvl.ops.page_codec import PageTables
from vllm_zipvl.ops.probe_scores import ProbePlaces

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(IN_TRITON, reason="the kernels run here, in the other tests")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.driver import DriverBase  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""What a block may use, by compute capability (CUDA programming guide)."""

STACK_BYTES = 64
"""A thread, sixteen registers: what spills beyond that is a kernel that does not fit."""


CPU = torch.device("cpu")


def one(num_tokens: int) -> Sequences:
    return Sequences([num_tokens], CPU)


class AbsentGPU(DriverBase):
    """Says which GPU to compile for; there is none to launch on."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return False

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """One for each capability, since kernels are compiled once for a device."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


@pytest.fixture(params=SHARED_BYTES, ids=lambda capability: f"sm{capability}")
def compiled(request, monkeypatch) -> list[Any]:
    """The kernels that a test's calls compiled."""
    found = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(kernel)
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    before = driver._active
    driver.set_active(AbsentGPU(request.param))
    yield found
    driver._active = before


def stack_bytes(kernel: Any, tmp_path: Path) -> int:
    """Of local memory a thread: what did not fit into registers."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    return max(int(part.split(":")[1]) for part in text.split() if part.startswith("STACK:"))


def check(compiled: list[Any], num_kernels: int, tmp_path: Path) -> None:
    assert len(compiled) == num_kernels
    for kernel in compiled:
        capability = kernel.metadata.target.arch
        assert kernel.metadata.shared <= SHARED_BYTES[capability]
        assert stack_bytes(kernel, tmp_path) <= STACK_BYTES, kernel.metadata.name


def test_probe_scores(compiled, tmp_path) -> None:
    from vllm_zipvl.ops.probe_scores.triton import probe_scores

    queries, keys = torch.zeros(128, 28, 128), torch.zeros(256, 4, 256)[..., :128]
    places = ProbePlaces(torch.arange(128), torch.arange(128) < 64, one(128))
    probe_scores(queries.bfloat16(), places, keys.bfloat16(), one(256), 0.1, 64, 4)
    check(compiled, 2, tmp_path)


@pytest.mark.parametrize("head_size", [128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_prefill_attention(compiled, dtype, head_size, tmp_path) -> None:
    from vllm_zipvl.ops.near_attention.triton import near_attention
    from vllm_zipvl.ops.prefill_attention.triton import attend_among_kept, prefill_attention

    query, kv = (torch.zeros(256, heads, head_size, dtype=dtype) for heads in (28, 4))
    chunks, kept = Chunks([200, 56], [200, 56], CPU), torch.ones(256, dtype=torch.bool)
    prefill_attention(query, kv, kv, chunks, 0.1)
    among_kept = attend_among_kept(query, kv, kv, kept, chunks, 0.1)
    near_attention(query, kv, kv, kept, among_kept, chunks, 0.1, 64, 4)
    check(compiled, 3, tmp_path)
    if dtype is torch.bfloat16:
        assert all(
            "wgmma" in kernel.asm["ptx"] or "mma.sync" in kernel.asm["ptx"] for kernel in compiled
        )


def test_dense_blocks(compiled, tmp_path) -> None:
    from vllm_zipvl.ops.dense_blocks.triton import gather_kv, store_kv

    kv_cache = torch.zeros(8, 4, 16, 256).bfloat16()
    key, value = torch.zeros(2, 64, 4, 128).bfloat16()
    store_kv(key, value, kv_cache, torch.arange(64))
    gather_kv(kv_cache, torch.arange(8).int()[None], one(80))
    check(compiled, 2, tmp_path)


@pytest.mark.parametrize("bits", [16, 8, 4, 2])
def test_page_codec(compiled, bits, tmp_path) -> None:
    from vllm_zipvl.ops.page_codec.triton import write_pages

    geometry = PageGeometry(2, 4, 128, 2, 16, 4, 2)
    heap = torch.zeros(64, geometry.page_bytes, dtype=torch.uint8)
    norm = plain_norm(4, 128)
    kv = torch.zeros(64, 4, 256).bfloat16()
    write_pages(kv, heap, torch.arange(64).int(), 0, bits, geometry, norm)
    check(compiled, 1, tmp_path)


def test_page_codec_of_all_layers(compiled, tmp_path) -> None:
    from vllm_zipvl.ops.page_codec.triton import write_tokens

    geometry = PageGeometry(2, 4, 128, 2, 16, 4, 2)
    heap = torch.zeros(64, geometry.page_bytes, dtype=torch.uint8)
    caches = list(torch.zeros(2, 8, 4, 16, 256).bfloat16())
    pages, before = torch.zeros(2, 3, 32).int(), torch.zeros(2, 1, 2).int()
    norms = torch.zeros(2, 3, 3, 4, 128).half()
    tables = PageTables(heap, pages, torch.tensor([1]), before, norms, geometry)
    kept = torch.zeros(2, 64, dtype=torch.bool)
    write_tokens(caches, torch.arange(4)[None], one(64), kept, tables, [True])
    check(compiled, 3, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tail_scores(compiled, dtype, tmp_path) -> None:
    from vllm_zipvl.ops.tail_scores.triton import tail_scores

    caches = list(torch.zeros(2, 8, 4, 16, 256).to(dtype))
    queries, lse = torch.zeros(2, 1, 28, 128).to(dtype), torch.zeros(2, 1, 28)
    tail_scores(queries, lse, caches, torch.arange(4)[None], one(64), 0.1)
    check(compiled, 1, tmp_path)


def test_what_the_gpu_suite_notes_of_kernels(compiled) -> None:
    """Registers are known where a kernel is loaded."""
    from gpu_compile import noted

    from vllm_zipvl.ops.dense_blocks.triton import gather_kv, store_kv

    kv_cache, key = torch.zeros(8, 4, 16, 256).bfloat16(), torch.zeros(64, 4, 128).bfloat16()
    with noted() as found:
        for _ in range(2):
            store_kv(key, key, kv_cache, torch.arange(64))
        gather_kv(kv_cache, torch.arange(8).int()[None], one(80))
    assert [kernel.name for kernel in found.values()] == ["_store", "_gather"]
    assert {(kernel.num_warps, kernel.registers) for kernel in found.values()} == {(4, None)}
    assert len(compiled) == 3


def test_sizes_of_steps_share_one_kernel(compiled) -> None:
    """So that nothing is compiled while requests wait but what start-up has compiled."""
    from vllm_zipvl.ops.decode_attention.triton import decode_attention
    from vllm_zipvl.ops.dense_blocks.triton import gather_kv
    from vllm_zipvl.ops.near_attention.triton import near_attention
    from vllm_zipvl.ops.page_codec.triton import write_tokens
    from vllm_zipvl.ops.prefill_attention.triton import attend_among_kept, prefill_attention
    from vllm_zipvl.ops.probe_scores.triton import probe_scores
    from vllm_zipvl.ops.tail_scores.triton import tail_scores

    geometry = PageGeometry(2, 4, 128, 2, 16, 4, 2)
    heap = torch.zeros(64, geometry.page_bytes, dtype=torch.uint8)
    caches = list(torch.zeros(2, 40, 4, 16, 256).bfloat16())
    pages, norms = torch.zeros(2, 9, 32).int(), torch.zeros(2, 9, 3, 4, 128).half()
    for lengths in ([1], [16], [17, 5, 300], [64] * 8):
        sequences = Sequences(lengths, CPU)
        num_rows, num_tokens = len(lengths), sequences.num_tokens
        query, kv = torch.zeros(num_tokens, 28, 128).bfloat16(), caches[0].new_zeros(1)
        kv = kv.expand(num_tokens, 4, 128).contiguous()
        table = table_to_device([[0] * -(-length // 16) for length in lengths], CPU)
        # Rows of vLLM's table, from an uneven one on.
        rows = torch.zeros(num_rows + 1, 19).int()[1:]
        for blocks in (table, rows):
            gather_kv(caches[0], blocks, sequences)
        places = ProbePlaces(sequences.positions, sequences.positions < 3, sequences)
        probe_scores(query, places, kv, sequences, 0.1, 64, 4)
        chunks, kept = Chunks(lengths, lengths, CPU), torch.ones(num_tokens, dtype=torch.bool)
        prefill_attention(query, kv, kv, chunks, 0.1)
        among_kept = attend_among_kept(query, kv, kv, kept, chunks, 0.1)
        # FlashAttention gives the sums of a head beside each other.
        turned = among_kept._replace(lse=among_kept.lse.t().contiguous().t())
        for packed in (among_kept, turned):
            near_attention(query, kv, kv, kept, packed, chunks, 0.1, 64, 4)
        queries, lse = torch.zeros(2, num_rows, 28, 128).bfloat16(), torch.zeros(2, num_rows, 28)
        tail_scores(queries, lse, caches, table, sequences, 0.1)
        slots, before = torch.arange(num_rows), torch.zeros(2, num_rows, 2).int()
        tables = PageTables(heap, pages, slots, before, norms, geometry)
        kept = torch.zeros(2, num_tokens, dtype=torch.bool)
        write_tokens(caches, table, sequences, kept, tables, [True] * num_rows)
    for num_rows in (1, 2):
        for width in (1, 16, 17):
            case = make_case(geometry, torch.bfloat16, ROWS[:num_rows])
            table = case.context.block_table[:, :1].repeat(1, width)
            query = torch.zeros(num_rows, 28, 128).bfloat16()
            for layer in range(2):
                # Tables of a layer among several, with an uneven number of slots.
                counts = torch.zeros(2, 5, 2).int()[layer]
                pages = torch.zeros(2, 5, 33).int()[layer]
                context = case.context._replace(
                    block_table=table[:, :width], page_counts=counts, page_table=pages
                )
                decode_attention(query, context, case.rows, 0.1, torch.empty_like(query))
    names = Counter(name for name, _ in {(k.metadata.name, k.hash) for k in compiled})
    assert names.pop("_encode") == 2, "one of each precision"
    assert names.pop("_attend") == 3, "two of prefill, one of decode"
    assert set(names.values()) == {1}, names


@pytest.mark.parametrize(
    ("bits", "heads"),
    [((4, 2), (28, 4)), ((8, 4), (28, 4)), ((16, 0), (32, 32)), ((4, 2), (64, 4))],
    ids=str,
)
def test_decode_attention(compiled, bits, heads, tmp_path) -> None:
    from vllm_zipvl.ops.decode_attention.triton import decode_attention

    geometry = PageGeometry(2, heads[1], 128, 2, 16, *bits)
    case = make_case(geometry, torch.bfloat16, ROWS[:2])
    query = torch.zeros(2, heads[0], 128).bfloat16()
    decode_attention(query, case.context, case.rows, 0.1, torch.empty_like(query))
    check(compiled, 3, tmp_path)
    # What is 8 KiB is codes on their way to other threads, since an operand of a tile is as large.
    queries = 128 * max(8, heads[0] // heads[1]) * 2
    assert compiled[1].metadata.shared < queries + 32 * 128 * 2
