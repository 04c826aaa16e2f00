"""Answer the test set by several methods; run again to go on after an interruption.

    python scripts/lab/evaluate.py --model DIR --methods full zipvl --json OUT.jsonl

OUT gets a line per question: what was asked and expected, and per method the answer, each layer's
share of tokens that attend, and the shares of attention products and cache bytes. Questions and
methods that OUT has already are left out.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from answers import read_rows
from checkpoint import config_of, load_model, picture_side
from decoder import Decoder, Method
from examples import Example
from method_zipvl import ZipVL
from methods import METHODS, at_package_defaults
from questions import Key, add_arguments, draw, questions_digest, test_set
from seeing import see
from tqdm import tqdm

READ = ("*.safetensors", "*.json", "*.jinja")
"""Files of a checkpoint that decide its answers."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path, required=True)
    add_arguments(parser)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    return parser.parse_args()


def answered(out: Path, digests: dict[str, str]) -> set[tuple[Key, str]]:
    """Questions and methods that a file holds; what an interruption left of a line is cut off.

    Raises:
        SystemExit: It holds answers with another digest, or other things.
    """
    if not out.exists():
        return set()
    rows, whole = read_rows(out)
    found = set()
    for row in rows:
        for name, outcome in row["methods"].items():
            if name in digests and outcome["digest"] != digests[name]:
                raise SystemExit(
                    f"{out} has answers of another model or other settings for {name}; "
                    "choose another file"
                )
            found.add((Key(row["family"], row["level"], row["index"]), name))
    os.truncate(out, whole)
    return found


class Run(NamedTuple):
    """What is the same for all rows of a file.

    Attributes:
        model: Digest of the checkpoint.
        methods: By name.
        digests: Per method, of all that decides its answers.
        suffix: Follows every question.
    """

    model: str
    methods: dict[str, Method]
    digests: dict[str, str]
    suffix: str

    @classmethod
    def of(cls, folder: Path, suffix: str, package_defaults: bool) -> "Run":
        found = hashlib.sha256()
        for file in sorted(file for kind in READ for file in folder.glob(kind)):
            found.update(file.read_bytes())
        methods = METHODS
        if package_defaults:
            methods = {name: at_package_defaults(method) for name, method in METHODS.items()}
        questions = questions_digest()
        digests = {}
        for name, method in methods.items():
            config = method.config if isinstance(method, ZipVL) else None
            # Functions show where they lie in memory.
            what = re.sub(r" at 0x[0-9a-f]+", "", repr((method, config, suffix, questions)))
            digests[name] = hashlib.sha256(found.digest() + what.encode()).hexdigest()[:12]
        return cls(found.hexdigest()[:12], methods, digests, suffix)


def describe(
    run: Run, key: Key, example: Example, processor: Any, num_tokens: int
) -> dict[str, Any]:
    """What a row says beside the methods' answers."""
    answer = processor.tokenizer(example.answer, add_special_tokens=False).input_ids
    return {
        "model": run.model,
        **key._asdict(),
        "question": example.question,
        "tokens": num_tokens,
        "expected": example.answer,
        "expected_tokens": len(answer),
    }


class Worker:
    """One process: a model, and questions one by one."""

    def __init__(self, folder: Path, run: Run) -> None:
        torch.set_num_threads(1)
        self.model, self.run = load_model(folder), run
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.side, self.decoder = picture_side(self.model.config), Decoder(self.model)

    @torch.inference_mode()
    def row(self, key: Key, methods: list[str]) -> dict[str, Any]:
        example = draw(key, self.side)
        asked = see(self.model, self.processor, example, self.run.suffix)
        found = {}
        for name in methods:
            outcome = self.run.methods[name](self.decoder, asked)
            found[name] = {
                "digest": self.run.digests[name],
                "answer": self.processor.tokenizer.decode(outcome.answer, skip_special_tokens=True),
                "kept": [round(share, 4) for share in outcome.kept],
                "flops": round(outcome.flops, 4),
                "kv_bytes": round(outcome.kv_bytes, 4),
            }
        row = describe(self.run, key, example, self.processor, asked.num_tokens)
        return {**row, "methods": found}


_worker: Worker | Exception


def _start(folder: Path, run: Run) -> None:
    global _worker
    try:
        _worker = Worker(folder, run)
    except Exception as error:
        # The pool would start another process in its place, and so on.
        _worker = error


def _run(task: tuple[Key, list[str]]) -> dict[str, Any]:
    if isinstance(_worker, Exception):
        raise _worker
    return _worker.row(*task)


def main() -> None:
    arguments = parse_arguments()
    config_of(arguments.model)
    run = Run.of(arguments.model, arguments.suffix, arguments.package_defaults)
    done = answered(arguments.json, run.digests)
    todo = []
    for key in test_set(arguments.questions, arguments.families):
        methods = [name for name in arguments.methods if (key, name) not in done]
        if methods:
            todo.append((key, methods))
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(arguments.workers, _start, (arguments.model, run)) as pool,
        arguments.json.open("a") as file,
    ):
        for row in tqdm(pool.imap(_run, todo, chunksize=4), total=len(todo), unit="question"):
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
