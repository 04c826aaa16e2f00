"""The engine against the oracle in transformers on pretrained weights; by hand.

ZIPVL_REAL_MODEL=DIR pytest -s tests/engine/test_pretrained.py   # "fetch" for SmolLM2
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from zipvl_engine import worker_of, zipvl_engine

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.hf import ZipVLCache

WANTED = os.environ.get("ZIPVL_REAL_MODEL")
pytestmark = pytest.mark.skipif(
    not WANTED, reason="by hand: ZIPVL_REAL_MODEL=DIR, or =fetch for SmolLM2"
)
BLOCK_SIZE = 32
NUM_PROMPTS, NUM_TOKENS, NUM_NEW = 6, 1024, 64


@contextmanager
def noting_kept() -> Iterator[list[torch.Tensor]]:
    """What layers attend to of each chunk, in the order in which they ask."""
    prompts, found = worker_of().prompts, []
    select = prompts.select

    def noting_select(*args: Any) -> torch.Tensor | None:
        kept = select(*args)
        if kept is not None:
            found.append(kept.clone())
        return kept

    prompts.select = noting_select
    try:
        yield found
    finally:
        prompts.select = select


@pytest.fixture(scope="module")
def folder() -> Path:
    sys.path.append(str(Path(__file__).parents[2] / "scripts" / "lab"))
    import real_model

    return real_model.fetch() if WANTED == "fetch" else Path(str(WANTED))


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[torch.Tensor]:
    from real_model import tokenizer_of
    from real_text import Texts

    texts = Texts(tokenizer_of(folder))
    return [texts.stretch(NUM_TOKENS, doc).prompt for doc in range(NUM_PROMPTS)]


@torch.inference_mode()
def forced(
    model: Any, ids: torch.Tensor, answer: list[int], settings: dict[str, Any]
) -> tuple[list[int], list[torch.Tensor]]:
    """The oracle's first choices before each of an answer's tokens, and what its layers kept."""
    cache = ZipVLCache(ZipVLConfig(**settings), BLOCK_SIZE)
    out = model(ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    kept = [selection.kept.clone() for selection in cache.selections()]
    choices = [int(out.logits[0, -1].argmax())]
    for token in answer[:-1]:
        step = torch.tensor([[token]])
        out = model(step, past_key_values=cache, use_cache=True)
        choices.append(int(out.logits[0, -1].argmax()))
    return choices, kept


@pytest.mark.parametrize("bits", [(4, 4), (4, 2), (16, 16)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_first_choices_and_kept_sets(folder, prompts, dtype, bits) -> None:
    settings = {"high_bits": bits[0], "low_bits": bits[1], "min_tokens": NUM_TOKENS // 2}
    common = {"dtype": dtype, "block_size": BLOCK_SIZE, "max_num_seqs": 1}
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=NUM_NEW, ignore_eos=True)
    requests = [{"prompt_token_ids": ids.tolist()} for ids in prompts]
    with zipvl_engine(folder, settings, **common) as llm, noting_kept() as kept:
        outputs = llm.generate(requests, sampling, use_tqdm=False)
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="zipvl", dtype=getattr(torch, dtype)
    )
    num_layers, same, other = model.config.num_hidden_layers, 0, []
    for i, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
        choices, expected = forced(model, ids, answer, settings)
        same += sum(a == b for a, b in zip(choices, answer, strict=True))
        mine = kept[i * num_layers : (i + 1) * num_layers]
        other += [
            float((one != its).float().mean()) for one, its in zip(mine, expected, strict=True)
        ]
    share = same / (NUM_PROMPTS * NUM_NEW)
    differing = sum(other) / len(other)
    print(
        f"{dtype} {settings}: {share:.4f} same, kept sets differ in {differing:.5f}, "
        f"at most {max(other):.5f} of the tokens"
    )
    assert share >= 0.99
    assert differing <= (1e-4 if dtype == "float32" else 0.01)
