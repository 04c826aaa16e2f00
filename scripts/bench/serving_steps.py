"""Steps in the process of their engine: waits for the GPU; of decode steps also time and graphs."""

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import serving_engine
from serving_engine import Request

SETTLED = 24
"""Tokens of each request before anything is observed: its prompt is compressed by then."""
SPARE = 8
"""So many steps apart may the requests begin; no tail comes due before the end."""
PROFILED = 4
PACKAGE = "vllm_zipvl/"


class Steps(NamedTuple):
    """What was seen.

    Attributes:
        seconds: Of one step, mean.
        num_steps: In which replays and waits were counted.
        replays: Of CUDA graphs.
        syncs: How often the host waited, by the place in the code: the innermost one in this
            package where there is one. Block boundaries are crossed meanwhile.
        prompt_syncs: The same of the steps before, with prompts and their compression.
        profile: The kernels that took the most time.
    """

    seconds: float
    num_steps: int
    replays: int
    syncs: dict[str, int]
    prompt_syncs: dict[str, int]
    profile: str

    def text(self) -> str:
        waits = "".join(f"\n  waits {n} x at {place}" for place, n in self.syncs.items())
        for place, n in self.prompt_syncs.items():
            waits += f"\n  with prompts waits {n} x at {place}"
        head = f"{1000 * self.seconds:.3f} ms a step, {self.replays} graph replays in "
        return f"{head}{self.num_steps} steps{waits}\n{self.profile}"

    def check(self) -> None:
        """One graph a decode step, and no wait in this package's code.

        Raises:
            RuntimeError: Otherwise.
        """
        for steps, places in (("decode", self.syncs), ("prompt", self.prompt_syncs)):
            ours = {place: n for place, n in places.items() if place.startswith(PACKAGE)}
            if ours:
                raise RuntimeError(f"{steps} steps wait for the GPU: {ours}")
        # Asynchronous scheduling can be one step ahead.
        if abs(self.replays - self.num_steps) > 1:
            raise RuntimeError(f"{self.replays} graph replays in {self.num_steps} decode steps")


def observe(requests: list[Request], num_steps: int) -> Steps:
    """Run the requests; once all of them decode, look at `num_steps` steps in each of two ways."""
    import torch

    engine = serving_engine.running_engine()
    is_cuda = torch.cuda.is_available()
    max_tokens = SETTLED + 2 * num_steps + PROFILED + SPARE
    for request in requests:
        prompt = serving_engine.prompt_of(request)
        parameters = serving_engine.parameters(max_tokens)
        engine.add_request(f"step-{request.seed}", prompt, parameters)
    num_tokens: dict[str, int] = {}
    with _syncs(is_cuda) as prompt_syncs:
        while len(num_tokens) < len(requests) or min(num_tokens.values()) < SETTLED:
            for output in engine.step():
                num_tokens[output.request_id] = len(output.outputs[0].token_ids)
    if max(num_tokens.values()) > max_tokens - 2 * num_steps - PROFILED:
        raise RuntimeError(f"the requests began too far apart: {num_tokens}")

    def run(number: int) -> None:
        for _ in range(number):
            engine.step()
        if is_cuda:
            torch.cuda.synchronize()

    run(0)
    started = time.perf_counter()
    run(num_steps)
    seconds = (time.perf_counter() - started) / num_steps
    with _replays() as replays, _syncs(is_cuda) as syncs:
        for _ in range(num_steps):
            engine.step()
    profile = _profile(lambda: run(PROFILED), is_cuda)
    while engine.has_unfinished_requests():
        engine.step()
    counts = dict(syncs), dict(prompt_syncs)
    return Steps(seconds, num_steps, replays.call_count, *counts, profile)


@contextmanager
def _replays() -> Iterator[Any]:
    """Counts replays of CUDA graphs while the block runs."""
    import torch

    graph = torch.cuda.CUDAGraph
    with mock.patch.object(graph, "replay", autospec=True, side_effect=graph.replay) as replay:
        yield replay


@contextmanager
def _syncs(is_cuda: bool) -> Iterator[Counter[str]]:
    """Counts by place what makes the host wait while the block runs."""
    import torch

    found: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            found[_place(traceback.extract_stack()[:-1])] += 1

    if not is_cuda:
        yield found
        return
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _place(stack: traceback.StackSummary) -> str:
    """The innermost line of this package, else the innermost one."""
    import vllm_zipvl

    package = Path(vllm_zipvl.__file__).parent
    frames = [frame for frame in stack if frame.filename != warnings.__file__]
    ours = [frame for frame in frames if package in Path(frame.filename).parents]
    frame = (ours or frames)[-1]
    path = Path(frame.filename)
    name = path.relative_to(package.parent) if ours else Path(*path.parts[-3:])
    return f"{name}:{frame.lineno} {frame.line}"


def _profile(run: Callable[[], None], is_cuda: bool) -> str:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        run()
    order = "self_cuda_time_total" if is_cuda else "self_cpu_time_total"
    return profiler.key_averages().table(
        sort_by=order, row_limit=20 if is_cuda else 5, max_name_column_width=70
    )
