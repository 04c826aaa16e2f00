"""What was compressed, in vLLM's log line and on `/metrics`."""

from typing import Any

from prometheus_client import Counter, Gauge
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from vllm_zipvl.plan import CompressionPlan, CompressionReport


class ZipVLStats(KVConnectorStats):
    """Sums over the compressions of a log interval.

    `data` holds `prompts` (prompts compressed), `intervals` (tail compressions),
    `blocks_freed` (dense blocks), `blocks_used` (heap blocks), `prompt_tokens` (tokens per
    layer that prompt compressions covered) and `kept_tokens` (those kept, one sum per layer).
    """

    data: dict[str, Any]

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data or {})
        if not self.data:
            self.reset()

    def reset(self) -> None:
        self.data = {
            "prompts": 0,
            "intervals": 0,
            "blocks_freed": 0,
            "blocks_used": 0,
            "prompt_tokens": 0,
            "kept_tokens": [],
        }

    def record(
        self, plan: CompressionPlan, report: CompressionReport, num_freed: int, num_used: int
    ) -> None:
        """Count one confirmed compression."""
        data = self.data
        data["blocks_freed"] += num_freed
        data["blocks_used"] += num_used
        if not plan.is_prompt:
            data["intervals"] += 1
            return
        data["prompts"] += 1
        data["prompt_tokens"] += plan.end - plan.start
        data["kept_tokens"] = _add(data["kept_tokens"], report.num_kept)

    def aggregate(self, other: KVConnectorStats) -> "ZipVLStats":
        for key, value in other.data.items():
            mine = self.data[key]
            self.data[key] = _add(mine, value) if isinstance(value, list) else mine + value
        return self

    def reduce(self) -> dict[str, int | float]:
        data = self.data
        reduced: dict[str, int | float] = {
            "zipvl prompts compressed": data["prompts"],
            "tail compressions": data["intervals"],
            "blocks returned": data["blocks_freed"] - data["blocks_used"],
            "blocks freed": data["blocks_freed"],
        }
        if data["prompt_tokens"]:
            shares = [kept / data["prompt_tokens"] for kept in data["kept_tokens"]]
            reduced["kept share mean"] = round(sum(shares) / len(shares), 3)
            reduced["kept share min layer"] = round(min(shares), 3)
            reduced["kept share max layer"] = round(max(shares), 3)
        return reduced

    def is_empty(self) -> bool:
        return not self.data["prompts"] and not self.data["intervals"]


def _add(a: list[int], b: list[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)] if a and b else a or b


class ZipVLPromMetrics(KVConnectorPromMetrics):
    """Counters per engine, and the kept share per layer of the newest report."""

    COUNTERS = {
        "prompts": ("zipvl_prompts_compressed", "Prompts whose KV cache was compressed."),
        "intervals": ("zipvl_tail_compressions", "Compressions of tokens decoded since."),
        "blocks_freed": ("zipvl_blocks_freed", "Dense KV blocks freed by compression."),
        "blocks_used": ("zipvl_blocks_used", "KV blocks taken by compressed tokens."),
        "prompt_tokens": ("zipvl_prompt_tokens_compressed", "Prompt tokens compressed."),
    }

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._counters = {
            key: self._metrics(self._counter_cls, *name_and_help)
            for key, name_and_help in self.COUNTERS.items()
        }
        self._kept_share = self._gauge_cls(
            name="vllm:zipvl_kept_share",
            documentation="Share of prompt tokens that a layer kept at high precision.",
            labelnames=[*self._labelnames, "layer"],
        )

    def _metrics(
        self, cls: type[Counter] | type[Gauge], name: str, documentation: str
    ) -> dict[int, Any]:
        metric = cls(name=f"vllm:{name}", documentation=documentation, labelnames=self._labelnames)
        return {
            engine: metric.labels(*values) for engine, values in self.per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for key, counters in self._counters.items():
            counters[engine_idx].inc(transfer_stats_data[key])
        num_tokens = transfer_stats_data["prompt_tokens"]
        labels = self.per_engine_labelvalues[engine_idx]
        for layer, kept in enumerate(transfer_stats_data["kept_tokens"]):
            self._kept_share.labels(*labels, str(layer)).set(kept / num_tokens)
