"""Engines on the zipvl backend, and a look inside them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines import engine, kv_cache_manager

from vllm_zipvl.cache.manager import ZipVLManager

if TYPE_CHECKING:
    import torch
    from vllm import LLM

    from vllm_zipvl.backend.worker import ZipVLWorker
    from vllm_zipvl.plan import CompressionPlan, CompressionReport

KEEP_ALL = {"tau": 1.0, "high_bits": 16, "low_bits": 16, "interval": 32}
LOSSY = {"ratio": 0.4, "low_bits": 2, "min_tokens": 128, "interval": 32, "residual": 16}


@contextmanager
def zipvl_engine(
    model: str | Path, zipvl: dict[str, Any] | None = None, **settings: Any
) -> Iterator["LLM"]:
    """An engine with `--attention-backend zipvl`; see `engines.engine`."""
    additional_config = {"zipvl": zipvl or {}}
    with engine(
        model, attention_backend="ZIPVL", additional_config=additional_config, **settings
    ) as llm:
        yield llm


def manager_of(llm: "LLM") -> ZipVLManager:
    """The scheduler's manager; needs the engine core in this process."""
    (manager,) = kv_cache_manager(llm).coordinator.single_type_managers
    assert isinstance(manager, ZipVLManager)
    return manager


def worker_of() -> "ZipVLWorker":
    """The worker's state; needs the worker in this process."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    worker = get_kv_transfer_group().worker
    assert worker is not None
    return worker


@contextmanager
def confirmations(llm: "LLM") -> Iterator[dict[int, "CompressionPlan | None"]]:
    """By plan id, what workers report while the block runs; None if its request was freed."""
    manager = manager_of(llm)
    confirm = manager.confirm
    confirmed: dict[int, CompressionPlan | None] = {}

    def noting_confirm(plan_id: int, report: "CompressionReport") -> Any:
        state = manager.unreported.get(plan_id)
        confirmed[plan_id] = state and state.pending
        return confirm(plan_id, report)

    manager.confirm = noting_confirm
    try:
        yield confirmed
    finally:
        del manager.confirm


@contextmanager
def compressing(llm: "LLM") -> Iterator[None]:
    """Assert that prompts and tails are compressed while the block runs."""
    with confirmations(llm) as confirmed:
        yield
    kinds = [plan.is_prompt for plan in confirmed.values() if plan is not None]
    assert True in kinds, "no prompt was compressed"
    assert False in kinds, "no tail was compressed"


def assert_counted_whole(llm: "LLM") -> None:
    """No request left anything behind in the manager."""
    manager = manager_of(llm)
    assert not manager.heaps
    assert not manager.awaiting
    assert not manager.unreported
    assert sorted(manager._free_slots) == list(range(manager._num_slots))


@contextmanager
def noting_masks() -> Iterator[list[list["torch.Tensor"]]]:
    """What each layer keeps of each prompt that is compressed while the block runs."""
    prompts, masks = worker_of().prompts, []
    take_masks = prompts.take_masks

    def noting_take_masks(*args: Any) -> list["torch.Tensor"]:
        masks.append(take_masks(*args))
        return masks[-1]

    prompts.take_masks = noting_take_masks
    try:
        yield masks
    finally:
        prompts.take_masks = take_masks


def assert_same_masks(masks: list[list["torch.Tensor"]], expected: Any) -> None:
    for mine, its in zip(masks, expected, strict=True):
        for one, other in zip(mine, its, strict=True):
            # Rounding decides between tokens that tie.
            assert int((one != other).sum()) <= 2
            assert int(one.sum()) > 0
