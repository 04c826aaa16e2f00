"""One stretch under many methods, in this process or in several."""

import time
from collections.abc import Iterator
from multiprocessing import Queue, get_context
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import real_model
import torch
from real_methods import METHODS, Method
from real_prefill import Prefill
from real_run import Prompt, Runner
from real_text import Stretch

FULL = "full"
WHOLE = {METHODS[FULL], *(method.whole for method in METHODS.values() if method.whole)}
"""What others are compared with."""
Figures = dict[str, Any]
POLL_SECONDS = 5.0
"""After which processes are asked whether they still run."""


class Work(NamedTuple):
    """A stretch, and the names of the methods that are asked of it."""

    stretch: Stretch
    methods: list[str]


class Answers:
    """One stretch under all methods: prefills and full attention's answer are shared.

    Args:
        runner: The model, where tensors are made by default.
        stretch: Prompt and answer.
    """

    def __init__(self, runner: Runner, stretch: Stretch) -> None:
        self.runner = runner
        device = runner.device
        self.ids, self.answer = stretch.prompt.to(device), stretch.answer.to(device)
        self.shared, self.own = stretch.shared, stretch.own.to(device)
        self.prompts: dict[Prefill, Prompt] = {}
        self.compared: dict[Method, torch.Tensor] = {}

    def prompt(self, prefill: Prefill) -> Prompt:
        if prefill not in self.prompts:
            # One beside full attention's is enough: methods come by their prefills.
            self.prompts = dict(list(self.prompts.items())[:1])
            self.prompts[prefill] = self.runner.prefill(self.ids, prefill)
        return self.prompts[prefill]

    def logprobs(self, method: Method) -> torch.Tensor:
        if method in self.compared:
            return self.compared[method]
        prompt = self.prompt(method.prefill)
        if self.shared:
            logits = self.runner.share(prompt, self.shared, self.own, self.answer)
        else:
            logits = self.runner.answer(prompt, self.answer, method.cache)
        found = logits.log_softmax(-1)
        if method in WHOLE:
            self.compared[method] = found
        return found

    def row(self, method: Method) -> Figures:
        """Figures of one method."""
        full, found = self.logprobs(METHODS[FULL]), self.logprobs(method)
        answer = self.answer
        prompt = self.prompt(method.prefill)
        kept = [float(view.kept.float().mean()) for view in prompt.views]
        kv_bytes, high = method.cache.share(prompt.stored(), prompt.views)
        row = {
            "kept": round(sum(kept) / len(kept), 4),
            "pairs": round(sum(prompt.pairs) / len(kept), 4),
            "kv_bytes": round(kv_bytes, 4),
            "high": round(high, 4),
            "loss": round(-float(found.gather(1, answer[:, None]).mean()), 5),
            "kl": round(divergence(full, found), 6),
            "same": round(float((full.argmax(-1) == found.argmax(-1)).float().mean()), 5),
            "right": int((found.argmax(-1) == answer).all()),
        }
        if method.whole is not None:
            row["kl_whole"] = round(divergence(self.logprobs(method.whole), found), 6)
        return row


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL divergence in nats, mean over tokens, of log-probabilities [num_tokens, vocabulary]."""
    return float((p.exp() * (p - q)).sum(-1).mean())


class Measurer:
    """Measures stretches on one device.

    Args:
        folder: Of the model.
        device: "cpu" or "cuda".
        threads: Of torch.
    """

    def __init__(self, folder: Path, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        model, _ = real_model.load(folder)
        self.device = torch.device(device)
        self.runner = Runner(model.to(self.device))

    def rows(self, work: Work) -> Iterator[tuple[str, Figures]]:
        """Name and figures of each method, with the seconds that they took."""
        with self.device:
            answers = Answers(self.runner, work.stretch)
            for name in work.methods:
                began = time.perf_counter()
                row = answers.row(METHODS[name])
                yield name, row | {"seconds": round(time.perf_counter() - began, 2)}


def _share(share: dict[int, Work], how: tuple[Path, str, int], rows: "Queue[Any]") -> None:
    """What one of several processes does; its tensors would not outlive it."""
    measurer = Measurer(*how)
    for index, work in share.items():
        for name, row in measurer.rows(work):
            rows.put((index, name, row))
    rows.put(None)


def measured(
    works: list[Work], folder: Path, device: str, threads: int, processes: int
) -> Iterator[tuple[Stretch, str, Figures]]:
    """Stretch, method and figures, each as it comes; processes share the stretches.

    Raises:
        SystemExit: A process ended before its share was done.
    """
    how = folder, device, threads
    if processes == 1:
        measurer = Measurer(*how)
        for work in works:
            for name, row in measurer.rows(work):
                yield work.stretch, name, row
        return
    context = get_context("spawn")
    rows = context.Queue()
    every = dict(enumerate(works))
    shares = [
        {i: work for i, work in every.items() if i % processes == share}
        for share in range(min(processes, len(works)))
    ]
    running = [context.Process(target=_share, args=(s, how, rows), daemon=True) for s in shares]
    for process in running:
        process.start()
    num_running = len(running)
    while num_running:
        try:
            found = rows.get(timeout=POLL_SECONDS)
        except Empty:
            if any(process.exitcode for process in running):
                raise SystemExit("a process failed; what it printed says why") from None
            continue
        if found is None:
            num_running -= 1
        else:
            index, name, row = found
            yield works[index].stretch, name, row
