"""As quantisation.py, on the keys, values and queries of a LLaVA with drawn pictures.

    python scripts/bench/quantisation_model.py --model DIR --json OUT [--markdown]

The prompts are the accuracy lab's albums. Of each prompt's last tokens every second one probes,
and the others are scored; the keys and values are those of the tokens before them.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from quantisation import (
    BITS,
    KEPT_SHARE,
    NUM_PROBES,
    NUM_QUERIES,
    SCHEMES,
    Sample,
    attend,
    errors,
    kept_mass,
    logits,
    table,
    top,
)
from transformers import AttentionInterface, AutoProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

sys.path.append(str(Path(__file__).parents[1] / "lab"))
import tasks
from checkpoint import load_model, picture_side
from questions import prompt

NAME = "noting_sdpa"
NUM_PROMPTS = 6


def sample(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Sample:
    """One layer of one prompt; heads first, as transformers has them."""
    num_kv_heads, n, _ = key.shape
    first = n - NUM_PROBES - NUM_QUERIES
    keys, values = (x[:, :first].transpose(0, 1) for x in (key, value))
    last = query[:, first:].transpose(0, 1).unflatten(1, (num_kv_heads, -1))
    probes, queries = last[::2], last[1::2]
    kept = top(logits(keys, probes).softmax(-1))
    mass = kept_mass(logits(keys, queries).softmax(-1), kept)
    truth = attend(keys.double(), values.double(), queries.double())
    return Sample(keys, values, queries, kept, mass, truth)


@torch.inference_mode()
def samples(folder: Path) -> list[list[Sample]]:
    """By layer, one of each prompt."""
    model, processor = load_model(folder), AutoProcessor.from_pretrained(folder)
    found: dict[int, list[Sample]] = {}

    def noting(module: Any, query: Any, key: Any, value: Any, *rest: Any, **others: Any) -> Any:
        found.setdefault(module.layer_idx, []).append(sample(query[0], key[0], value[0]))
        return sdpa_attention_forward(module, query, key, value, *rest, **others)

    AttentionInterface.register(NAME, noting)
    model.model.language_model.config._attn_implementation = NAME
    side = picture_side(model.config)
    for index in range(NUM_PROMPTS):
        album = tasks.example("album", "hard", "test", index, side, 1)
        text = prompt(processor, album, album.question)
        model(**processor(images=album.images, text=text, return_tensors="pt"))
    return [found[layer] for layer in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True, help="where the rows are written")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()
    rows = []
    for layer, inputs in enumerate(samples(arguments.model)):
        mass = sum(one.mass for one in inputs) / len(inputs)
        for name, scheme in SCHEMES.items():
            by_bits = zip(*(errors(one, scheme, BITS) for one in inputs), strict=True)
            for pair, values in zip(BITS, by_bits, strict=True):
                rows.append(
                    {
                        "scheme": name,
                        "bits": f"{pair[0]}/{pair[1]}",
                        "layer": layer,
                        "kept_mass": mass,
                        "error_mean": sum(values) / len(values),
                        "error_max": max(values),
                    }
                )
    order = [f"{high}/{low}" for high, low in BITS]
    rows.sort(key=lambda row: order.index(row["bits"]))
    print(
        f"Error, mean (max) over {NUM_PROMPTS} prompts, {100 * KEPT_SHARE:.1f} % of tokens high:\n"
    )
    print(
        table(
            rows,
            ("bits", "layer", "kept_mass"),
            lambda row: f"{row['error_mean']:.3f} ({row['error_max']:.3f})",
            arguments.markdown,
        )
    )
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
