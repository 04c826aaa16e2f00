"""Times on a GPU: of runs, of replays from a CUDA graph, and of the kernels that a run launches."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from whole_model_timing import Clock

MILLISECOND = 1e-3
COPIED_BYTES = 2**30
WARM_UP_MILLISECONDS = 50
EMPTIED_BYTES = 2**28
"""More than any L2 cache holds."""
EMPTYING = ("Memset", "FillFunctor<signed char>")
"""In the names of the kernels that empty the L2 cache."""


def milliseconds(run: Callable[[], object], is_dry: bool, repeat: float = 800) -> float:
    """Median of as many runs as take `repeat` milliseconds; the L2 cache is emptied before each."""
    if is_dry:
        run()
        return 1.0
    warm_up = min(WARM_UP_MILLISECONDS, repeat)
    return triton.testing.do_bench(run, warmup=warm_up, rep=repeat, return_mode="median")


def replayed_milliseconds(run: Callable[[], object], is_dry: bool, repeat: float = 800) -> float:
    """Median of a run that engines replay from a CUDA graph."""
    if is_dry:
        return milliseconds(run, is_dry)
    graphed = Clock(torch.device("cuda")).captured(run)
    if graphed.not_captured:
        raise RuntimeError(f"not captured: {graphed.not_captured}")
    return milliseconds(graphed.step, is_dry, repeat)


def copied_bytes_per_second(is_dry: bool, repeat: float = 800) -> float:
    """Read and written by a large copy: the ceiling of any kernel that only reads."""
    source = torch.randint(256, (1024 if is_dry else COPIED_BYTES,), dtype=torch.uint8)
    target = torch.empty_like(source)
    taken = milliseconds(lambda: target.copy_(source), is_dry, repeat)
    return 2 * source.numel() / (taken * MILLISECOND)


class KernelTime(NamedTuple):
    """Of all launches of a kernel in one run."""

    name: str
    milliseconds: float
    launches: float


def kernel_times(run: Callable[[], object], is_dry: bool, repeats: int = 10) -> list[KernelTime]:
    """The kernels that a run launches, the longest first; means of `repeats` runs."""
    device = DeviceType.CPU if is_dry else DeviceType.CUDA
    activity = ProfilerActivity.CPU if is_dry else ProfilerActivity.CUDA
    repeats = 1 if is_dry else repeats
    emptied = torch.empty(1024 if is_dry else EMPTIED_BYTES, dtype=torch.int8)
    run()
    with profile(activities=[activity]) as profiled:
        for _ in range(repeats):
            emptied.zero_()
            run()
        if not is_dry:
            torch.cuda.synchronize()
    totals: dict[str, tuple[float, int]] = {}
    for event in profiled.events():
        if event.device_type == device and not any(name in event.name for name in EMPTYING):
            time, count = totals.get(event.name, (0.0, 0))
            totals[event.name] = (time + event.time_range.elapsed_us(), count + 1)
    found = [KernelTime(n, t / 1000 / repeats, c / repeats) for n, (t, c) in totals.items()]
    return sorted(found, key=lambda kernel: -kernel.milliseconds)
