"""Answer the test set by the real vLLM engine, zipvl or stock; run again to go on.

    python scripts/lab/evaluate_engine.py --model DIR --methods full zipvl --json OUT.jsonl

The rows are those of `evaluate.py`, with the engine's answers under `engine full`, `engine zipvl`.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from checkpoint import config_of, picture_side
from decoder import MAX_ANSWER, Method
from evaluate import Run, answered, describe
from method_zipvl import BLOCK_SIZE, ZipVL
from methods import METHODS
from questions import add_arguments, draw, prompt, test_set
from tqdm import tqdm
from transformers import AutoProcessor

BATCH = 120
"""Questions handed to the engine at once."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    served = [name for name, method in METHODS.items() if is_served(name, method)]
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=served, default=["full", "zipvl"])
    parser.add_argument("--json", type=Path, required=True)
    add_arguments(parser)
    parser.add_argument("--max-model-len", type=int, default=4096, help="tokens of a question")
    return parser.parse_args()


def start(folder: Path, method: Method, max_model_len: int) -> Any:
    """An engine that computes every prompt whole, so that it chooses what the oracle chooses."""
    # On the CPU vLLM would take nearly all memory, and fail where it is not free.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM

    settings: dict[str, Any] = {}
    if isinstance(method, ZipVL):
        settings = {
            "attention_backend": "zipvl",
            "block_size": BLOCK_SIZE,
            "additional_config": {"zipvl": {**method.base, **method.settings}},
        }
    return LLM(
        str(folder),
        dtype="float32",
        max_model_len=max_model_len,
        max_num_seqs=8,
        max_num_batched_tokens=8 * max_model_len,
        limit_mm_per_prompt={"image": 32},
        enforce_eager=True,
        **settings,
    )


def main() -> None:
    arguments = parse_arguments()
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=MAX_ANSWER)
    side = picture_side(config_of(arguments.model))
    processor = AutoProcessor.from_pretrained(arguments.model)
    run = Run.of(arguments.model, arguments.suffix, arguments.package_defaults)
    digests = {f"engine {name}": run.digests[name] for name in arguments.methods}
    done = answered(arguments.json, digests)
    for name in arguments.methods:
        label = f"engine {name}"
        todo = [
            key
            for key in test_set(arguments.questions, arguments.families)
            if (key, label) not in done
        ]
        if not todo:
            continue
        with arguments.json.open("a") as file, tqdm(total=len(todo), unit="question") as bar:
            llm = start(arguments.model, run.methods[name], arguments.max_model_len)
            for first in range(0, len(todo), BATCH):
                keys = todo[first : first + BATCH]
                examples = [draw(key, side) for key in keys]
                requests = [
                    {
                        "prompt": prompt(processor, one, one.question + arguments.suffix),
                        "multi_modal_data": {"image": one.images},
                    }
                    for one in examples
                ]
                outputs = llm.generate(requests, greedy, use_tqdm=False)
                for key, example, output in zip(keys, examples, outputs, strict=True):
                    found = {"digest": digests[label], "answer": output.outputs[0].text}
                    row = describe(run, key, example, processor, len(output.prompt_token_ids))
                    file.write(json.dumps({**row, "methods": {label: found}}) + "\n")
                file.flush()
                bar.update(len(keys))
        llm.llm_engine.engine_core.shutdown()


def is_served(name: str, method: Any) -> bool:
    """Whether a method is stock vLLM or nothing but settings of the plugin."""
    return name == "full" or (isinstance(method, ZipVL) and method == ZipVL(method.settings))


if __name__ == "__main__":
    main()
