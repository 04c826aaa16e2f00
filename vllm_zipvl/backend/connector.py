"""The messenger between scheduler and workers, in vLLM's KV connector slot.

vLLM carries a connector's metadata to every worker in order, step by step, and the workers'
answers back: across processes, executors and tensor-parallel ranks. Nothing is transferred to
another engine.
"""

import time
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput

from vllm_zipvl.backend.messages import PlanMessage, ReportMessage
from vllm_zipvl.backend.metrics import ZipVLPromMetrics, ZipVLStats
from vllm_zipvl.backend.planner import StepPlanner
from vllm_zipvl.backend.worker import ZipVLWorker
from vllm_zipvl.cache.manager import ZipVLManager
from vllm_zipvl.cache.spec import ZipVLSpec, make_tables, max_gathered_tokens, rules_of

if TYPE_CHECKING:
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


logger = init_logger("vllm.zipvl")

SLOW_WARM_UP = 5
"""Seconds above which kernels were compiled rather than loaded."""


def _sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    if get_tensor_model_parallel_world_size() == 1:
        return x
    return tensor_model_parallel_all_reduce(x)


class ZipVLConnector(KVConnectorBase_V1, SupportsHMA):
    """Carries step plans to the workers and reports to the scheduler."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        role: KVConnectorRole,
        kv_cache_config: "KVCacheConfig",
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.worker: ZipVLWorker | None = None
        self.planner: StepPlanner | None = None
        if role is KVConnectorRole.WORKER:
            (group,) = kv_cache_config.kv_cache_groups
            spec = group.kv_cache_spec
            assert isinstance(spec, ZipVLSpec)
            rules, max_tokens = rules_of(spec, vllm_config), max_gathered_tokens(vllm_config)
            self.worker = ZipVLWorker(rules, _sum_over_ranks, max_tokens)

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # Worker side.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        assert self.worker is not None
        layers = self._vllm_config.compilation_config.static_forward_context
        impls = [layers[name].impl for name in kv_caches]
        tables = impls[0].tables
        if tables is None:
            device = next(iter(kv_caches.values())).device
            tables = make_tables(self.worker.rules, self._vllm_config, device)
        self.worker.register(kv_caches, tables, impls[0].tail_probes, impls[0].scale)
        started = time.monotonic()
        self.worker.warm_up(impls[0].num_heads, impls[0].prefill_kernel)
        seconds = time.monotonic() - started
        if seconds > SLOW_WARM_UP:
            logger.info("zipvl: compiled its kernels in %.0f s; later starts reuse them", seconds)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert self.worker is not None and isinstance(connector_metadata, PlanMessage)
        self.worker.begin_step(connector_metadata.plan)

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        assert self.worker is not None
        self.worker.end_step()

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        """Nothing is loaded. Model runner V2 says here whose rows the batch has."""
        assert self.worker is not None
        if request_ids := kwargs.get("request_ids"):
            self.worker.note_rows(request_ids)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(
        self,
        layer_name: str,
        kv_layer: torch.Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> None:
        return

    def wait_for_save(self) -> None:
        assert self.worker is not None
        self.worker.compress_planned()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        assert self.worker is not None
        report = self.worker.take_report()
        return ReportMessage(report) if report.compressions else None

    # Scheduler side.

    def bind_kv_cache_manager(self, kv_cache_manager: "KVCacheManager") -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        (manager,) = kv_cache_manager.coordinator.single_type_managers
        assert isinstance(manager, ZipVLManager)
        manager.bind(rules_of(manager.kv_cache_spec, self._vllm_config))
        self.planner = StepPlanner(manager)

    def get_num_new_matched_tokens(
        self, request: "Request", num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(
        self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int
    ) -> None:
        assert self.planner is not None
        self.planner.admit(request)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        assert self.planner is not None
        plan = self.planner.plan(scheduler_output)
        # Where layers ask whose rows are prompts, `start_load_kv` comes before the forward pass.
        has_prompts = any(not chunk.is_single_token for chunk in plan.chunks)
        scheduler_output.has_sync_kv_loads = has_prompts
        return PlanMessage(plan)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        assert self.planner is not None
        message = connector_output.kv_connector_worker_meta
        if isinstance(message, ReportMessage):
            self.planner.confirm(message.report)

    def has_pending_block_frees(self) -> bool:
        assert self.planner is not None
        return self.planner.manager.frees_soon()

    def request_finished(
        self, request: "Request", block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        assert self.planner is not None
        self.planner.finish(request)
        return False, None

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, block_ids[0])

    # Metrics.

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        return self.planner.take_stats() if self.planner is not None else None

    @classmethod
    def build_kv_connector_stats(
        cls, data: dict[str, Any] | None = None
    ) -> KVConnectorStats | None:
        return ZipVLStats(data)

    @classmethod
    def build_prom_metrics(cls, *args: Any, **kwargs: Any) -> KVConnectorPromMetrics:
        return ZipVLPromMetrics(*args, **kwargs)
