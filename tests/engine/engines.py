"""Start real vLLM engines for tests, one after another in one process, and leave nothing behind.

vLLM's CPU platform runs the engine core and the worker in processes of their own. With
`VLLM_ENABLE_V1_MULTIPROCESSING=0` the engine core lives in this process and its scheduler can be
inspected; the worker does too unless `distributed_executor_backend="mp"` is asked for. The
first engine of a process takes about 15 s on two cores, most of it imports; each further one takes
about 5 s in process and 30 s with processes.
"""

import gc
import os
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler

Processes = Literal["none", "workers", "all"]

DEFAULTS: dict[str, Any] = {
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 2048,
    "seed": 0,
}


@contextmanager
def engine(
    model: str | Path, *, processes: Processes = "none", check_pool: bool = True, **settings: Any
) -> Iterator["LLM"]:
    """A `vllm.LLM` with small settings, shut down and freed at the end of the block.

    Args:
        model: Folder of the checkpoint.
        processes: "none" runs everything here; "workers" starts the workers as processes, as
            tensor parallelism needs; "all" also the engine core, as vLLM does by default, and
            then its scheduler cannot be inspected.
        check_pool: Whether to assert that the block pool is whole when the block has ended
            without an exception and the scheduler is here.
        **settings: Arguments of `vllm.LLM` beside or instead of `DEFAULTS`.
    """
    settings = {**DEFAULTS, **settings}
    # A small pool: vLLM zeroes all of it at start.
    num_blocks = max(512, 2 * settings["max_model_len"] // settings["block_size"])
    settings.setdefault("num_gpu_blocks_override", num_blocks)
    if processes == "workers":
        settings.setdefault("distributed_executor_backend", "mp")
    with mock.patch.dict(os.environ, environment(processes)):
        llm = start(model, settings)
        try:
            yield llm
            if check_pool and processes != "all":
                assert_pool_whole(llm)
        finally:
            shut_down(llm)


def environment(processes: Processes) -> dict[str, str]:
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if processes == "all" else "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def start(model: str | Path, settings: dict[str, Any]) -> "LLM":
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        return LLM(str(model), **settings)
    except BaseException:
        # A start that failed half-way leaves its process group, and the next one would join it.
        cleanup_dist_env_and_memory()
        raise


def shut_down(llm: "LLM") -> None:
    llm.llm_engine.renderer.shutdown()
    llm.llm_engine.engine_core.shutdown()
    # The caller's variable outlives the block and would keep the model and the cache alive.
    vars(llm).clear()
    gc.collect()


def scheduler_of(llm: "LLM") -> "Scheduler":
    """The scheduler; needs the engine core in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def kv_cache_manager(llm: "LLM") -> "KVCacheManager":
    """The scheduler's cache manager; needs the engine core in this process."""
    return scheduler_of(llm).kv_cache_manager


def block_pool(llm: "LLM") -> "BlockPool":
    return kv_cache_manager(llm).block_pool


def assert_pool_whole(llm: "LLM") -> None:
    """Every block but the null block is free, once, and no request holds any."""
    pool = block_pool(llm)
    free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    everyone = [block.block_id for block in pool.blocks if not block.is_null]
    assert len(free) == len(set(free)), "a block is in the free queue twice"
    assert sorted(free) == sorted(everyone), f"lost: {sorted(set(everyone) - set(free))}"
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    held = {block.block_id: block.ref_cnt for block in pool.blocks if block.ref_cnt}
    held.pop(pool.null_block.block_id, None)
    assert not held, f"free blocks with references: {held}"
    for manager in kv_cache_manager(llm).coordinator.single_type_managers:
        assert not manager.req_to_blocks, f"blocks of finished requests: {manager.req_to_blocks}"


def draw_image(seed: int = 0, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Shapes on a gradient; the same picture for the same seed and size."""
    generator = random.Random(f"{seed} {size}")
    image = Image.linear_gradient("L").resize(size).convert("RGB")
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = (generator.randrange(side) for side in size)
        box = (left, top, left + generator.randrange(8, 120), top + generator.randrange(8, 120))
        colour = tuple(generator.randrange(256) for _ in range(3))
        generator.choice((pen.ellipse, pen.rectangle))(box, fill=colour)
    return image


def prompt(text: str, *images: Image.Image) -> dict[str, Any]:
    """A prompt that any of the tiny families takes; `llama` takes no images."""
    placeholders = "<image>\n" * len(images)
    request: dict[str, Any] = {"prompt": f"USER: {placeholders}{text}\nASSISTANT:"}
    if images:
        request["multi_modal_data"] = {"image": list(images)}
    return request


def tokens(ids: Iterable[int]) -> dict[str, Any]:
    """A prompt of these token ids."""
    return {"prompt_token_ids": list(ids)}


def words(start: int, num: int) -> dict[str, Any]:
    """A prompt of `num` of the 700 ids from 300 on, which follow each other in a circle."""
    return tokens(300 + (start + i) % 700 for i in range(num))


def generate(
    llm: "LLM", requests: list[dict[str, Any]], max_tokens: int = 8, **sampling: Any
) -> list[list[int]]:
    """The token ids of greedy continuations of exactly `max_tokens` tokens."""
    from vllm import SamplingParams

    settings = {"temperature": 0.0, "ignore_eos": True, **sampling}
    parameters = SamplingParams(max_tokens=max_tokens, **settings)
    outputs = llm.generate(requests, parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
