"""The fast runner of the lab on pretrained weights does what the oracle does."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import real
import real_answers
import real_model
import real_report
import real_text
import torch
from real_answers import Work, divergence
from real_cache import BLOCK_SIZE, Cache
from real_methods import METHODS, Method, cut, sparse
from real_rules import Rule
from real_run import Prompt, Runner
from real_text import Stretch, Texts

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import UNQUANTISED
from vllm_zipvl.hf import NAME, ZipVLCache

PROMPT, ANSWER = 300, 10
SHORT = {"probe_recent": 16, "probe_random": 16, "min_tokens": 80}
WANTED = os.environ.get("ZIPVL_REAL_MODEL")


@pytest.fixture(scope="module")
def folder(checkpoint) -> Path:
    return checkpoint("llama", layers=3, dtype="float32", sharpen=4.0)


@pytest.fixture(autouse=True)
def little(monkeypatch) -> None:
    """A little of the text, which has a token per byte here."""
    text = topics["assert"] * 10
    monkeypatch.setattr(real_text, "material", lambda: text)


def of_oracle(
    model, ids: torch.Tensor, answer: torch.Tensor, method: Method
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of the answer's tokens, decoded one by one, and what each layer kept."""
    prefill, cache = method.prefill, method.cache
    config = ZipVLConfig(
        tau=prefill.rule.tau,
        window=prefill.window,
        sinks=prefill.sinks,
        probe_recent=prefill.probe_recent,
        probe_random=prefill.probe_random,
        min_tokens=prefill.min_tokens,
        high_bits=cache.high_bits,
        low_bits=cache.low_bits,
    )
    model.config._attn_implementation = NAME
    past = ZipVLCache(config)
    with torch.inference_mode():
        for chunk in prefill.chunks(len(ids)):
            out = model(ids[None, chunk], past_key_values=past, use_cache=True)
        logits = [out.logits[0, -1]]
        kept = [selection.kept.clone() for selection in past.selections()]
        for token in answer[:-1]:
            out = model(token[None, None], past_key_values=past, use_cache=True)
            logits.append(out.logits[0, -1])
    return torch.stack(logits), kept


def check_agreement(model, ids: torch.Tensor, answer: torch.Tensor, method: Method) -> None:
    expected, kept = of_oracle(model, ids, answer, method)
    runner = Runner(model)
    prompt: Prompt = runner.prefill(ids, method.prefill)
    found = runner.answer(prompt, answer, method.cache)
    assert all(
        torch.equal(view.kept[0], other) for view, other in zip(prompt.views, kept, strict=True)
    )
    expected, found = expected.log_softmax(-1), found.log_softmax(-1)
    if method.cache.high_bits == UNQUANTISED:
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    else:
        # Sums in another order, and a code may fall on the other side of a rounding.
        assert abs(divergence(expected, found)) < 1e-3


@pytest.mark.parametrize("bits", [(16, 16), (8, 4), (4, 2), (16, 0)])
@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize("paper", [False, True])
def test_the_runner_agrees_with_the_oracle(folder, bits, chunk, paper):
    model, tokenizer = real_model.load(folder)
    ids = Texts(tokenizer).ids[: PROMPT + ANSWER]
    near = {"window": 0, "sinks": 0} if paper else {"window": 24, "sinks": 3}
    cache = Cache(*bits, Rule(tau=0.9), head=0 if paper else BLOCK_SIZE)
    method = replace(sparse(0.9, **near, **SHORT, chunk=chunk), cache=cache)
    check_agreement(model, ids[:PROMPT], ids[PROMPT:], method)


@pytest.mark.skipif(not WANTED, reason="by hand: ZIPVL_REAL_MODEL=DIR, or =fetch for SmolLM2")
@pytest.mark.parametrize("name", ["full", "zipvl", "paper-tau0.9", "cut-256-0.9"])
def test_the_runner_agrees_with_the_oracle_on_pretrained_weights(name):
    place = real_model.fetch() if WANTED == "fetch" else Path(WANTED)
    model, tokenizer = real_model.load(place)
    stretch = Texts(tokenizer).stretch(700, 1)
    check_agreement(model, stretch.prompt, stretch.answer[:ANSWER], METHODS[name])


def test_nothing_left_out_is_full_attention(folder):
    model, tokenizer = real_model.load(folder)
    ids = Texts(tokenizer).ids[: PROMPT + ANSWER]
    runner = Runner(model)
    whole = sparse(1.0, **SHORT)
    full = runner.answer(runner.prefill(ids[:PROMPT], whole.prefill), ids[PROMPT:], Cache())
    model.config._attn_implementation = "sdpa"
    with torch.inference_mode():
        expected = model(ids[None, :-1]).logits[0, PROMPT - 1 :]
    torch.testing.assert_close(full, expected, atol=1e-4, rtol=1e-4)
    for method in (cut(whole, 100), sparse(1.0, sets="head", window=8, **SHORT)):
        prompt = Runner(model).prefill(ids[:PROMPT], method.prefill)
        assert prompt.pairs == pytest.approx([1.0] * 3)
        torch.testing.assert_close(prompt.logits, full[0], atol=1e-4, rtol=1e-4)


@pytest.fixture
def run(folder, monkeypatch, tmp_path):
    """`run(*arguments)`: rows of the program, on prompts of 96 tokens."""

    def run_in_process(*arguments: str, model: Path = folder) -> list[dict]:
        out = tmp_path / "rows.jsonl"
        command = ["real.py", "--json", out, "--model", model, "--tokens", "96", *arguments]
        monkeypatch.setattr("sys.argv", [*map(str, command)])
        real.main()
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run_in_process


def test_a_study_goes_on_after_an_interruption(run, tmp_path):
    out = tmp_path / "rows.jsonl"
    some = ("--methods", "full", "zipvl-tau0.9", "cache-4/2-tau0.9", "cut-256-0.9")
    both = ("--docs", "2", "--tasks", "text", "facts", *some)
    rows = run(*both)
    assert len(rows) == 2 * 2 * 4
    full = [row for row in rows if row["method"] == "full"]
    assert all(row["kl"] == 0 and row["same"] == 1 and row["pairs"] == 1 for row in full)
    assert all(0 < row["kv_bytes"] < 1 for row in rows if row["method"].startswith("cache"))
    # A prompt shorter than its first chunk is not cut.
    assert all(row["kl_whole"] == 0 for row in rows if row["method"].startswith("cut"))
    lines = out.read_text().splitlines(keepends=True)
    whole = "".join(lines[:7])
    out.write_text(whole + lines[7][:40])
    again = run(*both)
    assert out.read_text().startswith(whole)
    figures = [[{**row, "seconds": 0} for row in some] for some in (rows, again)]
    assert sorted(map(str, figures[0])) == sorted(map(str, figures[1]))
    tables = real_report.report([out], against="cache-4/2-tau0.9")
    assert "text, 96 tokens, 2 stretches (loss" in tables and "right %" in tables
    assert "1.00 (1.00 to 1.00)" in tables


def test_a_short_prompt_begins_with_blocks_of_a_long_one(folder):
    model, tokenizer = real_model.load(folder)
    ids, runner = Texts(tokenizer).ids[:200], Runner(model)
    whole, answer = sparse(1.0, **SHORT).prefill, ids[80:90]
    dense = runner.answer(runner.prefill(ids[:80], whole), answer, Cache())
    found = runner.share(runner.prefill(ids, whole), 64, ids[64:80], answer)
    torch.testing.assert_close(found, dense, atol=1e-4, rtol=1e-4)
    paper = sparse(0.5, window=0, sinks=0, **SHORT).prefill
    other = runner.share(runner.prefill(ids, paper), 64, ids[64:80], answer)
    assert (other - dense).abs().max() > 1e-2


def test_processes_share_the_stretches(run, tmp_path):
    some = ("--docs", "2", "--methods", "full", "zipvl-tau0.9", "random-0.4")
    alone = run(*some)
    (tmp_path / "rows.jsonl").unlink()
    found = run(*some, "--processes", "2")
    figures = [[{**row, "seconds": 0} for row in rows] for rows in (alone, found)]
    assert sorted(map(str, figures[0])) == sorted(map(str, figures[1]))


def test_a_process_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(real_answers, "POLL_SECONDS", 0.1)
    stretch = Stretch("text", 4, 0, torch.tensor([1, 2, 3, 4]), torch.tensor([5]))
    with pytest.raises(SystemExit, match="a process failed"):
        list(real_answers.measured([Work(stretch, ["full"])] * 2, tmp_path, "cpu", 1, 2))


def test_rows_of_something_else_are_refused(run, tmp_path):
    few = ("--docs", "1", "--methods", "full")
    rows, out = run(*few), tmp_path / "rows.jsonl"
    out.write_text(json.dumps({**rows[0], "digest": "other"}) + "\n")
    with pytest.raises(SystemExit, match="choose another file"):
        run(*few)
    out.write_text("no row\n")
    with pytest.raises(SystemExit, match="line 1: no row"):
        run(*few)


def test_facts_need_a_chat_template_and_text_does_not(run, folder, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "chat_template.jinja").unlink()
    few = ("--docs", "1", "--methods", "full")
    assert len(run(*few, model=plain)) == 1
    with pytest.raises(SystemExit, match="no chat template"):
        run(*few, "--tasks", "facts", model=plain)


def test_there_are_only_so_many_stretches(run):
    with pytest.raises(SystemExit, match="stretches of 96 tokens"):
        run("--docs", "1000", "--methods", "full")
