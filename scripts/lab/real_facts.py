"""One of many codes, told somewhere in a text and asked for at its end."""

import random
from typing import Any

import torch
from real_text import Stretch

NAMES = (
    "Alice Bruno Clara David Emma Felix Grace Hugo Irene Jonas Karen Lucas Maria Nils Olga Peter"
    " Quinn Rosa Simon Tanya Ulrich Vera Walter Yvonne Zoe"
)
NUM_FACTS = 8
NUM_DIGITS = 5


class Facts:
    """Prompts of one tokenizer, through its chat template.

    Args:
        tokenizer: Of the model.
        ids: Tokens of a text without any fact.

    Raises:
        SystemExit: The tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any, ids: torch.Tensor) -> None:
        if not tokenizer.chat_template:
            raise SystemExit("the model has no chat template, which facts need: --tasks text")
        self.tokenizer, self.ids = tokenizer, ids

    def stretch(self, tokens: int, doc: int) -> Stretch:
        """A prompt of about `tokens`, and the code that it asks for."""
        draw = random.Random(1000 * tokens + doc)
        names = draw.sample(NAMES.split(), NUM_FACTS)
        codes = [str(draw.randrange(10 ** (NUM_DIGITS - 1), 10**NUM_DIGITS)) for _ in names]
        first = draw.randrange(max(1, len(self.ids) - tokens))
        num_filler = tokens - len(self._prompt([""] * (NUM_FACTS + 1), names, codes, names[0]))
        parts = self.ids[first : first + max(0, num_filler)].tensor_split(NUM_FACTS + 1)
        asked = draw.randrange(NUM_FACTS)
        filler = [self.tokenizer.decode(part) for part in parts]
        prompt = self._prompt(filler, names, codes, names[asked])
        answer = self.tokenizer(f" {codes[asked]}", add_special_tokens=False).input_ids
        return Stretch("facts", tokens, doc, torch.tensor(prompt), torch.tensor(answer))

    def _prompt(
        self, filler: list[str], names: list[str], codes: list[str], asked: str
    ) -> list[int]:
        """Token ids, up to where the code is to follow."""
        facts = [f"\n\nThe code of {n} is {c}.\n\n" for n, c in zip(names, codes, strict=True)]
        text = filler[0] + "".join(f + t for f, t in zip(facts, filler[1:], strict=True))
        question = f"{text}\n\nWhat is the code of {asked}?"
        message = [{"role": "user", "content": question}]
        chat = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        begun = f"{chat}The code of {asked} is"
        return self.tokenizer(begun, add_special_tokens=False).input_ids
