"""Write the checkpoint that comes with the project: bfloat16, and the logs of its training.

    python scripts/lab/ship.py --runs RUN [RUN ...] --out scripts/lab/model

RUNs are folders of `train.py`, in the order in which one started from the other.
"""

import argparse
import shutil
from pathlib import Path

import torch
from checkpoint import picture_side
from lab_model import LabModel, save
from transformers import AutoModelForImageTextToText

LARGEST_FILE = 16 * 2**20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    out, last = arguments.out, arguments.runs[-1]
    unfinished = out.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model = AutoModelForImageTextToText.from_pretrained(last / "model", dtype=torch.bfloat16)
    vision, side = model.config.vision_config, picture_side(model.config)
    save(model, LabModel(side, side // vision.image_size, vision.patch_size), unfinished)
    for place, run in enumerate(arguments.runs):
        (unfinished / f"training-{place}.jsonl").write_text((run / "log.jsonl").read_text())
    if (card := out / "README.md").exists():
        shutil.copy(card, unfinished)
    for file in unfinished.iterdir():
        if file.stat().st_size > LARGEST_FILE:
            raise SystemExit(f"{file} has {file.stat().st_size} bytes, more than {LARGEST_FILE}")
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)


if __name__ == "__main__":
    main()
