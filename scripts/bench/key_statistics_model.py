"""As key_statistics.py, on text and a pretrained language model: how far its answers move.

    python scripts/bench/key_statistics_model.py --model DIR --json OUT [--markdown]

A prompt of 80 tokens of Python's manual and its true continuation, forced. Every layer attends as
it would in decoding: a token sees compressed keys and values as stored, and newer ones whole. `kl`
is the divergence from full attention, `same` the share of equal first choices.
"""

import argparse
import json
import pydoc_data.topics
import random
from pathlib import Path
from typing import Any

import torch
from aligned_table import aligned
from key_norms import RULES, Rule
from key_statistics import compressions
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vllm_zipvl.core.quantization import through

NAME = "stored_keys"
TAU = 0.975
PROMPT_LEN, NUM_PROBES = 80, 64
BITS = ((4, 2), (4, 4), (8, 8))


class Storing:
    """Attention that stores keys by a rule, or full attention where there is none."""

    rule: str | None = None
    bits: tuple[int, int] = BITS[0]

    def __call__(
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        scaling: float,
        **others: Any,
    ) -> Any:
        if self.rule is None:
            return sdpa_attention_forward(
                module, query, key, value, mask, scaling=scaling, **others
            )
        out = self.attend(query[0] * scaling, key[0], value[0], RULES[self.rule]())
        return out.transpose(0, 1)[None], None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        """[num_heads, num_tokens, head_size], as the arguments."""
        num_heads, n, head_size = query.shape
        query = query.view(len(key), -1, n, head_size)
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        scores = (query @ key[:, None].mT).masked_fill_(hidden, -torch.inf)
        keys, values = key.transpose(0, 1).clone(), value.transpose(0, 1).clone()
        compressed = torch.zeros(n, 1, dtype=torch.long)
        for start, end, step in compressions(PROMPT_LEN, n):
            (rule.follow if start else rule.begin)(keys[start:end])
            probes = scores[:, :, step - (1 if start else NUM_PROBES) : step]
            kept = important(probes.softmax(-1).sum((0, 1, 2))[start:end])
            for own, width in zip((kept, ~kept), self.bits, strict=True):
                places = start + own.nonzero()[:, 0]
                keys[places] = rule.store(keys[places], width)
                values[places] = through(values[places], width)
            compressed[step + 1 :] = end
        keys, values = keys.transpose(0, 1)[:, None], values.transpose(0, 1)[:, None]
        is_stored = torch.arange(n) < compressed
        weights = torch.where(is_stored, query @ keys.mT, scores).softmax(-1)
        out = (weights * is_stored) @ values + (weights * ~is_stored) @ value[:, None]
        return out.reshape(num_heads, n, head_size)


def important(mass: torch.Tensor) -> torch.Tensor:
    """The fewest tokens that carry the share TAU of the mass, bool."""
    ordered, order = mass.sort(descending=True)
    running = ordered.cumsum(0)
    num = int((running < TAU * running[-1]).sum()) + 1
    return torch.zeros(len(mass), dtype=torch.bool).scatter(0, order[:num], True)


def stretches(tokenizer: Any, length: int, num: int) -> list[torch.Tensor]:
    topics = pydoc_data.topics.topics
    texts = [topics[name] for name in sorted(topics)]
    random.Random(3).shuffle(texts)
    ids = tokenizer("\n\n".join(texts), return_tensors="pt").input_ids
    firsts = (i * (ids.shape[1] - length - 1) // num for i in range(num))
    return [ids[:, first : first + length] for first in firsts]


def measure(model: Any, storing: Storing, texts: list[torch.Tensor]) -> list[dict[str, Any]]:
    def forced() -> torch.Tensor:
        logits = [model(text).logits[0, PROMPT_LEN:] for text in texts]
        return torch.stack(logits).log_softmax(-1)

    exact, rows = forced(), []
    for bits in BITS:
        for rule in RULES:
            storing.rule, storing.bits = rule, bits
            found = forced()
            kl = (exact.exp() * (exact - found)).sum(-1).mean(0)
            rows.append(
                {
                    "bits": f"{bits[0]}/{bits[1]}",
                    "rule": rule,
                    "kl": float(kl.mean()),
                    "kl_by_hundred": [float(part.mean()) for part in kl.split(100)],
                    "same": float((found.argmax(-1) == exact.argmax(-1)).float().mean()),
                }
            )
    return rows


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True, help="where the rows are written")
    parser.add_argument("--tokens", type=int, default=600, help="forced after the prompt")
    parser.add_argument("--stretches", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()
    storing = Storing()
    AttentionInterface.register(NAME, storing)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation=NAME
    )
    texts = stretches(tokenizer, PROMPT_LEN + arguments.tokens, arguments.stretches)
    rows = measure(model.eval(), storing, texts)
    lines = [["bits", "rule", "kl", "same", "kl by hundreds"]]
    for row in rows:
        by_hundred = " ".join(f"{kl:.4f}" for kl in row["kl_by_hundred"])
        figures = (f"{row['kl']:.4f}", f"{100 * row['same']:.1f} %", by_hundred)
        lines.append([row["bits"], row["rule"], *figures])
    print(aligned(lines, arguments.markdown))
    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
