"""Text that comes with every Python, cut into prompts and the answers that are forced."""

import ast
import hashlib
import pydoc_data.topics
import random
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import torch

ANSWER_TOKENS = 64
SHARED_TOKENS, OWN_TOKENS = 384, 32
"""Of a long prompt, the tokens that a short one begins with, and those that follow in it."""
MIN_DOCSTRING = 800
"""Characters; shorter ones are no text."""
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "pydoc_data"}
"""Folders of the standard library: what was installed, and what is no text about it."""


class Stretch(NamedTuple):
    """A prompt and what is forced after it.

    Attributes:
        task: "text", "facts" or "shared".
        tokens: The prompt's length as asked for.
        doc: Which of that task and length.
        prompt: Token ids.
        answer: Token ids.
        shared: So many first tokens of the prompt, as they were computed there, begin a short
            prompt that the answer follows; 0: it follows this prompt.
        own: Token ids that the short prompt computes itself.
    """

    task: str
    tokens: int
    doc: int
    prompt: torch.Tensor
    answer: torch.Tensor
    shared: int = 0
    own: torch.Tensor = torch.empty(0, dtype=torch.int64)

    def digest(self) -> str:
        """Of what is in it: Pythons of other versions bring other text."""
        ids = torch.cat([self.prompt, self.answer, self.own]).numpy().tobytes()
        return hashlib.sha256(f"{len(self.prompt)}".encode() + ids).hexdigest()[:12]


def _docstrings() -> list[str]:
    """Long docstrings of the standard library's own modules, file by file."""
    folder, found = Path(sysconfig.get_path("stdlib")), []
    for file in sorted(folder.rglob("*.py")):
        if LEFT_OUT & {*file.relative_to(folder).parts}:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, kinds)]
        found += [text for text in texts if len(text) >= MIN_DOCSTRING]
    return found


def material() -> str:
    """Python's manual first, then docstrings, each in an order that is always the same."""
    topics = pydoc_data.topics.topics
    parts = []
    for texts in ([topics[name] for name in sorted(topics)], _docstrings()):
        random.Random(3).shuffle(texts)
        parts += texts
    return "\n\n".join(parts)


class Texts:
    """Stretches of one tokenizer.

    Args:
        tokenizer: Of the model.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ids = tokenizer(material(), return_tensors="pt", verbose=False).input_ids[0]

    def num_stretches(self, tokens: int) -> int:
        """How many stretches of a length there are that do not overlap."""
        return len(self.ids) // (tokens + ANSWER_TOKENS)

    def check(self, tokens: int, num: int) -> None:
        """Whether there are `num` stretches of a length.

        Raises:
            SystemExit: There are not.
        """
        if num > self.num_stretches(tokens):
            raise SystemExit(
                f"there are {self.num_stretches(tokens)} stretches of {tokens} tokens, not {num}"
            )

    def stretch(self, tokens: int, doc: int) -> Stretch:
        """A prompt of `tokens` and its true continuation."""
        first = doc * (tokens + ANSWER_TOKENS)
        end = first + tokens
        return Stretch(
            "text", tokens, doc, self.ids[first:end], self.ids[end : end + ANSWER_TOKENS]
        )

    def shared(self, tokens: int, doc: int) -> Stretch:
        """A prompt of `tokens`, and how it goes on after the beginning that a short one has too.

        Raises:
            SystemExit: It is not longer than the short one and its answer.
        """
        long, end = self.stretch(tokens, doc), SHARED_TOKENS + OWN_TOKENS
        if tokens <= end + ANSWER_TOKENS:
            raise SystemExit(f"shared prompts have more than {end + ANSWER_TOKENS} tokens")
        answer, own = long.prompt[end : end + ANSWER_TOKENS], long.prompt[SHARED_TOKENS:end]
        return Stretch("shared", tokens, doc, long.prompt, answer, SHARED_TOKENS, own)
