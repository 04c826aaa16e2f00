"""Train the lab's model from scratch; run again to go on after an interruption.

    python scripts/lab/train.py --out DIR --preset cpu --steps 4000

Writes DIR/state.pt (to go on from), DIR/log.jsonl (loss and held-out accuracy) and, at each
evaluation, DIR/model (a checkpoint that transformers and vLLM load). With --blind all pictures are
grey: what that model answers is what guessing from the question is worth. With --albums, one batch
in six is of long prompts; --start and --tower-from take weights of another run's DIR/model.
"""

import argparse
import dataclasses
import json
import math
import shutil
import time
from itertools import islice
from pathlib import Path
from typing import Any

import tasks
import torch
from batches import (
    IGNORED,
    KINDS,
    QUESTIONS,
    Batch,
    TrainingBatches,
    collate,
    loader,
    num_answer_tokens,
)
from examples import LEVELS
from lab_model import PRESETS, LabModel, make_model, save
from torch.nn.functional import normalize
from transformers import AutoModelForImageTextToText

WARM_UP_STEPS = 200
SIGHT_WEIGHT = 0.5
"""Of the vision tower's own loss, beside the loss over answers."""
WORDS_WEIGHT = 0.3
"""Of patches being like the words for what they show, beside the loss over answers."""
COSINE_SCALE = 16
EVALUATED = 48
"""Held-out examples per family and level at an evaluation, with `QUESTIONS` each."""
EVALUATED_AT_ONCE = 64
"""Pictures."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--steps", type=int, required=True, help="of training, all runs")
    parser.add_argument(
        "--tower-steps", type=int, default=0, help="first steps, of the vision tower alone"
    )
    parser.add_argument(
        "--marked-steps",
        type=int,
        default=0,
        help="next steps, lessons of the language model alone on patches that show something",
    )
    parser.add_argument(
        "--lesson-steps", type=int, default=0, help="next steps, lessons of the whole model"
    )
    parser.add_argument(
        "--lesson-families", nargs="+", choices=tasks.FAMILIES, default=list(tasks.FAMILIES)
    )
    parser.add_argument("--batch", type=int, default=32, help="pictures a step")
    parser.add_argument("--rate", type=float, default=5e-4, help="largest learning rate")
    parser.add_argument("--tower-rate", type=float, default=2.5e-3, help="in the tower's steps")
    parser.add_argument("--evaluate-every", type=int, default=500, help="steps")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blind", action="store_true")
    parser.add_argument("--albums", action="store_true")
    parser.add_argument("--start", type=Path, help="checkpoint to start from")
    parser.add_argument("--tower-from", type=Path, help="checkpoint to take the vision tower from")
    arguments = parser.parse_args()
    if arguments.blind and arguments.marked_steps:
        # Which patches show something would tell what there is.
        parser.error("--blind shows grey pictures whole: leave --marked-steps out")
    if PRESETS[arguments.preset].tiles > 1 and arguments.marked_steps:
        parser.error(f"--preset {arguments.preset} shows tiles whole: leave --marked-steps out")
    return arguments


class Trainer:
    """A model, its optimiser, and how far they are."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.spec: LabModel = PRESETS[arguments.preset]
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(arguments.seed)
        self.model = make_model(self.spec)
        if arguments.start:
            self._start(arguments.start)
        if arguments.tower_from:
            started = AutoModelForImageTextToText.from_pretrained(arguments.tower_from)
            self.model.model.vision_tower.load_state_dict(started.model.vision_tower.state_dict())
        self.model.to(self.device)
        vocab = self.model.config.text_config.vocab_size
        # Names what each patch shows, so that the tower learns to see before it is asked.
        self.marks_head = torch.nn.Linear(self.spec.vision_hidden_size, len(KINDS) * vocab)
        # Says from the class token which words a picture shows, as contrastive training would.
        self.words_head = torch.nn.Linear(self.spec.vision_hidden_size, vocab)
        self.heads = torch.nn.ModuleList([self.marks_head, self.words_head]).to(self.device)
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        decayed = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0}]
        self.optimiser = torch.optim.AdamW(groups, lr=arguments.rate, betas=(0.9, 0.98))
        self.step, self.seconds = 0, 0.0
        self.state_file = arguments.out / "state.pt"
        if self.state_file.exists():
            self._resume()

    def _start(self, folder: Path) -> None:
        """Take all weights of a checkpoint; it need not know of tiles."""
        weights = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
        if self.spec.tiles > 1:
            line_end = self.model.model.image_newline
            weights.setdefault("model.image_newline", torch.zeros_like(line_end))
        self.model.load_state_dict(weights)

    def _recipe(self) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        unimportant = ("out", "workers", "evaluate_every")
        given = {k: v for k, v in vars(self.arguments).items() if k not in unimportant}
        paths = {k: str(v) for k, v in given.items() if isinstance(v, Path)}
        return {**given, **paths, "spec": dataclasses.asdict(self.spec)}

    def _resume(self) -> None:
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        for name, value in self._recipe().items():
            stored = state["recipe"].get(name)
            if stored != value:
                raise SystemExit(
                    f"{self.state_file} is of a run with {name} {stored}, not {value}; "
                    "choose another --out"
                )
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds = state["step"], state["seconds"]

    def store(self) -> None:
        """Write the checkpoint and the state, each whole or not at all."""
        model = self.arguments.out / "model"
        save(self.model, self.spec, model.with_suffix(".unfinished"))
        shutil.rmtree(model, ignore_errors=True)
        model.with_suffix(".unfinished").rename(model)
        state = {
            "recipe": self._recipe(),
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
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
        """Warm-up of each stage, and over all a cosine down to a twentieth."""
        share = min(1.0, self.step / self.arguments.steps)
        starts = (0, self._first_asked, self._first_whole)
        stage_start = max(start for start in starts if start <= self.step)
        warm = min(1.0, (self.step - stage_start + 1) / WARM_UP_STEPS)
        largest = self.arguments.rate if self._is_asked else self.arguments.tower_rate
        return largest * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2)

    @property
    def _first_asked(self) -> int:
        return self.arguments.tower_steps

    @property
    def _first_whole(self) -> int:
        return self._first_asked + self.arguments.marked_steps

    @property
    def _is_asked(self) -> bool:
        """Whether the language model trains by now."""
        return self.step >= self._first_asked

    @property
    def _is_whole(self) -> bool:
        """Whether the whole model trains by now."""
        return self.step >= self._first_whole

    @property
    def _teaches_sight(self) -> bool:
        """Whether the heads learn; those that never did beside the tower would teach it noise."""
        return bool(self.arguments.tower_steps) and not self.arguments.blind

    def _on_device(self, batch: Batch) -> Batch:
        return Batch(*(x.to(self.device) for x in batch))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda")

    def _features(self, batch: Batch) -> torch.Tensor:
        """Class token and patches, [num_views, 1 + tokens_per_view, vision_hidden_size]."""
        with self._autocast():
            states = self.model.model.vision_tower(
                batch.pixel_values, output_hidden_states=True
            ).hidden_states
        return states[self.model.config.vision_feature_layer]

    def _marks_logits(self, features: torch.Tensor) -> torch.Tensor:
        """[num_views, tokens_per_view, len(KINDS), vocab]."""
        return self.marks_head(features[:, 1:].float()).unflatten(-1, (len(KINDS), -1))

    def _sight_loss(self, batch: Batch, features: torch.Tensor) -> torch.Tensor:
        """Of naming what the patches show, and which words the picture shows at all."""
        marks = self._marks_logits(features).permute(0, 3, 1, 2)
        losses = torch.nn.functional.cross_entropy(marks, batch.marks, reduction="none")
        is_shown = batch.marks != self.model.config.text_config.pad_token_id
        # Most patches show nothing, and the smallest kinds are the hardest to see: all alike.
        num_shown = is_shown.sum((0, 1))
        of_kinds = (losses * is_shown).sum((0, 1)) / num_shown.clamp(min=1)
        of_patches = of_kinds.mean() + losses[~is_shown].mean()
        words = self.words_head(features[:, 0].float())
        shown = torch.zeros_like(words).scatter_(1, batch.marks.flatten(1), 1)
        return of_patches + torch.nn.functional.binary_cross_entropy_with_logits(words, shown)

    def _projected(self, features: torch.Tensor) -> torch.Tensor:
        """Patches as the language model sees them, [num_views, tokens_per_view, hidden_size]."""
        with self._autocast():
            return self.model.model.multi_modal_projector(features[:, 1:])

    def _image_tokens(self, batch: Batch, projected: torch.Tensor) -> torch.Tensor:
        """What takes the places of image tokens, [num_image_tokens, hidden_size]."""
        if self.spec.tiles == 1:
            return projected[batch.is_given]
        pictures = projected.unflatten(0, (-1, self.spec.num_views))
        sizes = torch.full((len(pictures), 2), self.spec.side)
        model = self.model.model
        packed, _ = model.pack_image_features(
            list(pictures), sizes, "default", image_newline=model.image_newline
        )
        return torch.cat(packed)

    def _words_loss(self, batch: Batch, projected: torch.Tensor) -> torch.Tensor:
        """Of what patches show being near, by angle, to the embeddings of its words."""
        embeddings = self.model.model.get_input_embeddings().weight
        cosines = normalize(projected.float(), dim=-1) @ normalize(embeddings, dim=-1).T
        likely = (COSINE_SCALE * cosines).log_softmax(-1).gather(-1, batch.marks)
        is_shown = batch.marks != self.model.config.text_config.pad_token_id
        return -(likely * is_shown).sum() / is_shown.sum()

    def _logits(self, batch: Batch, projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the answers' tokens alone: logits [num_answer_tokens, vocab] and labels."""
        model = self.model.model
        with self._autocast():
            embeddings = model.get_input_embeddings()(batch.input_ids)
            pictures = self._image_tokens(batch, projected).to(embeddings.dtype)
            is_picture = batch.input_ids == self.model.config.image_token_id
            embeddings = embeddings.masked_scatter(is_picture[..., None], pictures)
            output = model.language_model(
                inputs_embeds=embeddings,
                attention_mask=batch.attention_mask(),
                position_ids=batch.position_ids,
                use_cache=False,
            )
            answers = batch.labels[:, 1:] != IGNORED
            logits = self.model.lm_head(output.last_hidden_state[:, :-1][answers])
        return logits.float(), batch.labels[:, 1:][answers]

    def train_step(self, batch: Batch) -> float:
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate()
        batch = self._on_device(batch)
        trains_tower = self._is_whole or not self._is_asked
        with torch.set_grad_enabled(trains_tower):
            features = self._features(batch)
        loss = torch.zeros((), device=self.device)
        if trains_tower and self._teaches_sight:
            loss = loss + SIGHT_WEIGHT * self._sight_loss(batch, features)
        if self._is_asked:
            projected = self._projected(features)
            logits, labels = self._logits(batch, projected)
            loss = loss + torch.nn.functional.cross_entropy(logits, labels)
            # Grey pictures show nothing that could be named.
            if not self.arguments.blind:
                loss = loss + WORDS_WEIGHT * self._words_loss(batch, projected)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*self.model.parameters(), *self.heads.parameters()], 1.0)
        self.optimiser.step()
        self.step += 1
        return loss.item()

    @torch.inference_mode()
    def accuracy(self) -> dict[str, float]:
        """Share of held-out questions whose answer's tokens are all the likeliest ones.

        Asked about the patches that training shows by now.
        """
        self.model.eval()
        found = {}
        for family in (*tasks.FAMILIES, *(tasks.VARIANTS if self.arguments.albums else ())):
            size = max(1, EVALUATED_AT_ONCE // tasks.num_pictures(family))
            for level in LEVELS:
                right, asked = 0, 0
                for start in range(0, EVALUATED, size):
                    indices = range(start, min(start + size, EVALUATED))
                    side = self.spec.side
                    drawn = [
                        tasks.example(family, level, "validation", i, side, QUESTIONS)
                        for i in indices
                    ]
                    batch = collate(
                        drawn, self.spec, self.arguments.blind, only_marked=not self._is_whole
                    )
                    batch = self._on_device(batch)
                    logits, labels = self._logits(batch, self._projected(self._features(batch)))
                    is_right = (logits.argmax(-1) == labels).tolist()
                    lengths = [
                        num_answer_tokens(question.answer)
                        for example in drawn
                        for question in example.questions
                    ]
                    words = iter(is_right)
                    right += sum(all(list(islice(words, length))) for length in lengths)
                    asked += len(lengths)
                found[f"{family}/{level}"] = round(right / asked, 3)
        self.model.train()
        return found

    @torch.inference_mode()
    def seen(self) -> dict[str, float]:
        """Share of held-out patches that show something and are named rightly, by kind."""
        self.model.eval()
        right, shown = torch.zeros(len(KINDS)), torch.zeros(len(KINDS))
        for family in tasks.FAMILIES:
            drawn = [
                tasks.example(family, "hard", "validation", i, self.spec.side) for i in range(8)
            ]
            batch = self._on_device(collate(drawn, self.spec, self.arguments.blind))
            named = self._marks_logits(self._features(batch)).argmax(-1).cpu()
            marks = batch.marks.cpu()
            is_shown = marks != self.model.config.text_config.pad_token_id
            shown += is_shown.sum((0, 1))
            right += ((named == marks) & is_shown).sum((0, 1))
        self.model.train()
        return dict(zip(KINDS, (right / shown).tolist(), strict=True))

    def run(self, until: int) -> None:
        """Train up to step `until`; the rate follows the steps that were asked for."""
        arguments = self.arguments
        batches = TrainingBatches(
            self.spec,
            arguments.batch,
            self.step,
            arguments.seed,
            arguments.blind,
            arguments.tower_steps,
            arguments.marked_steps,
            arguments.lesson_steps,
            arguments.lesson_families,
            arguments.albums,
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
                if self._is_asked:
                    self.log(accuracy=self.accuracy())
                if self._teaches_sight:
                    self.log(seen=self.seen())
                self.store()
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
