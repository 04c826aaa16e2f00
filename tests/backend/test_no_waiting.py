"""What torch does on a GPU in every step asks it for nothing: here on tensors without values.

Whatever needs a value on the host (a count, a mask as an index) fails on the meta device by itself;
`NoWaiting` refuses what would wait on a GPU only. Kernels are not run.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_zipvl.backend.metadata import ZipVLMetadata
from vllm_zipvl.backend.tail import TailProbes
from vllm_zipvl.backend.worker import ZipVLWorker
from vllm_zipvl.cache import heap as heap_module
from vllm_zipvl.cache.heap import HeapTables, PageHeap
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import PageGeometry
from vllm_zipvl.core.transfer import to_device
from vllm_zipvl.ops.near_attention import api as near_api
from vllm_zipvl.ops.near_attention import triton as near_triton
from vllm_zipvl.ops.prefill_attention import flash_attn, sparse_prefill_attention
from vllm_zipvl.plan import ChunkPlan, CompressionPlan, StepPlan
from vllm_zipvl.rules import CacheRules

META = torch.device("meta")
NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 2, 4, 2, 32, 16
NUM_BLOCKS, NUM_SLOTS, MAX_LEN = 64, 4, 1024
SCALE = HEAD_SIZE**-0.5


def make_worker(config: ZipVLConfig) -> ZipVLWorker:
    bits = (config.high_bits, config.low_bits)
    geometry = PageGeometry(NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE, 4, BLOCK_SIZE, *bits)
    worker = ZipVLWorker(CacheRules(config, geometry), lambda mass: mass, MAX_LEN)
    heads = (NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    blocks = torch.empty(NUM_BLOCKS, NUM_LAYERS, *heads, device=META)
    tables = HeapTables(geometry, NUM_SLOTS + 1, MAX_LEN, META)
    shape = (NUM_LAYERS, NUM_SLOTS + 1, NUM_HEADS, HEAD_SIZE)
    worker._tail_probes = TailProbes(shape, torch.float32, META)
    worker._kv_caches, worker._scale = list(blocks.unbind(1)), SCALE
    memory = torch.empty(
        NUM_BLOCKS * geometry.pages_per_block, geometry.page_bytes, dtype=torch.uint8, device=META
    )
    worker.heap = PageHeap(memory, geometry, tables)
    worker.slot_of_block = torch.empty(NUM_BLOCKS, dtype=torch.int32, device=META)
    return worker


COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class NoWaiting(TorchDispatchMode):
    """Refuses what takes tensors of the host and of the device, but for copies by `to_device`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if func in COPIES:
            target = kwargs.get("device") or args[0].device
            joins = {x.device.type for x in tensors} | {torch.device(target).type}
            converts = kwargs.get("dtype") not in (None, args[0].dtype)
            if len(joins) > 1 and (converts or not self._is_sent()):
                raise RuntimeError(f"{func} waits for a GPU")
        # A number in a tensor of the host's is passed to a kernel by value.
        elif len({x.device.type for x in tensors if x.dim() or x.is_meta}) > 1:
            raise RuntimeError(f"{func} waits for a GPU")
        return func(*args, **kwargs)

    def _is_sent(self) -> bool:
        frame = inspect.currentframe()
        while frame is not None and frame.f_code is not to_device.__code__:
            frame = frame.f_back
        return frame is not None


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    with NoWaiting():
        yield


def varlen(query: torch.Tensor, *args: Any, wants_lse: bool = False, **kwargs: Any) -> Any:
    out = torch.empty_like(query)
    return (out, out.new_empty(query.shape[1::-1]).float()) if wants_lse else out


class Unlaunched:
    """A Triton kernel on tensors without values."""

    def __getitem__(self, grid: tuple[int, ...]) -> "Unlaunched":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """In the place of kernels, what leaves no trace but that it was called."""
    written: list[torch.Tensor] = []
    found = flash_attn.VarlenAttention(varlen, 3, "wants_lse")
    monkeypatch.setattr(flash_attn, "find_varlen", lambda: found)
    monkeypatch.setattr(flash_attn, "why_not", lambda *what: None)
    monkeypatch.setattr(near_triton, "_attend_near", Unlaunched())
    monkeypatch.setattr(near_api, "triton_module", lambda *what: near_triton)
    monkeypatch.setattr(heap_module, "write_tokens", lambda *args: written.append(args[3]))
    return written


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"low_bits": 2},
        {"low_bits": 2, "ratio": 0.3},
        {"low_bits": 2, "tau": 1.0},
        {"low_bits": 2, "max_kept": 0.4},
        {"low_bits": 0},
    ],
    ids=str,
)
def test_a_step_with_prompts_decodes_and_compressions(
    settings: dict[str, Any], kernels: list[torch.Tensor]
) -> None:
    worker = make_worker(ZipVLConfig(min_tokens=80, probe_recent=16, probe_random=16, **settings))
    chunks = [
        ChunkPlan("a", 0, 1, 0, 100, True, False),
        ChunkPlan("b", 1, 2, 96, 200, True, False),
        ChunkPlan("c", 2, 3, 0, 70, True, False),
    ]
    plan = StepPlan([0, 1, 2], {1: 0, 2: 1, 3: 2, 4: 3}, chunks)
    worker.begin_step(plan)
    worker.note_rows(["d", "a", "b", "c"])
    lengths = [1, 100, 104, 70]
    metadata = ZipVLMetadata(
        query_starts=np.cumsum([0, *lengths], dtype=np.int32),
        seq_lens=torch.empty(4, dtype=torch.int32, device=META),
        block_table=torch.empty(4, MAX_LEN // BLOCK_SIZE, dtype=torch.int32, device=META),
        num_tokens=sum(lengths),
        max_queries=max(lengths),
    )
    batch = metadata.resolve(worker, BLOCK_SIZE)
    assert batch.decodes is not None
    # With tau 1 none of them attends sparsely.
    num_chunks = [3] if settings.get("tau") == 1 else [2, 1]
    assert [len(rows.batch.chunks) for rows in batch.prompts] == num_chunks
    for rows in batch.prompts:
        chunks_of_kind = rows.batch.rows
        query = torch.empty(chunks_of_kind.queries.num_tokens, NUM_HEADS, HEAD_SIZE, device=META)
        key = torch.empty(chunks_of_kind.contexts.num_tokens, NUM_KV_HEADS, HEAD_SIZE, device=META)
        for layer in range(NUM_LAYERS):
            kept = worker.prompts.select(layer, rows.batch, query, key, SCALE)
            if kept is not None:
                sparse_prefill_attention(
                    query, key, key, kept, SCALE, 64, 4, "flash_attn", chunks_of_kind
                )
    worker.compress_planned()
    worker.end_step()

    ends = {0: (96, 100), 1: (192, 200), 2: (48, 70)}
    blocks = list(range(16))
    plans = [
        CompressionPlan(
            slot, "r", slot, 16, end, context_len, True, [15], blocks, [5, 6, 7], 0, True
        )
        for slot, (end, context_len) in ends.items()
    ]
    plans.append(
        CompressionPlan(3, "d", 3, 64, 192, 200, False, [], list(range(8, 16)), [10], 4, False)
    )
    worker.begin_step(StepPlan(compressions=plans))
    worker.compress_planned()
    prompts, tail = kernels
    assert prompts.shape == (NUM_LAYERS, 96 + 192 + 48 - 3 * 16)
    assert tail.shape == (NUM_LAYERS, 128)
    assert [x._figures.shape for x in worker._launched] == [(3, 3), (1, 3)]


def test_what_waits_is_refused() -> None:
    mask, numbers = torch.empty(3, dtype=torch.bool, device=META), torch.empty(3, device=META)
    places = torch.tensor([0, 2])
    for wait in (
        mask.nonzero,
        mask.tolist,
        mask.any().item,
        lambda: numbers[mask],
        lambda: numbers[places],
        lambda: numbers.index_copy_(0, places, torch.empty(2, device=META)),
        lambda: numbers.copy_(torch.zeros(3)),
        lambda: torch.zeros(3).to(META),
        lambda: numbers.to("cpu"),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()
    assert to_device([1, 2], META).is_meta
