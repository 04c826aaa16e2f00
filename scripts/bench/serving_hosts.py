"""Processes that hold one engine each, so that requests can alternate between methods.

While one engine runs, those of the other processes wait and use no CPU.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import serving_engine

ENVIRONMENT = {
    # The engine core, and with it the scheduler, in the process that asks for it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
BLOCK_SIZE = 32
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


class Method(NamedTuple):
    """One way to serve.

    Attributes:
        name: Its label in the results.
        settings: What it adds to the arguments of `vllm.LLM`.
        kv_itemsize: Bytes of one element of its KV blocks; None means the model's.
    """

    name: str
    settings: dict[str, Any]
    kv_itemsize: int | None = None

    @property
    def is_zipvl(self) -> bool:
        return "attention_backend" in self.settings


STOCK = Method("stock", {})
FP8 = Method("stock fp8 KV", {"kv_cache_dtype": "fp8"}, kv_itemsize=1)


def zipvl(**config: Any) -> Method:
    """This package's backend with settings of its own; without any it keeps its defaults."""
    label = " ".join(f"{key} {value}" for key, value in config.items()) or "defaults"
    settings = {"attention_backend": "ZIPVL", "additional_config": {"zipvl": config}}
    return Method(f"zipvl {label}", settings)


class Model(NamedTuple):
    """A random-weight checkpoint: what `tiny_checkpoints.TinyCheckpoint` takes.

    Without weights of its own, vLLM fills them with small random numbers.
    """

    path: Path
    spec: dict[str, Any]
    has_weights: bool = True

    @property
    def shape(self) -> str:
        heads = "{layers} layers, {heads}/{kv_heads} heads of {head_size}, {dtype}"
        return heads.format(**self.spec)

    def block_bytes(self, method: Method) -> int:
        """Bytes of a block: keys and values of all layers."""
        itemsize = method.kv_itemsize or ITEMSIZE[self.spec["dtype"]]
        sizes = (self.spec[name] for name in ("layers", "kv_heads", "head_size"))
        return 2 * math.prod(sizes) * BLOCK_SIZE * itemsize


class Host:
    """A process that runs one engine at a time, of any method and model."""

    def __init__(self) -> None:
        self._process = _process()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self._process.submit(function, *args).result()

    def start(self, model: Model, method: Method, pool_bytes: int, **settings: Any) -> None:
        """Start an engine with `pool_bytes` of KV memory.

        Raises:
            RuntimeError: The engine took another amount of memory.
        """
        num_blocks = pool_bytes // model.block_bytes(method)
        common: dict[str, Any] = {
            # vLLM's "auto" turns float32 into a narrower type.
            "dtype": model.spec["dtype"],
            "block_size": BLOCK_SIZE,
            "enable_prefix_caching": True,
            "enforce_eager": True,
            "num_gpu_blocks_override": num_blocks,
            "seed": 0,
        }
        if not model.has_weights:
            common["load_format"] = "dummy"
        pool = self.call(serving_engine.start, model.path, common | settings | method.settings)
        if pool.num_bytes != num_blocks * model.block_bytes(method):
            raise RuntimeError(f"{method.name}: {pool} instead of {pool_bytes} bytes")

    def make(self, model: Model) -> None:
        make = serving_engine.make_checkpoint if model.has_weights else serving_engine.make_folder
        self.call(make, model.path, model.spec)

    def stop(self) -> None:
        self.call(serving_engine.stop)

    def close(self) -> None:
        self._process.shutdown(cancel_futures=True)

    def renew(self) -> None:
        """Go on in another process: what an engine leaves on a GPU ends with its process."""
        self.close()
        self._process = _process()


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


@contextmanager
def hosts(number: int, **environment: str) -> Iterator[list[Host]]:
    """Processes that end with the block."""
    os.environ.update(ENVIRONMENT | environment)
    processes = [Host() for _ in range(number)]
    try:
        yield processes
    finally:
        for process in processes:
            process.close()


@contextmanager
def engines(
    processes: Sequence[Host], model: Model, methods: Sequence[Method], pool_bytes: int, **settings
) -> Iterator[list[Host]]:
    """One engine per method, side by side."""
    started: list[Host] = []
    try:
        for host, method in zip(processes[: len(methods)], methods, strict=True):
            host.start(model, method, pool_bytes, **settings)
            started.append(host)
        yield started
    except BaseException:
        with suppress(Exception):
            _stop(started)
        raise
    _stop(started)


def _stop(started: Sequence[Host]) -> None:
    for host in started:
        host.stop()
