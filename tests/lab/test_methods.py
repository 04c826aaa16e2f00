"""The methods where the right answer is known: with nothing left out, each is full attention."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import answers
import claims
import pytest
import report
import tasks
import torch
from checkpoint import load_model
from decoder import MAX_ANSWER, Asked, Decoder
from lab_model import LabModel, make_model, save
from method_full import full
from method_masks import MaskedPrefill, QKSparse, VerticalSlash
from method_pruning import FastV, HiRED
from method_zipvl import ZipVL, at_random
from methods import METHODS, at_package_defaults
from questions import normal
from seeing import see
from transformers import AutoProcessor

from vllm_zipvl.config import ZipVLConfig

SPEC = LabModel(side=84, layers=4, hidden_size=64, heads=2, vision_layers=1, vision_hidden_size=64)
EVALUATE = Path(__file__).parents[2] / "scripts" / "lab" / "evaluate.py"
NOTHING_LEFT_OUT = {
    "zipvl": ZipVL({"tau": 1.0, "high_bits": 16, "low_bits": 16}),
    "zipvl in chunks": ZipVL({"tau": 1.0, "high_bits": 16, "low_bits": 16}, chunk=40),
    "zipvl, shared prefix": ZipVL(
        {"tau": 1.0, "high_bits": 16, "low_bits": 16}, shares_prefix=True
    ),
    "fastv": FastV(dropped=0.0),
    "hired": HiRED(1.0),
    "qk-sparse": MaskedPrefill(QKSparse(1.0)),
    "minference": MaskedPrefill(VerticalSlash(1.0, 1.0)),
}

# Their attention products are not counted.
OF_SEVERAL_CHUNKS = ("in-chunks", "shared-prefix", "zipvl in chunks", "zipvl, shared prefix")


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
def asked(folder, model) -> list[Asked]:
    processor = AutoProcessor.from_pretrained(folder)
    families = ("objects", "frames", "words")
    return [
        see(model, processor, tasks.example(f, "hard", "test", 0, SPEC.side, 2)) for f in families
    ]


def run(model, method, asked: Asked):
    with torch.inference_mode():
        return method(Decoder(model), asked)


def test_answers_are_compared_by_letters_and_digits() -> None:
    assert normal(" 8 1 Red.") == normal("81 red") != normal("81 rod")


def test_full_answers_as_generate_does(model, asked) -> None:
    for one in asked:
        answer = run(model, full, one).answer
        generated = model.generate(
            inputs_embeds=one.embeddings[None], max_new_tokens=MAX_ANSWER, do_sample=False
        )[0].tolist()
        end = model.config.text_config.eos_token_id
        assert (generated[: generated.index(end)] if end in generated else generated) == answer


@pytest.mark.parametrize("name", NOTHING_LEFT_OUT)
def test_with_nothing_left_out_a_method_is_full_attention(model, asked, name) -> None:
    for one in asked:
        outcome = run(model, NOTHING_LEFT_OUT[name], one)
        assert outcome.answer == run(model, full, one).answer
        assert outcome.kv_bytes == pytest.approx(1.0)
        if name not in OF_SEVERAL_CHUNKS:
            assert outcome.kept == pytest.approx([1.0] * SPEC.layers)
            assert outcome.flops == pytest.approx(1.0)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_costs_a_share_of_full_attention(model, asked, name) -> None:
    outcome = run(model, METHODS[name], asked[0])
    assert len(outcome.kept) == SPEC.layers
    if name in OF_SEVERAL_CHUNKS:
        assert all(map(math.isnan, (*outcome.kept, outcome.flops)))
    else:
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


def test_costs_are_those_of_the_tokens(model, asked) -> None:
    """Heads of 64: 256 bytes a token at 16 bits, 72 at 4 and 40 at 2, parameters included."""
    one, n = asked[0], asked[0].num_tokens
    end = n // 16 * 16
    two_bits = run(model, METHODS["kv2"], one)
    assert two_bits.flops == 1
    # The first block holds the sinks and stays as it is.
    num_compressed = end - 16
    compressed = num_compressed * 40 / 256
    assert two_bits.kv_bytes == pytest.approx((compressed + n - num_compressed) / n)
    first_dense = run(model, METHODS["dense-first-layer"], one)
    adaptive = run(model, METHODS["zipvl"], one)
    assert first_dense.kept[0] == 1 > adaptive.kept[0]
    papers = replace(METHODS["dense-first-layer"], settings={"window": 0, "sinks": 0})
    papers = run(model, papers, one)
    # Kept tokens attend among themselves: their pairs are those of a shorter prompt.
    pairs = [round(x * n) * (round(x * n) + 1) for x in papers.kept]
    assert papers.flops == pytest.approx(sum(pairs) / (n * (n + 1)) / SPEC.layers)
    assert papers.flops < first_dense.flops < 1
    assert first_dense.kv_bytes < 72 / 256 + 32 / n
    # FastV's later layers hold fewer tokens.
    fastv = run(model, FastV(2, 0.5), one)
    assert fastv.kv_bytes == pytest.approx((2 + 2 * fastv.kept[-1]) / 4)


def test_random_choices_differ_by_layer_and_question() -> None:
    masses = [torch.rand(100, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    config, is_recent = ZipVL({"ratio": 0.5}).config, torch.arange(100) >= 99
    one, other = (at_random(mass, torch.ones(100), is_recent, config).kept for mass in masses)
    assert int(one.sum()) in (50, 51)
    assert not torch.equal(one, other)


def test_patterns_keep_what_carries_the_attention() -> None:
    n = 40
    places = torch.arange(n)
    weights = torch.full((1, n, n), 0.01)
    weights[0, :, 10] = 0.9
    weights[0, places[7:], places[:-7]] = 5
    pattern = VerticalSlash(vertical=3 / n, slash=5 / n)(weights.tril())[0]
    assert pattern[10:, 10].all(), "the heavy column"
    assert pattern[places[7:], places[:-7]].all(), "the heavy diagonal"
    assert not pattern[30, 15]
    weights = torch.full((1, n, n), 0.01)
    weights[0, :, 10] = 0.9
    keys = QKSparse(0.1)(weights.tril())[0, -1]
    assert keys[10]
    assert int(keys.sum()) <= 4 + 16


def test_hired_keeps_what_the_class_token_attends_to(model, asked) -> None:
    one = asked[0]
    picture = one.pictures[0]
    scores = torch.zeros_like(picture.scores)
    scores[5] = 1
    pictures = [picture._replace(scores=scores)]
    picked, dropped = one.is_image.nonzero()[5], one.is_image.nonzero()[6]

    def last_hidden(changed: torch.Tensor) -> torch.Tensor:
        embeddings = one.embeddings.clone()
        embeddings[changed] += 100
        decoder, found = Decoder(model), []
        decoder.next_token = lambda hidden: found.append(hidden[-1]) or min(decoder.ends)
        with torch.inference_mode():
            HiRED(1 / 36)(decoder, one._replace(embeddings=embeddings, pictures=pictures))
        return found[0]

    nothing = last_hidden(picked[:0])
    assert torch.equal(last_hidden(dropped), nothing)
    assert not torch.allclose(last_hidden(picked), nothing)


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
    with out.open("a") as file:
        file.write('{"family": "obj')
    both = evaluate(folder, out, "full", "fastv")
    assert both[: len(rows)] == rows
    assert [list(row["methods"]) for row in both[len(rows) :]] == [["fastv"]] * len(rows)


def test_answers_of_another_model_are_not_mixed_in(folder, tmp_path) -> None:
    out = tmp_path / "rows.jsonl"
    (row, *_) = evaluate(folder, out, "full")
    row["methods"]["full"]["digest"] = "another"
    out.write_text(json.dumps(row) + "\n")
    with pytest.raises(subprocess.CalledProcessError) as stopped:
        evaluate(folder, out, "full")
    assert b"answers of another model or other settings for full" in stopped.value.stderr


def test_other_models_and_folders_are_refused(checkpoint, tmp_path) -> None:
    for folder, message in (
        (checkpoint("llama"), "is of type llama; --model takes a vision-language model"),
        (tmp_path / "none", "there is no such folder"),
        (tmp_path, "has no config of a model"),
        (checkpoint("llava_onevision"), "is of type llava_onevision"),
    ):
        command = [sys.executable, str(EVALUATE), "--model", str(folder), "--methods", "full"]
        command += ["--json", str(tmp_path / "rows.jsonl")]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 1
        assert message in run.stderr
        assert not (tmp_path / "rows.jsonl").exists()


def test_an_evaluation_whose_workers_cannot_start_ends(folder, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(subprocess.CalledProcessError) as stopped:
        evaluate(broken, tmp_path / "rows.jsonl", "full")
    assert b"header" in stopped.value.stderr.lower()


@pytest.mark.parametrize("text", ["notes\nof mine", '{"a": 1}\n', "[1]\n", "{}\n{"])
def test_a_file_of_other_things_is_left_alone(folder, tmp_path, text) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text(text)
    with pytest.raises(subprocess.CalledProcessError) as stopped:
        evaluate(folder, out, "full")
    assert b"answers" in stopped.value.stderr.splitlines()[-1]
    assert out.read_text() == text


def test_a_report_of_an_interrupted_evaluation_leaves_the_part_of_a_row_out(tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"model": "m", "family": "objects", "level": "easy", "index": 0, "question": "?"}
    line = json.dumps({**row, "expected": "red", "expected_tokens": 1, "methods": {}})
    file.write_text(line + "\n" + line[:40])
    assert len(answers.read([file])) == 1
    with pytest.raises(SystemExit, match="No such file"):
        answers.read([tmp_path / "none.jsonl"])


def test_chunks_have_more_than_one_token() -> None:
    chunks = [chunk.tolist() for chunk in ZipVL(chunk=4)._chunks(2, 11)]
    assert chunks == [[2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert len(ZipVL()._chunks(0, 9)) == 1


def test_the_package_defaults_are_the_engines() -> None:
    methods = {name: at_package_defaults(method) for name, method in METHODS.items()}
    assert methods["zipvl"].config == ZipVLConfig()
    assert methods["zipvl-tau0.9"].config == ZipVLConfig(tau=0.9)
    assert methods["fastv"] == METHODS["fastv"]


def test_all_end_tokens_end_an_answer(model, asked) -> None:
    decoder = Decoder(model)
    whole = run(model, full, asked[0]).answer
    assert len(whole) > 1
    decoder.ends |= {whole[1]}
    with torch.inference_mode():
        assert full(decoder, asked[0]).answer == whole[:1]
    several = SimpleNamespace(
        model=model.model, lm_head=model.lm_head, config=model.config,
        generation_config=SimpleNamespace(eos_token_id=[2, 7]),
    )  # fmt: skip
    assert Decoder(several).ends == {2, 7}


def test_an_unknown_method_is_refused(folder, tmp_path) -> None:
    command = [sys.executable, str(EVALUATE), "--model", str(folder), "--json", str(tmp_path / "x")]
    run = subprocess.run([*command, "--methods", "magic"], capture_output=True, text=True)
    assert run.returncode == 2
    assert "invalid choice: 'magic'" in run.stderr


def test_partial_results_are_not_reported_as_whole(tmp_path) -> None:
    found = {"answer": "red", "kept": [0.5, 0.5], "flops": 0.25, "kv_bytes": 0.2}
    rows = [
        {
            "model": "m", "family": "objects", "level": "easy", "index": i, "question": "?",
            "expected": "red" if i < 3 else "blue", "expected_tokens": 1,
            "methods": {"full": found, **({"zipvl": found} if i < 2 else {})},
        }
        for i in range(4)
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = answers.read([file])
    table = report.methods_table(questions, ["full", "zipvl", "none"], num_planned=4)
    full_line, zipvl_line, none_line = table.splitlines()[2:]
    assert full_line.startswith("| full | 50.0 | 75.0 | 20.0 | 75.0 |")
    assert zipvl_line.startswith("| zipvl (2 of 4 questions) | 50.0")
    assert none_line == "| none (0 of 4 questions) |  |  |  |  |  |  |"
    assert "| full (4 of 12 questions) |" in report.methods_table(questions, ["full"], 12)


def test_a_report_of_few_methods_has_the_figures_it_can_have(tmp_path, monkeypatch, capsys) -> None:
    rows = []
    for family in tasks.FAMILIES:
        for level in ("easy", "hard"):
            found = {"answer": "red blue red", "kept": [0.5, 0.4], "flops": 0.2, "kv_bytes": 0.2}
            row = {"model": "m", "family": family, "level": level, "index": 0, "question": "?"}
            rows.append(
                {
                    **row,
                    "expected": found["answer"],
                    "expected_tokens": 3,
                    "methods": {"full": found},
                }
            )
            rows[-1]["methods"]["zipvl"] = {**found, "answer": "red"}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "report"
    arguments = ["report.py", "--json", str(file), "--out", str(out), "--questions", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    report.main()
    assert {path.name for path in out.iterdir()} == {
        "tables.md", "kept_by_layer.png", "kept_by_task.png", "kv_bytes.png",
    }  # fmt: skip
    assert "| zipvl | 0.0 (0.0 to 24.3) | 0.0 |" in capsys.readouterr().out


def test_the_interval_is_wilsons() -> None:
    low, high = answers.Share(0.9, 100).interval()
    # Wilson's interval for 90 of 100, as in Brown, Cai and DasGupta (2001).
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)


def questions_of(right: dict[str, list[bool]], kept: dict[str, float]) -> list[answers.Question]:
    """Of all families in turn; a method's answers are right where it says so."""
    found = []
    for i in range(len(next(iter(right.values())))):
        methods = {
            name: {"answer": "yes" if is_right[i] else "no", "kept": [kept[name]]}
            for name, is_right in right.items()
        }
        family = list(tasks.FAMILIES)[i % len(tasks.FAMILIES)]
        found.append(answers.Question(family, "easy", i, "?", "yes", 3, methods))
    return found


def test_differences_are_of_the_same_questions() -> None:
    right = [i % 10 > 0 for i in range(1200)]
    wrong = [not value for value in right]
    kept = {"a": 0.5, "b": 0.5, "c": 0.5}
    questions = questions_of({"a": right, "b": right, "c": wrong}, kept)
    value, low, high = claims.difference(questions, "a", "b")
    assert value == 0
    assert low == -high == pytest.approx(-1.96 * (2 / 1202) ** 0.5 / 1202**0.5)
    value, low, high = claims.difference(questions, "a", "c")
    assert value == pytest.approx(0.8)
    # 1.96 times the standard error of values of +1 (90 %) and -1 (10 %).
    assert (high - low) / 2 == pytest.approx(1.96 * (1 - 0.64) ** 0.5 / 1200**0.5, rel=1e-2)


def test_methods_are_compared_on_what_both_have_answered() -> None:
    right = {"a": [True] * 12, "b": [i % 2 > 0 for i in range(12)]}
    questions = questions_of(right, {"a": 0.5, "b": 0.5})
    del questions[0].methods["b"]
    line = report.differences_table(questions, [["a", "b"]]).splitlines()[-1]
    assert line.startswith("| a over b | 11 | +45.5 points (")


def test_few_questions_without_a_difference_prove_nothing() -> None:
    questions = questions_of({"a": [True] * 12, "b": [True] * 12}, {"a": 0.5, "b": 0.5})
    assert claims.difference(questions, "a", "b").verdict(-0.01) == "open"
    assert claims.difference([], "a", "b").verdict(-0.01) == "open"


def test_questions_that_only_one_method_answered_do_not_count() -> None:
    questions = questions_of({"a": [True] * 4, "b": [True, False] * 2}, {"a": 0.5, "b": 0.5})
    del questions[0].methods["b"]
    assert claims.difference(questions, "a", "b").value == pytest.approx(2 / 3)


def test_kept_shares_of_two_families_are_compared_with_their_spread() -> None:
    a, b = [0.5, 0.6, 0.7] * 10, [0.4, 0.5, 0.6] * 10
    value, low, high = claims.difference_of_means(a, b)
    assert value == pytest.approx(0.1)
    # Welch: two variances of 1/145 over 30 each.
    assert high - value == pytest.approx(1.96 * (2 / 145 / 30) ** 0.5)
    assert value - low == pytest.approx(high - value)


@pytest.mark.parametrize(
    ("value", "half", "verdict"), [(0, 0.005, "shown"), (-0.05, 0.01, "refuted"), (0, 0.02, "open")]
)
def test_a_claim_is_open_while_its_interval_spans_the_bound(value, half, verdict) -> None:
    assert claims.Difference(value, value - half, value + half).verdict(-0.01) == verdict


def test_claims_are_measured_against_what_they_name() -> None:
    right = [True] * 1200
    some = [i % 4 > 0 for i in range(1200)]
    methods = {"full": right, "zipvl": right, "zipvl-16/16": right, "fastv": some}
    methods |= {"fixed-0.2": some, "fixed-0.4": some, "fixed-0.6": right, "hired-0.4": right}
    kept = {"full": 1.0, "zipvl": 0.5, "zipvl-16/16": 0.5, "fastv": 0.53}
    kept |= {"fixed-0.2": 0.2, "fixed-0.4": 0.4, "fixed-0.6": 0.6, "hired-0.4": 0.4}
    methods |= {"zipvl-tau0.9": some, "zipvl-tau0.99": right}
    kept |= {"zipvl-tau0.9": 0.43, "zipvl-tau0.99": 0.7}
    lines = claims.claims_table(questions_of(methods, kept), list(methods)).splitlines()[2:]
    verdicts = [line.split(" | ")[-1].removesuffix(" |") for line in lines]
    # Of full twice, FastV, HiRED (none keeps as little), adaptation of two families (none here),
    # the fixed shares of 0.4 and 0.6 (as good as zipvl), bits.
    expected = ["shown", "shown", "shown", "not comparable", "open", "open", "shown", "open"]
    assert verdicts == [*expected, "shown"]
    assert lines[2].startswith("| zipvl better than fastv")
    assert "fixed-0.4" in lines[6]
    assert "fixed-0.6" in lines[7]
    methods["zipvl-tau0.85"], kept["zipvl-tau0.85"] = right, 0.39
    kept["zipvl"] = 0.56
    lines = claims.claims_table(questions_of(methods, kept), list(methods)).splitlines()[2:]
    assert lines[1].endswith("| 56.0 % kept | refuted |")
    assert lines[3].startswith("| zipvl-tau0.85 better than hired-0.4")
    assert lines[3].endswith("| open |")


def test_claims_about_families_that_were_not_asked_are_left_out() -> None:
    questions = questions_of({"zipvl": [True] * 12}, {"zipvl": 0.5})
    albums = [q._replace(family="album", num_tokens=1) for q in questions]
    assert len(claims.claims_table(albums, ["zipvl"]).splitlines()) == 2


@pytest.mark.parametrize(
    ("changed", "message"), [({"question": "!"}, "other rows ask"), ({"model": "n"}, "2 models")]
)
def test_rows_that_do_not_belong_together_are_refused(tmp_path, changed, message) -> None:
    row = {
        "model": "m", "family": "objects", "level": "easy", "index": 0, "question": "?",
        "expected": "red", "expected_tokens": 1, "methods": {},
    }  # fmt: skip
    files = [tmp_path / "a", tmp_path / "b"]
    files[0].write_text(json.dumps(row) + "\n")
    files[1].write_text(json.dumps(row | changed) + "\n")
    with pytest.raises(SystemExit, match=message):
        answers.read(files)
