"""One engine in this process: start it, run requests on it, watch its scheduler.

The functions here run in processes of their own, see `serving_hosts`; they take and return plain
data. A process holds at most one engine at a time.
"""

import gc
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

# The byte tokenizer's special tokens and bytes end below this id; the ids above are plain words.
FIRST_WORD = 300
PICTURE_SIDE = 672
PICTURE_GRID = 48
SCRIPTS = str(Path(__file__).resolve().parents[1])


class Request(NamedTuple):
    """A prompt, drawn from its seed alone.

    Attributes:
        seed: Different seeds share no prefix.
        num_tokens: Random words in the prompt.
        has_picture: Whether a random picture comes before them.
    """

    seed: int
    num_tokens: int
    has_picture: bool = False


@dataclass
class Watch:
    """What the scheduler did, step by step.

    Attributes:
        peak_running: Most requests whose whole prompt was in memory at once. vLLM also lets
            requests in with a first block while their pictures wait for the encoder.
        preemptions: Requests that lost their memory and started again.
        block_steps: Used blocks, summed over steps that only decode.
        token_steps: Tokens of the running requests, summed over the same steps.
        cpu_seconds: CPU time of `schedule` and `update_from_output`, per step that only decodes
            and has `batch` requests.
        batch: See `cpu_seconds`; None records no times.
        begun: When the first step began.
        arrivals: Per request, when each of its tokens had been sampled and was known here.
    """

    batch: int | None = None
    peak_running: int = 0
    preemptions: int = 0
    block_steps: int = 0
    token_steps: int = 0
    cpu_seconds: list[float] = field(default_factory=list)
    begun: float = 0.0
    arrivals: dict[str, list[float]] = field(default_factory=dict)


class Served(NamedTuple):
    """The outcome of a list of requests, submitted at once.

    Attributes:
        seconds: From the first step to the last, without image processing in the front end.
        cpu_seconds: CPU time of this process meanwhile, all threads.
        num_tokens: Tokens generated.
        prompt_tokens: Tokens of the longest prompt, picture included.
        watch: `Watch` as a dictionary.
        compressed: The counts of the backend's own statistics; empty for stock.
        first: Per request, seconds from the first step to its first token, waiting included.
        per_token: Per request, mean seconds of its other tokens.
    """

    seconds: float
    cpu_seconds: float
    num_tokens: int
    prompt_tokens: int
    watch: dict[str, Any]
    compressed: dict[str, Any]
    first: list[float]
    per_token: list[float]


class FirstTokens(NamedTuple):
    """Times of one request that runs alone.

    Attributes:
        first: Seconds to the first token.
        cpu_first: CPU time of this process meanwhile, all threads.
        second: Seconds from there to the second, in which a prompt is compressed.
        token_ids: All of its tokens.
        compressed: As in `Served`.
        rest: Seconds of each further token.
    """

    first: float
    cpu_first: float
    second: float
    token_ids: list[int]
    compressed: dict[str, Any]
    rest: list[float]


class Pool(NamedTuple):
    """The KV memory of the running engine."""

    num_blocks: int
    num_bytes: int


_llm: Any = None
_compressed: Any = None


def make_checkpoint(out: Path, spec: dict[str, Any]) -> None:
    """Write a random-weight checkpoint, see `scripts/tiny_checkpoints.py`."""
    sys.path.append(SCRIPTS)
    from tiny_checkpoints import TinyCheckpoint, make

    make(TinyCheckpoint(**spec), out)


def make_folder(out: Path, spec: dict[str, Any]) -> None:
    """Write all of a checkpoint but the weights, which `load_format="dummy"` does without."""
    sys.path.append(SCRIPTS)
    import torch
    from tiny_checkpoints import FAMILIES, TinyCheckpoint

    checkpoint = TinyCheckpoint(**spec)
    with torch.device("meta"):
        model, processor = FAMILIES[checkpoint.family](checkpoint)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = checkpoint.dtype
    model.config.save_pretrained(out)
    processor.save_pretrained(out)


def start(model: Path, settings: dict[str, Any]) -> Pool:
    """Start the engine of this process."""
    global _llm
    from vllm import LLM

    assert _llm is None, "an engine is running"
    _llm = LLM(str(model), **settings)
    _keep_statistics(_scheduler().connector)
    config = _scheduler().kv_cache_config
    num_bytes = sum(tensor.size for tensor in config.kv_cache_tensors)
    return Pool(config.num_blocks, num_bytes)


def stop() -> None:
    """Shut the engine down and free its memory.

    Raises:
        RuntimeError: A block of the KV memory was lost.
    """
    global _llm
    _drain()
    pool = _scheduler().kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    _llm.llm_engine.renderer.shutdown()
    _llm.llm_engine.engine_core.shutdown()
    _llm = None
    gc.collect()
    if free != pool.num_gpu_blocks - 1:
        raise RuntimeError(f"{pool.num_gpu_blocks - 1 - free} blocks are lost")


def serve(requests: list[Request], max_tokens: int, batch: int | None = None) -> Served:
    """Run requests to exactly `max_tokens` tokens each."""
    watch = Watch(batch)
    prompts = [prompt_of(request) for request in requests]
    _take_statistics()
    with _observed(watch) as span:
        outputs = _llm.generate(prompts, parameters(max_tokens), use_tqdm=False)
    _drain()
    seconds, cpu_seconds = span()
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    if num_tokens != max_tokens * len(requests):
        raise RuntimeError(f"{num_tokens} tokens from {len(requests)} x {max_tokens}")
    longest = max(len(output.prompt_token_ids) for output in outputs)
    first, per_token = _latencies(watch)
    figures = asdict(watch)
    del figures["arrivals"]
    return Served(
        seconds, cpu_seconds, num_tokens, longest, figures, _take_statistics(), first, per_token
    )


def first_tokens(request: Request, max_tokens: int = 3) -> FirstTokens:
    """Time one request's tokens; at the earliest a third one's step reports the compression."""
    engine = _llm.llm_engine
    prompt = prompt_of(request)
    started, cpu_started = time.perf_counter(), time.process_time()
    engine.add_request(f"first-{request.seed}", prompt, parameters(max_tokens))
    arrivals: list[tuple[float, float]] = []
    token_ids: list[int] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            token_ids = list(output.outputs[0].token_ids)
            arrivals.append((time.perf_counter(), time.process_time()))
    _drain()
    first, second, *_ = times = [seconds for seconds, _ in arrivals]
    rest = [later - earlier for earlier, later in pairwise(times[1:])]
    return FirstTokens(
        first - started,
        arrivals[0][1] - cpu_started,
        second - first,
        token_ids,
        _take_statistics(),
        rest,
    )


def versions() -> dict[str, str]:
    """Of what the engine runs on."""
    import torch
    import vllm

    found = {"vllm": vllm.__version__, "torch": torch.__version__}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda or "none"}
    return found


def running_engine() -> Any:
    """The engine of this process."""
    assert _llm is not None, "no engine is running"
    return _llm.llm_engine


def _core() -> Any:
    return _llm.llm_engine.engine_core.engine_core


def _scheduler() -> Any:
    return _core().scheduler


def _drain() -> None:
    """Take in what asynchronous scheduling has begun and nobody waits for."""
    while _core().batch_queue:
        _core().step_fn()


def parameters(max_tokens: int) -> Any:
    """Greedy, to exactly so many tokens."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def prompt_of(request: Request) -> dict[str, Any]:
    """What `LLM.generate` takes."""
    draw = random.Random(request.seed)
    if not request.has_picture:
        vocab_size = _llm.llm_engine.model_config.get_vocab_size()
        words = [draw.randrange(FIRST_WORD, vocab_size) for _ in range(request.num_tokens)]
        return {"prompt_token_ids": words}
    letters = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=request.num_tokens))
    text = f"USER: <image>\n{letters}\nASSISTANT:"
    return {"prompt": text, "multi_modal_data": {"image": _picture(draw)}}


def _picture(draw: random.Random) -> Image.Image:
    """Coloured squares, cut into four tiles and an overview by LLaVA-NeXT."""
    pixels = draw.randbytes(3 * PICTURE_GRID**2)
    small = Image.frombytes("RGB", (PICTURE_GRID, PICTURE_GRID), pixels)
    return small.resize((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.NEAREST)


@contextmanager
def _observed(watch: Watch) -> Iterator[Callable[[], tuple[float, ...]]]:
    """Watch the scheduler while the block runs.

    What it gives returns wall time and CPU time from the first step to the last.
    """
    scheduler = _scheduler()
    schedule, update = scheduler.schedule, scheduler.update_from_output
    begun: list[tuple[float, float]] = []
    ended: list[tuple[float, float]] = []
    spent = 0.0

    def watched_schedule(*args: Any) -> Any:
        nonlocal spent
        begun.append((time.perf_counter(), time.process_time()))
        watch.begun = begun[0][0]
        before = time.thread_time()
        output = schedule(*args)
        spent = time.thread_time() - before
        _note_step(watch, scheduler, output)
        return output

    def watched_update(output: Any, *args: Any) -> Any:
        before = time.thread_time()
        result = update(output, *args)
        if _only_decodes(output) and len(output.num_scheduled_tokens) == watch.batch:
            watch.cpu_seconds.append(spent + time.thread_time() - before)
        ended.append((time.perf_counter(), time.process_time()))
        _note_tokens(watch, result)
        return result

    def span() -> tuple[float, ...]:
        return tuple(end - begin for begin, end in zip(begun[0], ended[-1], strict=True))

    scheduler.schedule, scheduler.update_from_output = watched_schedule, watched_update
    try:
        yield span
    finally:
        del scheduler.schedule, scheduler.update_from_output


def _only_decodes(output: Any) -> bool:
    return output.total_num_scheduled_tokens == len(output.num_scheduled_tokens) > 0


def _note_step(watch: Watch, scheduler: Any, output: Any) -> None:
    running = scheduler.running
    complete = [one for one in running if one.num_computed_tokens >= one.num_prompt_tokens]
    watch.peak_running = max(watch.peak_running, len(complete))
    watch.preemptions += len(output.preempted_req_ids or ())
    if _only_decodes(output):
        pool = scheduler.kv_cache_manager.block_pool
        watch.block_steps += pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        watch.token_steps += sum(one.num_computed_tokens for one in running)


def _note_tokens(watch: Watch, result: dict[int, Any]) -> None:
    now = time.perf_counter()
    for outputs in result.values():
        for one in outputs.outputs:
            watch.arrivals.setdefault(one.request_id, []).extend([now] * len(one.new_token_ids))


def _latencies(watch: Watch) -> tuple[list[float], list[float]]:
    """Per request: seconds to the first token, and of each other one on average."""
    arrivals = [times for times in watch.arrivals.values() if len(times) > 1]
    first = [times[0] - watch.begun for times in arrivals]
    return first, [(times[-1] - times[0]) / (len(times) - 1) for times in arrivals]


def _keep_statistics(connector: Any) -> None:
    """Sum up what the connector hands to vLLM's metrics, step by step."""
    if connector is None:
        return
    read = connector.get_kv_connector_stats

    def watched_read() -> Any:
        global _compressed
        statistics = read()
        if statistics is not None:
            parts = [one for one in (_compressed, statistics) if one is not None]
            _compressed = connector.build_kv_connector_stats()
            for part in parts:
                _compressed.aggregate(part)
        return statistics

    connector.get_kv_connector_stats = watched_read


def _take_statistics() -> dict[str, Any]:
    global _compressed
    statistics, _compressed = _compressed, None
    return dict(statistics.data) if statistics is not None else {}
