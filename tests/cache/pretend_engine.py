"""vLLM's own scheduler over a pretend worker that remembers which token lies where.

The scheduler, its cache manager, our connector, planner and manager are the real ones. The
worker runs the plans in order, but writes identities instead of keys and values, and checks at
every read that the memory still holds what it needs: whatever was freed, overwritten or handed
out twice too early shows as a foreign identity.
"""

import copy
import json
import logging
import math
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from page_cursor import PageCursor
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_zipvl import compat
from vllm_zipvl.backend.messages import PlanMessage, ReportMessage
from vllm_zipvl.backend.planner import num_computed_tokens
from vllm_zipvl.cache.manager import HeapState, ZipVLManager
from vllm_zipvl.cache.registration import register_manager
from vllm_zipvl.cache.spec import ZipVLSpec
from vllm_zipvl.plan import (
    ChunkPlan,
    CompressionPlan,
    CompressionReport,
    StepPlan,
    StepReport,
)
from vllm_zipvl.rules import CacheRules

NUM_LAYERS = 3
MAX_MODEL_LEN = 208
PROBE_RECENT = 16
STOP_TOKEN = 1
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": MAX_MODEL_LEN,
}


@dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
        zipvl: Settings, as in `additional_config`.
        block_size: Tokens per block.
        spare_blocks: Blocks beyond what one request of `MAX_MODEL_LEN` needs.
        max_num_seqs: Requests that may run at once.
        is_async: Two steps in flight instead of one.
        is_v2: Model runner V2's way of resuming requests.
        report_lag: Steps by which a report misses the output of its own step.
        by_priority: The scheduling policy; then a request that has its blocks may be preempted
            in the same step.
        stop_every: One token in so many is a request's last; 0 for none.
    """

    zipvl: dict[str, Any] = field(default_factory=dict)
    block_size: int = 16
    spare_blocks: int = 0
    max_num_seqs: int = 4
    is_async: bool = False
    is_v2: bool = False
    report_lag: int = 0
    by_priority: bool = False
    stop_every: int = 97


class Base(NamedTuple):
    """What engines share because it is slow to make."""

    vllm_config: VllmConfig
    structured_output: StructuredOutputManager


def make_base(folder: Path) -> Base:
    register_manager()
    init_none_hash(sha256)
    (folder / "config.json").write_text(json.dumps(MODEL))
    config = VllmConfig(
        model_config=ModelConfig(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype="float16",
            max_model_len=MAX_MODEL_LEN,
        ),
        cache_config=CacheConfig(block_size=16, enable_prefix_caching=True),
        scheduler_config=SchedulerConfig(
            max_num_batched_tokens=4 * MAX_MODEL_LEN,
            max_num_seqs=8,
            max_model_len=MAX_MODEL_LEN,
            is_encoder_decoder=False,
        ),
        kv_transfer_config=KVTransferConfig(
            kv_connector=compat.CONNECTOR,
            kv_connector_module_path=compat.CONNECTOR_MODULE,
            kv_role="kv_producer",
        ),
    )
    return Base(config, StructuredOutputManager(config))


def make_scheduler(base: Base, case: Case) -> Scheduler:
    config = copy.copy(base.vllm_config)
    config.cache_config = copy.copy(config.cache_config)
    config.scheduler_config = copy.copy(config.scheduler_config)
    config.additional_config = {"zipvl": {"probe_recent": PROBE_RECENT, **case.zipvl}}
    config.scheduler_config.max_num_seqs = case.max_num_seqs
    config.scheduler_config.async_scheduling = case.is_async
    config.scheduler_config.policy = "priority" if case.by_priority else "fcfs"
    spec = ZipVLSpec(block_size=case.block_size, num_kv_heads=1, head_size=32, dtype=torch.float16)
    num_needed = spec.max_memory_usage_bytes(config) // spec.page_size_bytes
    num_blocks = 1 + num_needed + case.spare_blocks
    config.cache_config.block_size = case.block_size
    config.cache_config.num_gpu_blocks = num_blocks
    group = KVCacheGroupSpec([f"layers.{i}" for i in range(NUM_LAYERS)], spec)
    # One warning for each engine.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    scheduler_cls = AsyncScheduler if case.is_async else Scheduler
    scheduler = scheduler_cls(
        config,
        KVCacheConfig(num_blocks, kv_cache_tensors=[], kv_cache_groups=[group]),
        base.structured_output,
        case.block_size,
    )
    scheduler.use_v2_model_runner = case.is_v2
    return scheduler


class Memory:
    """What lies in each block: identities of tokens, in dense slots or in pages."""

    def __init__(self, rules: CacheRules) -> None:
        self.block_size = rules.geometry.block_size
        self.pages_per_block = rules.geometry.pages_per_block
        self._dense: dict[int, list[int | None]] = {}
        self._pages: dict[int, dict[int, list[int]]] = {}
        # Blocks whose keys and values owe something to sparse prefill or to compression.
        self.inexact: set[int] = set()
        # Those that owe something to sparse prefill.
        self.sparse: set[int] = set()

    def write_dense(self, block_id: int, offset: int, identity: int) -> None:
        self._pages.pop(block_id, None)
        self._dense.setdefault(block_id, [None] * self.block_size)[offset] = identity

    def read_dense(self, block_id: int) -> list[int | None]:
        return self._dense.get(block_id, [None] * self.block_size)

    def write_page(self, page_id: int, identities: list[int]) -> None:
        block_id = page_id // self.pages_per_block
        assert block_id != 0, "the null block is nobody's heap"
        self._dense.pop(block_id, None)
        self._pages.setdefault(block_id, {})[page_id] = list(identities)

    def read_page(self, page_id: int) -> list[int] | None:
        return self._pages.get(page_id // self.pages_per_block, {}).get(page_id)


@dataclass
class Sequence:
    """A request as the worker knows it; `identities[i]` stands for tokens [0, i]."""

    tokens: list[int]
    block_ids: list[int]
    identities: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for token in self.tokens:
            self._identify(token)

    def _identify(self, token: int) -> None:
        self.identities.append(hash((self.identities[-1] if self.identities else 0, token)))

    def sample(self, stop_every: int) -> int:
        """The same context always goes on in the same way."""
        identity = self.identities[-1]
        is_last = stop_every and identity % stop_every == 0
        token = STOP_TOKEN if is_last else 2 + identity % 7
        self.tokens.append(token)
        self._identify(token)
        return token


class Row(NamedTuple):
    """A scheduled request as the worker finds it; `chunk` if it computes prompt tokens."""

    request_id: str
    slot: int
    start: int
    end: int
    chunk: ChunkPlan | None


class Page(NamedTuple):
    page_id: int
    identities: list[int]


@dataclass
class Slot:
    """A slot's page tables: pages[layer][precision] in order."""

    owner: str
    compressed_len: int = 0
    num_pages: int = 0
    pages: list[tuple[list[Page], list[Page]]] = field(
        default_factory=lambda: [([], []) for _ in range(NUM_LAYERS)]
    )


class PretendWorker:
    """Runs plans in order on a `Memory`."""

    def __init__(self, rules: CacheRules, case: Case, seed: int) -> None:
        self.rules = rules
        self.memory = Memory(rules)
        self.requests: dict[str, Sequence] = {}
        self.slots: dict[int, Slot] = {}
        self.seen: Counter[str] = Counter()
        self._slot_of_block: dict[int, int] = {}
        self._num_slots = case.max_num_seqs
        self._stop_every = case.stop_every
        self._random = random.Random(seed)

    def execute(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        message = scheduler_output.kv_connector_metadata
        assert isinstance(message, PlanMessage)
        plan = message.plan
        self._update_requests(scheduler_output)
        rows = self._begin_step(plan, scheduler_output)
        for row in rows:
            self._write_row(row)
        for row in rows:
            self._read_row(row)
        sampled = []
        for row in rows:
            sequence = self.requests[row.request_id]
            is_last = row.end == len(sequence.tokens)
            assert row.chunk is None or row.chunk.ends_prompt == is_last
            sampled.append([sequence.sample(self._stop_every)] if is_last else [])
        report = StepReport({c.plan_id: self._compress(c) for c in plan.compressions})
        req_ids = [row.request_id for row in rows]
        return ModelRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(req_ids)},
            sampled_token_ids=sampled,
            kv_connector_output=KVConnectorOutput(kv_connector_worker_meta=ReportMessage(report)),
        )

    def _update_requests(self, scheduler_output: SchedulerOutput) -> None:
        for request_id in scheduler_output.finished_req_ids:
            self.requests.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            tokens = new.prefill_token_ids or new.prompt_token_ids
            self.requests[new.req_id] = Sequence(list(tokens), list(new.block_ids[0]))
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, block_ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            new_ids = list(block_ids[0]) if block_ids else []
            if request_id in cached.resumed_req_ids:
                tokens = list(cached.all_token_ids[request_id])
                self.requests[request_id] = Sequence(tokens, new_ids)
            else:
                self.requests[request_id].block_ids += new_ids

    def _begin_step(self, plan: StepPlan, scheduler_output: SchedulerOutput) -> list[Row]:
        """Reset the new slots; a row's last block must lead to its slot and to its chunk."""
        for slot in plan.new_slots:
            assert 0 <= slot < self._num_slots
            self.seen["slot reused"] += slot in self.slots
            self.slots.pop(slot, None)
        self._slot_of_block.update(plan.slot_of_block)
        chunk_of_block = {chunk.last_block_id: chunk for chunk in plan.chunks}
        rows = []
        for request_id, start in num_computed_tokens(scheduler_output):
            end = start + scheduler_output.num_scheduled_tokens[request_id]
            last_block_id = self.requests[request_id].block_ids[(end - 1) // self.block_size]
            slot = self._slot_of_block[last_block_id]
            chunk = chunk_of_block.pop(last_block_id, None)
            if chunk is not None:
                assert (chunk.request_id, chunk.slot) == (request_id, slot)
                assert (chunk.start, chunk.end) == (start, end)
            if slot not in self.slots:
                self._check_hit(request_id, start)
            self.slots.setdefault(slot, Slot(request_id))
            assert self.slots[slot].owner == request_id, "two owners of a slot"
            rows.append(Row(request_id, slot, start, end, chunk))
        assert not chunk_of_block, "a chunk of no scheduled request"
        assert len({row.slot for row in rows}) == len(rows), "a last block must identify its row"
        # The KV writes of earlier rows are seen by later ones that share them.
        order = list(scheduler_output.num_scheduled_tokens)
        return sorted(rows, key=lambda row: order.index(row.request_id))

    def _check_hit(self, request_id: str, num_tokens: int) -> None:
        """A dense prompt begins with no blocks of sparse ones, if the settings say so."""
        config, sequence = self.rules.config, self.requests[request_id]
        found = sequence.block_ids[: num_tokens // self.block_size]
        is_hit = not self.memory.sparse.isdisjoint(found)
        self.seen[f"sparse blocks found, {config.prefix_sharing}"] += is_hit
        if config.prefix_sharing == "exact" or (
            config.prefix_sharing == "alike" and len(sequence.tokens) < config.min_tokens
        ):
            assert not is_hit, "blocks of sparse prefill are shared"

    def _write_row(self, row: Row) -> None:
        sequence, block_size = self.requests[row.request_id], self.memory.block_size
        is_inexact, is_sparse = self._is_inexact(row), self._owes_to_sparse_prefill(row)
        for position in range(row.start, row.end):
            block_id = sequence.block_ids[position // block_size]
            offset = position % block_size
            if offset == 0:
                self.memory.inexact.discard(block_id)
                self.memory.sparse.discard(block_id)
            self.memory.write_dense(block_id, offset, sequence.identities[position])
            if is_inexact:
                self.memory.inexact.add(block_id)
            if is_sparse:
                self.memory.sparse.add(block_id)

    def _is_inexact(self, row: Row) -> bool:
        """Whether what the row computes owes anything to sparse prefill or to compression."""
        first = self.slots[row.slot].compressed_len // self.memory.block_size
        return (
            self._is_sparse(row) or first > 0 or not self.memory.inexact.isdisjoint(self._seen(row))
        )

    def _owes_to_sparse_prefill(self, row: Row) -> bool:
        return self._is_sparse(row) or not self.memory.sparse.isdisjoint(self._seen(row))

    def _is_sparse(self, row: Row) -> bool:
        config, chunk = self.rules.config, row.chunk
        is_long = config.prefills_sparsely and row.end >= config.min_tokens
        return bool(chunk and is_long and not chunk.attends_densely)

    def _seen(self, row: Row) -> list[int]:
        """Dense blocks of a row's context."""
        first = self.slots[row.slot].compressed_len // self.memory.block_size
        blocks = self.requests[row.request_id].block_ids
        return self._dense(blocks, first, _cdiv(row.start, self.block_size))

    @property
    def block_size(self) -> int:
        return self.memory.block_size

    def _dense(self, blocks: Any, first: int, last: int) -> list[Any]:
        """Of a request's first `last` blocks those that pages do not stand for."""
        head = self.rules.head_len // self.block_size
        return [*blocks[: min(head, first)], *blocks[first:last]]

    def _read_row(self, row: Row) -> None:
        """Attention: pages for what is compressed, dense blocks for the rest."""
        sequence, slot = self.requests[row.request_id], self.slots[row.slot]
        last = _cdiv(row.end, self.block_size)
        for index in self._dense(range(last), slot.compressed_len // self.block_size, last):
            first = index * self.block_size
            expected = sequence.identities[first : min(row.end, first + self.block_size)]
            found = self.memory.read_dense(sequence.block_ids[index])[: len(expected)]
            assert found == expected, f"{row.request_id} lost dense block {index}"
        for layer in slot.pages:
            for page in (*layer[0], *layer[1]):
                found = self.memory.read_page(page.page_id)
                assert found == page.identities, f"{row.request_id} lost page {page.page_id}"

    def _compress(self, plan: CompressionPlan) -> CompressionReport:
        slot, geometry = self.slots[plan.slot], self.rules.geometry
        assert slot.owner == plan.request_id
        assert plan.start == max(slot.compressed_len, self.rules.head_len)
        assert plan.is_first == (slot.compressed_len == 0)
        assert slot.num_pages == plan.first_page
        assert plan.start % self.block_size == plan.end % self.block_size == 0
        assert plan.start < plan.end <= plan.context_len
        assert len(set(plan.heap_block_ids)) == len(plan.heap_block_ids)
        expected = self.requests[plan.request_id].identities[plan.start : plan.context_len]
        found = [i for block_id in plan.dense_block_ids for i in self.memory.read_dense(block_id)]
        same = found[: len(expected)] == expected
        assert same, f"{plan.request_id}: dense blocks changed under a plan"
        expected = expected[: plan.end - plan.start]
        cursor = PageCursor(plan.heap_block_ids, plan.first_page, geometry.pages_per_block)
        num_kept = self._num_kept(plan)
        for layer, num in zip(slot.pages, num_kept, strict=True):
            for precision, identities in enumerate((expected[:num], expected[num:])):
                self._append(layer[precision], geometry.bits[precision], identities, cursor)
        if plan.is_prompt:
            # Whole blocks would hide a bound that is a few pages too low.
            assert cursor.num_pages <= self.rules.num_reserved_pages(plan.context_len)
        slot.compressed_len, slot.num_pages = plan.end, cursor.num_pages
        self.seen["prompt compressed" if plan.is_prompt else "tail compressed"] += 1
        is_full = geometry.num_blocks(cursor.num_pages) == len(plan.heap_block_ids)
        self.seen["reserve used up"] += is_full
        self.seen["reserve left over"] += not is_full
        return CompressionReport(cursor.num_pages, num_kept)

    def _append(
        self, pages: list[Page], bits: int, identities: list[int], cursor: PageCursor
    ) -> None:
        if bits == 0 or not identities:
            return
        capacity = self.rules.geometry.layout(bits).capacity
        if pages and len(pages[-1].identities) < capacity:
            page = pages[-1]
            assert self.memory.read_page(page.page_id) == page.identities
            room = capacity - len(page.identities)
            page.identities.extend(identities[:room])
            identities = identities[room:]
            self.memory.write_page(page.page_id, page.identities)
        chunks = [identities[i : i + capacity] for i in range(0, len(identities), capacity)]
        for page_id, chunk in zip(cursor.take(len(chunks)), chunks, strict=True):
            pages.append(Page(page_id, chunk))
            self.memory.write_page(page_id, chunk)

    def _num_kept(self, plan: CompressionPlan) -> list[int]:
        """Any choice that the worker's cap allows, with a liking for what takes most pages."""
        num_tokens, config = plan.end - plan.start, self.rules.config
        budget = NUM_LAYERS * num_tokens
        if plan.is_prompt:
            capped = math.floor(config.max_kept * plan.context_len * NUM_LAYERS)
            budget = min(budget, capped + NUM_LAYERS * config.probe_recent)
        choices = [self._split(budget, num_tokens) for _ in range(self._random.choice((1, 12)))]
        return max(choices, key=lambda counts: self._count_pages(counts, num_tokens))

    def _split(self, budget: int, num_tokens: int) -> list[int]:
        """Up to `budget` kept tokens shared out over the layers."""
        left = self._random.choice((0, budget, budget, self._random.randint(0, budget)))
        counts = []
        for num_layers_left in range(NUM_LAYERS, 0, -1):
            least = max(0, left - (num_layers_left - 1) * num_tokens)
            counts.append(self._random.randint(least, min(left, num_tokens)))
            left -= counts[-1]
        self._random.shuffle(counts)
        return counts

    def _count_pages(self, counts: list[int], num_tokens: int) -> int:
        geometry = self.rules.geometry
        high, low = geometry.bits
        return sum(
            geometry.num_pages(count, high) + geometry.num_pages(num_tokens - count, low)
            for count in counts
        )


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


class InFlight(NamedTuple):
    scheduler_output: SchedulerOutput
    output: ModelRunnerOutput


class Planned(NamedTuple):
    plan: CompressionPlan
    state: HeapState


class PretendEngine:
    """The engine core's loop, with requests put in and taken out between its steps."""

    def __init__(self, base: Base, case: Case, seed: int = 0) -> None:
        self.case = case
        self.scheduler = make_scheduler(base, case)
        self.planner = self.scheduler.connector.planner
        self.manager: ZipVLManager = self.planner.manager
        self.pool = self.manager.block_pool
        self.worker = PretendWorker(self.manager.rules, case, seed)
        self.in_flight: deque[InFlight] = deque()
        self.seen: Counter[str] = Counter()
        self.num_idle_steps = 0
        self._hasher = get_request_block_hasher(case.block_size, sha256)
        self._late_reports: deque[ReportMessage] = deque(
            ReportMessage(StepReport({})) for _ in range(case.report_lag)
        )
        self._num_requests = 0
        self._planned: dict[int, Planned] = {}
        # By identity of the state, since a resumed request starts anew.
        self._confirmed: dict[int, Planned] = {}
        self._count_waits()

    def _count_waits(self) -> None:
        connector = self.scheduler.connector
        has_pending_block_frees = connector.has_pending_block_frees

        def counted() -> bool:
            answer = has_pending_block_frees()
            self.seen["waited for a report"] += answer
            return answer

        connector.has_pending_block_frees = counted

    # What happens to requests.

    def add(self, prompt: list[int], max_tokens: int = 1, prompt_logprobs: bool = False) -> str:
        request_id = f"r{self._num_requests}"
        self._num_requests += 1
        params = SamplingParams(
            max_tokens=min(max_tokens, MAX_MODEL_LEN - len(prompt)),
            stop_token_ids=[STOP_TOKEN],
            prompt_logprobs=1 if prompt_logprobs else None,
        )
        number = self._num_requests
        request = Request(
            request_id,
            prompt,
            params,
            None,
            arrival_time=number,
            priority=-number % 3,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)
        return request_id

    def abort(self, request_id: str) -> None:
        self.seen[f"aborted {self.phase(request_id)}"] += 1
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        self.check()

    def preempt(self, request_id: str, drop_output: bool) -> None:
        """As the scheduler does to its last request when memory runs out."""
        request = self.scheduler.requests[request_id]
        self.seen[f"preempted {self.phase(request_id)}"] += 1
        self.scheduler.running.remove(request)
        self.scheduler._preempt_request(request, 0.0, drop_stale_output=drop_output)
        self.scheduler.prev_step_scheduled_req_ids.discard(request_id)
        self.check()

    def reset(self) -> None:
        """Preempt everything and forget all prefixes, as after a weight update."""
        assert self.scheduler.reset_prefix_cache(reset_running_requests=True)
        self.seen["reset"] += 1
        self.check()

    def phase(self, request_id: str) -> str:
        state = self.manager.heaps.get(request_id)
        if state is None:
            return "waiting"
        if state.prompt_end is None:
            return "prefilling"
        if request_id in self.manager.awaiting:
            return "awaiting compression"
        return "awaiting report" if state.pending is not None else "decoding"

    def in_phase(self, phase: str) -> list[str]:
        return [r for r in self.scheduler.requests if self.phase(r) == phase]

    # Steps.

    def step(self, max_tokens: int = 4 * MAX_MODEL_LEN) -> None:
        """Schedule and run one step of at most `max_tokens`; take over the oldest output."""
        before = {request.request_id for request in self.scheduler.running}
        self.scheduler.max_num_scheduled_tokens = max_tokens
        scheduler_output = self.scheduler.schedule()
        self._note_schedule(scheduler_output, before)
        output = self.worker.execute(scheduler_output)
        self._delay_report(output)
        self.in_flight.append(InFlight(scheduler_output, output))
        self.check()
        while len(self.in_flight) >= (2 if self.case.is_async else 1):
            self.deliver()

    def deliver(self) -> None:
        """The scheduler takes over the oldest output."""
        scheduler_output, output = self.in_flight.popleft()
        self.scheduler.update_from_output(scheduler_output, output)
        for plan_id in output.kv_connector_output.kv_connector_worker_meta.report.compressions:
            planned = self._planned.pop(plan_id)
            if self._is_live(planned):
                self._confirmed[id(planned.state)] = planned
            else:
                self.seen["report of a freed request"] += 1
        self.check()

    def drain(self) -> None:
        """Let everything finish; nothing may be left."""
        num_steps = 0
        while self.scheduler.requests:
            self.step()
            num_steps += 1
            assert num_steps < 5000, "the engine does not come to an end"
        while self.in_flight:
            self.deliver()
        self.step()
        self.in_flight.clear()
        self._check_is_whole()

    def _note_schedule(self, scheduler_output: SchedulerOutput, before: set[str]) -> None:
        plan = scheduler_output.kv_connector_metadata.plan
        for compression in plan.compressions:
            state = self.manager.heaps[compression.request_id]
            assert state.pending is compression
            self._planned[compression.plan_id] = Planned(compression, state)
        running = {r.request_id for r in self.scheduler.running}
        self.seen["ran out of memory"] += len(before - running)
        for chunk in plan.chunks:
            if chunk.request_id in before or not chunk.start:
                continue
            self.seen["prefix hit"] += 1
            if chunk.start > self.scheduler.requests[chunk.request_id].num_prompt_tokens:
                self.seen["prefix hit beyond the prompt"] += 1
        if scheduler_output.total_num_scheduled_tokens or not self.scheduler.requests:
            self.num_idle_steps = 0
        else:
            self.num_idle_steps += 1
        # One for each step in flight, one until a compression is planned, one for each that its
        # report is late.
        assert self.num_idle_steps <= 4 + self.case.report_lag, "the schedule stalls"

    def _delay_report(self, output: ModelRunnerOutput) -> None:
        connector_output = output.kv_connector_output
        self._late_reports.append(connector_output.kv_connector_worker_meta)
        connector_output.kv_connector_worker_meta = self._late_reports.popleft()

    def _is_live(self, planned: Planned) -> bool:
        return self.manager.heaps.get(planned.plan.request_id) is planned.state

    # Invariants.

    def check(self) -> None:
        self._check_blocks()
        self._check_requests()
        self._check_plans()
        if self.manager.rules.config.prefix_sharing == "exact":
            cached = {b.block_id for b in self.pool.blocks if b.block_hash is not None}
            assert cached.isdisjoint(self.worker.memory.inexact), "an inexact block is shared"

    def _check_blocks(self) -> None:
        """Every block is free once, or has as many references as owners."""
        dense = Counter(
            block.block_id
            for blocks in self.manager.req_to_blocks.values()
            for block in blocks
            if not block.is_null
        )
        heap = Counter(b.block_id for s in self.manager.heaps.values() for b in s.blocks)
        free = Counter(b.block_id for b in self.pool.free_block_queue.get_all_free_blocks())
        assert max(heap.values(), default=1) == 1, "a heap block has two owners"
        assert heap.keys().isdisjoint(dense), "a block is both dense and heap"
        assert max(free.values(), default=1) == 1, "a block is free twice"
        assert sum(free.values()) == self.pool.get_num_free_blocks()
        for block in self.pool.blocks[1:]:
            block_id = block.block_id
            assert block.ref_cnt == dense[block_id] + heap[block_id], block
            assert (block_id in free) == (block.ref_cnt == 0), block
            assert block_id not in heap or block.block_hash is None, block
        assert not self.pool.cached_block_hashes_by_block

    def _check_requests(self) -> None:
        manager = self.manager
        running = {request.request_id for request in self.scheduler.running}
        assert manager.heaps.keys() == running
        assert {r for r, blocks in manager.req_to_blocks.items() if blocks} == running
        slots = [state.slot for state in manager.heaps.values()]
        assert len(set(slots)) == len(slots), "two requests share a slot"
        assert set(slots) <= set(range(self.case.max_num_seqs))
        assert sorted([*slots, *manager._free_slots]) == list(range(manager._num_slots))
        for request_id, state in manager.heaps.items():
            self._check_request(request_id, state)

    def _check_request(self, request_id: str, state: HeapState) -> None:
        manager, geometry = self.manager, self.manager.geometry
        confirmed = self._confirmed.get(id(state))
        assert state.compressed_len == (confirmed.plan.end if confirmed else 0)
        blocks = manager.req_to_blocks[request_id]
        # What a report confirmed is free at once: others may be waiting for it. The head stays.
        first, last = manager.rules.head_len, state.compressed_len
        expected = [first <= i * manager.block_size < last for i in range(len(blocks))]
        assert [block.is_null for block in blocks] == expected
        num_used = geometry.num_blocks(state.num_pages)
        if state.prompt_is_compressed and state.pending is None:
            assert len(state.blocks) == num_used
        assert len(state.blocks) >= num_used
        assert (request_id in manager.awaiting) == (
            state.prompt_end is not None and not state.prompt_is_compressed and not state.pending
        )

    def _check_plans(self) -> None:
        """What a plan reads or writes stays its request's until the report is in."""
        manager = self.manager
        assert set(manager.awaiting) <= set(manager.heaps)
        live = {i: planned for i, planned in self._planned.items() if self._is_live(planned)}
        assert manager.unreported.keys() == live.keys()
        for plan, state in live.values():
            assert state.pending is plan
            first = plan.start // manager.block_size
            last = _cdiv(plan.context_len, manager.block_size)
            blocks = manager.req_to_blocks[plan.request_id][first:last]
            assert [block.block_id for block in blocks] == plan.dense_block_ids
            assert [block.block_id for block in state.blocks] == plan.heap_block_ids

    def _check_is_whole(self) -> None:
        manager = self.manager
        assert self.pool.get_num_free_blocks() == self.pool.num_gpu_blocks - 1
        assert not any(block.ref_cnt for block in self.pool.blocks[1:])
        assert not (manager.heaps or manager.awaiting or manager.unreported or manager._new_slots)
        assert not any(manager.req_to_blocks.values())
        assert len(manager._free_slots) == manager._num_slots
        assert not self.planner._dense_requests
        assert self.scheduler.reset_prefix_cache()
