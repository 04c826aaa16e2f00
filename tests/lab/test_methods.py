"""The methods where the right answer is known: with nothing left out, each is full attention."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import report
import tasks
import torch
from decoder import Asked, Decoder
from lab_model import LabModel, make_model, save
from method_full import full
from method_masks import MaskedPrefill, QKSparse, VerticalSlash
from method_pruning import FastV, HiRED
from method_zipvl import ZipVL
from methods import METHODS
from questions import load_model, see, spec_of

SPEC = LabModel(side=84, layers=4, hidden_size=64, heads=2, vision_layers=1, vision_hidden_size=64)
EVALUATE = Path(__file__).parents[2] / "scripts" / "lab" / "evaluate.py"
NOTHING_LEFT_OUT = {
    "zipvl": ZipVL({"tau": 1.0, "high_bits": 16, "low_bits": 16}),
    "fastv": FastV(dropped=0.0),
    "hired": HiRED(1.0),
    "qk-sparse": MaskedPrefill(QKSparse(1.0)),
    "minference": MaskedPrefill(VerticalSlash(1.0, 1.0)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("lab")
    model = make_model(SPEC)
    for layer in model.model.language_model.layers:
        # Random weights attend almost uniformly otherwise.
        layer.self_attn.q_proj.weight.data *= 20
        layer.self_attn.k_proj.weight.data *= 20
    model.lm_head.weight.data *= 20
    save(model, SPEC, out)
    return out


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def asked(model) -> list[Asked]:
    families = ("objects", "frames", "words")
    return [see(model, tasks.example(f, "hard", "test", 0, SPEC.side), SPEC) for f in families]


def run(model, method, asked: Asked):
    with torch.inference_mode():
        return method(Decoder(model), asked)


def test_the_sizes_of_a_model_are_found(model) -> None:
    assert spec_of(model).tokens_per_image == SPEC.tokens_per_image == 36


def test_full_answers_as_generate_does(model, asked) -> None:
    for one in asked:
        answer = run(model, full, one).answer
        generated = model.generate(
            inputs_embeds=one.embeddings[None], max_new_tokens=len(answer) + 1, do_sample=False
        )
        assert generated[0, : len(answer)].tolist() == answer


@pytest.mark.parametrize("name", NOTHING_LEFT_OUT)
def test_with_nothing_left_out_a_method_is_full_attention(model, asked, name) -> None:
    for one in asked:
        outcome = run(model, NOTHING_LEFT_OUT[name], one)
        assert outcome.answer == run(model, full, one).answer
        assert outcome.kept == pytest.approx([1.0] * SPEC.layers)
        assert (outcome.flops, outcome.kv_bytes) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_costs_a_share_of_full_attention(model, asked, name) -> None:
    outcome = run(model, METHODS[name], asked[0])
    assert len(outcome.kept) == SPEC.layers
    assert all(0 < share <= 1 for share in outcome.kept)
    assert 0 < outcome.flops <= 1
    assert 0 < outcome.kv_bytes <= 1


def test_what_is_dropped_is_what_was_asked_for(model, asked) -> None:
    one = asked[1]
    num_images, n = int(one.is_image.sum()), one.num_tokens
    assert num_images == 4 * 36
    assert run(model, FastV(2, 0.5), one).kept == pytest.approx([1, 1, *[1 - 72 / n] * 2])
    assert run(model, HiRED(0.25), one).kept == pytest.approx([1 - 108 / n] * SPEC.layers)
    fixed = run(model, METHODS["fixed-0.5"], one).kept
    assert all(0.5 <= share <= 0.5 + 17 / n for share in fixed)


def evaluate(folder: Path, out: Path, *methods: str) -> list[dict]:
    command = [sys.executable, str(EVALUATE), "--model", str(folder), "--json", str(out)]
    command += ["--questions", "1", "--workers", "1", "--methods", *methods]
    subprocess.run(command, check=True, capture_output=True)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_an_interrupted_evaluation_goes_on(folder, tmp_path) -> None:
    out = tmp_path / "rows.jsonl"
    rows = evaluate(folder, out, "full")
    assert len(rows) == 2 * len(tasks.FAMILIES)
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    again = evaluate(folder, out, "full")
    assert again == rows
    both = evaluate(folder, out, "full", "fastv")
    assert both[: len(rows)] == rows
    assert [list(row["methods"]) for row in both[len(rows) :]] == [["fastv"]] * len(rows)


def test_an_unknown_method_is_refused(folder, tmp_path) -> None:
    command = [sys.executable, str(EVALUATE), "--model", str(folder), "--json", str(tmp_path / "x")]
    run = subprocess.run([*command, "--methods", "magic"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "invalid choice: 'magic'" in run.stderr


def test_partial_results_are_not_reported_as_whole(tmp_path) -> None:
    found = {"answer": "red", "kept": [0.5, 0.5], "flops": 0.25, "kv_bytes": 0.2}
    rows = [
        {
            "family": "objects", "level": "easy", "index": i, "question": "?", "tokens": 9,
            "expected": "red" if i < 3 else "blue",
            "methods": {"full": found, **({"zipvl": found} if i < 2 else {})},
        }
        for i in range(4)
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = report.methods_table(report.read([file]), ["full", "zipvl"])
    full_line, zipvl_line = table.splitlines()[2:]
    assert full_line.startswith("| full | 50.0 | 75.0 | 20.0 | 75.0 |")
    assert zipvl_line.startswith("| zipvl (2 of 4 questions) | 50.0")


def test_the_interval_is_wilsons() -> None:
    low, high = report.Share(0.9, 100).interval()
    # Wilson's interval for 90 of 100, as in Brown, Cai and DasGupta (2001).
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)
