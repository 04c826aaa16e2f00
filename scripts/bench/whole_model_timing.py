"""Times of what runs on a GPU, by events; on a CPU, by the clock."""

import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple, TypeVar

import torch
from whole_model_decoder import Attend

WARM_UPS = 3
Mark = torch.cuda.Event | float
T = TypeVar("T")


class Prefilled(NamedTuple):
    """Seconds of a prefill, and how many of them went into attention."""

    seconds: float
    attention_seconds: float


class Graphed(NamedTuple):
    """A step, and why it is not replayed from a CUDA graph, if it is not."""

    step: Callable[[], object]
    not_captured: str | None


class Pace(NamedTuple):
    """Seconds per decode step with all that comes between steps, and without."""

    seconds: float
    step_seconds: float


class Run(NamedTuple):
    """Decode steps: what undoes them, one of them, and what has to be done after each."""

    rewind: Callable[[], None]
    step: Callable[[], object]
    after: Callable[[], None]


def _repeated(run: Callable[[], T], repeats: int) -> list[T]:
    """The results of `repeats` runs after a first one, or of that one alone."""
    found = [run() for _ in range(repeats + 1)]
    return found[1:] or found


class Clock:
    """Of one device. What is repeated is run once more before, and that is not counted."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Mark, end: Mark) -> float:
        if isinstance(start, float):
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def median_of(self, run: Callable[[], object], repeats: int) -> float:
        """Seconds of one run."""

        def once() -> float:
            start = self.mark()
            run()
            return self.between(start, self.mark())

        return median(_repeated(once, repeats))

    def prefill(self, run: Callable[[Attend], object], attend: Attend, repeats: int) -> Prefilled:
        """Medians."""
        found = _repeated(lambda: self._prefill_once(run, attend), repeats)
        return Prefilled(*(median(values) for values in zip(*found, strict=True)))

    def _prefill_once(self, run: Callable[[Attend], object], attend: Attend) -> Prefilled:
        spans = []

        def attend_timed(*arguments) -> torch.Tensor:
            start = self.mark()
            out = attend(*arguments)
            spans.append((start, self.mark()))
            return out

        start = self.mark()
        run(attend_timed)
        seconds = self.between(start, self.mark())
        return Prefilled(seconds, sum(self.between(*span) for span in spans))

    def pace(self, run: Run, num_steps: int, repeats: int) -> Pace:
        """The repetition of median length."""
        found = _repeated(lambda: self._pace_once(run, num_steps), repeats)
        return sorted(found)[len(found) // 2]

    def _pace_once(self, run: Run, num_steps: int) -> Pace:
        run.rewind()
        spans, start = [], self.mark()
        for _ in range(num_steps):
            before = self.mark()
            run.step()
            spans.append((before, self.mark()))
            run.after()
        seconds = self.between(start, self.mark()) / num_steps
        return Pace(seconds, median(self.between(*span) for span in spans))

    def captured(self, step: Callable[[], object]) -> Graphed:
        """The step as a CUDA graph, after a few runs; as it is where it cannot be captured."""
        if self.device.type != "cuda":
            step()
            return Graphed(step, "it runs on a CPU")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                step()
        except RuntimeError as error:
            torch.cuda.synchronize()
            return Graphed(step, str(error).splitlines()[0])
        return Graphed(graph.replay, None)
