"""Plans and reports as vLLM carries them between the connectors of its processes."""

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from vllm_zipvl.plan import StepPlan, StepReport


@dataclass
class PlanMessage(KVConnectorMetadata):
    """From the scheduler to every worker."""

    plan: StepPlan


@dataclass
class ReportMessage(KVConnectorWorkerMetadata):
    """From the workers to the scheduler; of all ranks' equal ones, one arrives."""

    report: StepReport

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "ReportMessage":
        assert isinstance(other, ReportMessage), other
        self.report.check_same(other.report)
        return self
