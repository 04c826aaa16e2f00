"""What a layer holds from its start, and what it does while no step is planned."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_zipvl.backend import impl as impl_module
from vllm_zipvl.backend.impl import ZipVLAttentionImpl
from vllm_zipvl.backend.metadata import ZipVLMetadata
from vllm_zipvl.backend.worker import ZipVLWorker
from vllm_zipvl.cache.spec import rules_of_layers
from vllm_zipvl.ops.prefill_attention import api, reference
from vllm_zipvl.plan import ChunkPlan, StepPlan

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 2, 4, 2, 32
BLOCK_SIZE, NUM_BLOCKS, NUM_SLOTS = 16, 6, 3
NOBODY = NUM_SLOTS
SCALE = HEAD_SIZE**-0.5


class Engine:
    """Layers, and a worker that has their memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **zipvl: Any) -> None:
        config: Any = SimpleNamespace(
            additional_config={"zipvl": {"low_bits": 2, **zipvl}},
            scheduler_config=SimpleNamespace(max_num_seqs=NUM_SLOTS, max_num_batched_tokens=48),
            compilation_config=SimpleNamespace(static_forward_context={}),
            parallel_config=None,
            model_config=SimpleNamespace(
                dtype=torch.float32,
                max_model_len=64,
                original_max_model_len=64,
                get_num_layers=lambda parallel_config: NUM_LAYERS,
            ),
        )
        monkeypatch.setattr(impl_module, "get_current_vllm_config", lambda: config)
        self.layers = {}
        for i in range(NUM_LAYERS):
            layer = SimpleNamespace(layer_name=f"layers.{i}")
            layer.impl = ZipVLAttentionImpl(NUM_HEADS, HEAD_SIZE, SCALE, NUM_KV_HEADS)
            self.layers[layer.layer_name] = layer
            config.compilation_config.static_forward_context = self.layers
        shape = (NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE)
        rules = rules_of_layers(config, *shape, torch.float32)
        blocks = torch.randn(NUM_BLOCKS, NUM_LAYERS, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
        self.kv_caches = dict(zip(self.layers, blocks.unbind(1), strict=True))
        self.worker = ZipVLWorker(rules, lambda mass: mass, 64)
        self.probes = layer.impl.tail_probes
        self.worker.register(self.kv_caches, layer.impl.tables, self.probes, SCALE)
        monkeypatch.setattr(impl_module, "_worker", lambda: self.worker)

    def forward(self, num_queries: int, seq_lens: list[int]) -> torch.Tensor:
        """The second layer, rows of as many queries each, all of them in block 1."""
        starts = num_queries * np.arange(len(seq_lens) + 1, dtype=np.int32)
        table = torch.ones(len(seq_lens), 4, dtype=torch.int32)
        num_tokens = num_queries * len(seq_lens)
        lengths = torch.tensor(seq_lens, dtype=torch.int32)
        metadata = ZipVLMetadata(starts, lengths, table, num_tokens, num_queries)
        layer = self.layers["layers.1"]
        query = torch.randn(num_tokens, NUM_HEADS, HEAD_SIZE)
        key, value = torch.randn(2, num_tokens, NUM_KV_HEADS, HEAD_SIZE)
        out = torch.full_like(query, torch.nan)
        self.query = query
        kv_cache = self.kv_caches["layers.1"]
        return layer.impl.forward(layer, query, key, value, kv_cache, metadata, out)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(monkeypatch)


def test_layers_share_one_set_of_tables(engine: Engine) -> None:
    impls = [layer.impl for layer in engine.layers.values()]
    assert {id(impl.tables) for impl in impls} == {id(engine.worker.heap.tables)}
    assert {id(impl.tail_probes) for impl in impls} == {id(engine.probes)}
    assert engine.probes.queries.shape == (NUM_LAYERS, NUM_SLOTS + 1, NUM_HEADS, HEAD_SIZE)
    assert engine.worker.nobody == NOBODY
    assert engine.worker.heap.tables.page_counts.shape == (NUM_LAYERS, NUM_SLOTS + 1, 2)


def test_layers_of_different_scales_are_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match=f"a layer of softmax scale 0.5 beside one of {SCALE}"):
        ZipVLAttentionImpl(NUM_HEADS, HEAD_SIZE, 0.5, NUM_KV_HEADS)


def test_single_queries_between_steps_do_what_a_graph_captures(engine: Engine) -> None:
    engine.worker.begin_step(StepPlan())
    engine.worker.end_step()
    queries = engine.probes.queries
    queries[:, NOBODY] = torch.nan
    out = engine.forward(1, [64, 64])
    # Nobody's rows attend to nothing, and their queries are noted.
    assert not out.any()
    assert torch.equal(queries[1, NOBODY], engine.query[-1])
    assert queries[0, NOBODY].isnan().all()


@pytest.mark.parametrize("is_planned", [True, False])
def test_a_profiling_run_takes_the_memory_of_the_longest_prompt(
    is_planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(monkeypatch)
    if not is_planned:
        monkeypatch.setattr(impl_module, "_worker", lambda: None)
    layer = engine.layers["layers.1"]
    query, taken = torch.randn(8, NUM_HEADS, HEAD_SIZE), []
    query.new_empty = lambda size, dtype: taken.append(size * dtype.itemsize)
    out = torch.full_like(query, torch.nan)
    assert not layer.impl.forward(layer, query, query, query, out, None, out).any()
    context = 64 * NUM_KV_HEADS * 2 * HEAD_SIZE
    assert taken == ([] if is_planned else [4 * (2 * context + 3 * query.numel())])


def test_other_runs_between_steps_give_zeros(engine: Engine) -> None:
    assert not engine.forward(2, [16, 16]).any()
    assert not engine.probes.queries.any()


def test_a_new_request_also_empties_what_is_nobodys(engine: Engine) -> None:
    tables = engine.worker.heap.tables
    tables.page_counts.fill_(7)
    tables.compressed_lens.fill_(7)
    # As a sleep of level 2 leaves it.
    tables.key_norms.fill_(torch.nan)
    engine.worker.begin_step(StepPlan(new_slots=[1]))
    assert tables.compressed_lens.tolist() == [7, 0, 7, 0]
    assert not tables.page_counts[:, [1, NOBODY]].any()
    mean, scale, order = tables.key_norms[:, [1, NOBODY]].unbind(2)
    assert not mean.any() and (scale == 1).all()
    assert torch.equal(order, torch.arange(HEAD_SIZE).half().expand_as(order))


def test_prompts_attend_by_the_kernel_that_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def noting(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        return reference.prefill_attention(*arguments)

    mine = SimpleNamespace(prefill_attention=noting, why_not=lambda *what: None)
    monkeypatch.setitem(api._MODULES, "mine", mine)
    engine = Engine(monkeypatch)
    for layer in engine.layers.values():
        layer.impl.prefill_kernel = "mine"
    chunk = ChunkPlan("a", 0, 1, 0, 16, False, False)
    engine.worker.begin_step(StepPlan(new_slots=[0], slot_of_block={1: 0}, chunks=[chunk]))
    assert engine.forward(16, [16]).isfinite().all()
    assert len(calls) == 1
