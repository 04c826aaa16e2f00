"""Train the lab's model from scratch; run again to go on after an interruption.

    python scripts/lab/train.py --out DIR --preset cpu --steps 4000

Writes DIR/state.pt (to go on from), DIR/log.jsonl (loss and held-out accuracy) and, at each
evaluation, DIR/model (a checkpoint that transformers and vLLM load). With --blind all pictures are
grey: what that model answers is what guessing from the question is worth.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import tasks
import torch
from batches import IGNORED, Batch, TrainingBatches, collate, loader
from examples import LEVELS
from lab_model import PRESETS, LabModel, make_model, save

WARM_UP_STEPS = 200
EVALUATED = 48
"""Held-out questions per family and level at an evaluation."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--steps", type=int, required=True, help="of training, all runs")
    parser.add_argument("--batch", type=int, default=32, help="questions a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="largest learning rate")
    parser.add_argument("--evaluate-every", type=int, default=500, help="steps")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true")
    return parser.parse_args()


class Trainer:
    """A model, its optimiser, and how far they are."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.spec: LabModel = PRESETS[arguments.preset]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(arguments.seed)
        self.model = make_model(self.spec).to(self.device)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0}]
        self.optimiser = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.98))
        self.step, self.seconds = 0, 0.0
        self.state_file = arguments.out / "state.pt"
        if self.state_file.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        if state["spec"] != dataclasses.asdict(self.spec) or state["seed"] != self.arguments.seed:
            raise SystemExit(f"{self.state_file} is of another run: {state['spec']}; choose --out")
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds = state["step"], state["seconds"]

    def store(self) -> None:
        """Write the state and the checkpoint, each whole or not at all."""
        state = {
            "spec": dataclasses.asdict(self.spec),
            "seed": self.arguments.seed,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        unfinished = self.state_file.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.rename(self.state_file)

    def log(self, **figures: Any) -> None:
        line = {"step": self.step, "minutes": round(self.seconds / 60, 2), **figures}
        print(json.dumps(line), flush=True)
        with (self.arguments.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def rate(self) -> float:
        """Warm-up, then a cosine down to a twentieth."""
        share = min(1.0, self.step / self.arguments.steps)
        warm = min(1.0, (self.step + 1) / WARM_UP_STEPS)
        return self.arguments.rate * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)

    def _logits(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the answers' tokens alone: logits [num_answer_tokens, vocab] and labels."""
        ids, mask, labels, pictures = (x.to(self.device) for x in batch)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            output = self.model.model(input_ids=ids, attention_mask=mask, pixel_values=pictures)
            answers = labels[:, 1:] != IGNORED
            logits = self.model.lm_head(output.last_hidden_state[:, :-1][answers])
        return logits.float(), labels[:, 1:][answers]

    def train_step(self, batch: Batch) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate()
        logits, labels = self._logits(batch)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.step += 1
        return loss.item()

    @torch.inference_mode()
    def accuracy(self) -> dict[str, float]:
        """Share of held-out questions whose answer's tokens are all the likeliest ones."""
        self.model.eval()
        found = {}
        for family in tasks.FAMILIES:
            for level in LEVELS:
                right = 0
                for start in range(0, EVALUATED, 16):
                    indices = range(start, start + 16)
                    side = self.spec.side
                    drawn = [tasks.example(family, level, "validation", i, side) for i in indices]
                    batch = collate(drawn, self.spec, self.arguments.blind)
                    logits, labels = self._logits(batch)
                    # An answer is one word and the end.
                    right += int((logits.argmax(-1) == labels).view(-1, 2).all(1).sum())
                found[f"{family}/{level}"] = round(right / EVALUATED, 3)
        self.model.train()
        return found

    def run(self, until: int) -> None:
        """Train up to step `until`; the rate follows the steps that were asked for."""
        arguments = self.arguments
        batches = TrainingBatches(
            self.spec, arguments.batch, self.step, arguments.seed, arguments.blind
        )
        self.model.train()
        losses: list[float] = []
        started = time.monotonic()
        drawn = loader(batches, arguments.workers)
        while self.step < until:
            losses.append(self.train_step(next(drawn)))
            now = time.monotonic()
            self.seconds, started = self.seconds + now - started, now
            is_over = self.step == arguments.steps
            if self.step % 50 == 0:
                self.log(loss=round(sum(losses) / len(losses), 4), rate=self.rate())
                losses.clear()
            if self.step % arguments.evaluate_every == 0 or is_over:
                self.log(accuracy=self.accuracy())
                self.store()
                save(self.model, self.spec, arguments.out / "model")
                started = time.monotonic()


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(arguments)
    num = sum(p.numel() for p in trainer.model.parameters())
    trainer.log(parameters=num, preset=arguments.preset, device=trainer.device)
    trainer.run(arguments.steps)


if __name__ == "__main__":
    main()
