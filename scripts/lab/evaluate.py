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
import re
from pathlib import Path
from typing import Any

import tasks
import torch
import transformers
from decoder import Decoder
from examples import Example
from method_zipvl import LAB_SETTINGS
from methods import METHODS
from questions import Key, draw, load_model, see, spec_of, test_set
from tqdm import tqdm


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument(
        "--families", nargs="+", choices=tasks.CHOICES, default=list(tasks.FAMILIES)
    )
    parser.add_argument("--questions", type=int, default=500, help="per family and level")
    parser.add_argument("--suffix", default="", help="follows every question")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    return parser.parse_args()


def answered(out: Path, digests: dict[str, str]) -> set[tuple[Key, str]]:
    """Questions and methods that a file holds.

    Raises:
        SystemExit: It holds answers with another digest.
    """
    if not out.exists():
        return set()
    text = out.read_text()
    # What an interruption left of a line.
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        out.write_text(whole)
    found = set()
    for row in map(json.loads, whole.splitlines()):
        for name, outcome in row["methods"].items():
            if name in digests and outcome["digest"] != digests[name]:
                raise SystemExit(
                    f"{out} has answers of another model or other settings for {name}; "
                    "choose another file"
                )
            found.add((Key(row["family"], row["level"], row["index"]), name))
    return found


def digest(folder: Path, *what: object) -> str:
    """Of a model and of what was done with it."""
    found = hashlib.sha256((folder / "model.safetensors").read_bytes())
    # Functions show where they lie in memory.
    found.update(re.sub(r" at 0x[0-9a-f]+", "", repr(what)).encode())
    return found.hexdigest()[:12]


def method_digests(folder: Path, suffix: str) -> dict[str, str]:
    return {name: digest(folder, suffix, LAB_SETTINGS, method) for name, method in METHODS.items()}


def describe(key: Key, example: Example, processor: Any, num_tokens: int) -> dict[str, Any]:
    """What a row says beside the methods' answers."""
    answer = processor.tokenizer(example.answer, add_special_tokens=False).input_ids
    return {
        **key._asdict(),
        "question": example.question,
        "tokens": num_tokens,
        "expected": example.answer,
        "expected_tokens": len(answer),
    }


class Worker:
    """One process: a model, and questions one by one."""

    def __init__(self, folder: Path, suffix: str) -> None:
        torch.set_num_threads(1)
        self.model, self.suffix = load_model(folder), suffix
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.spec, self.decoder = spec_of(self.model), Decoder(self.model)
        self.digests = method_digests(folder, suffix)

    @torch.inference_mode()
    def row(self, key: Key, methods: list[str]) -> dict[str, Any]:
        example = draw(key, self.spec)
        asked = see(self.model, self.processor, example, self.suffix)
        found = {}
        for name in methods:
            outcome = METHODS[name](self.decoder, asked)
            found[name] = {
                "digest": self.digests[name],
                "answer": self.processor.tokenizer.decode(outcome.answer),
                "kept": [round(share, 4) for share in outcome.kept],
                "flops": round(outcome.flops, 4),
                "kv_bytes": round(outcome.kv_bytes, 4),
            }
        row = describe(key, example, self.processor, asked.num_tokens)
        return {**row, "methods": found}


_worker: Worker


def _start(folder: Path, suffix: str) -> None:
    global _worker
    _worker = Worker(folder, suffix)


def _run(task: tuple[Key, list[str]]) -> dict[str, Any]:
    return _worker.row(*task)


def main() -> None:
    arguments = parse_arguments()
    done = answered(arguments.json, method_digests(arguments.model, arguments.suffix))
    todo = []
    for key in test_set(arguments.questions, arguments.families):
        methods = [name for name in arguments.methods if (key, name) not in done]
        if methods:
            todo.append((key, methods))
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(arguments.workers, _start, (arguments.model, arguments.suffix)) as pool,
        arguments.json.open("a") as file,
    ):
        for row in tqdm(pool.imap(_run, todo, chunksize=4), total=len(todo), unit="question"):
            file.write(json.dumps(row) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
