"""Full attention and a 16-bit cache: what all others are compared with."""

import torch
from decoder import Asked, Decoder, Outcome
from transformers import DynamicCache


def full(decoder: Decoder, asked: Asked) -> Outcome:
    cache = DynamicCache()
    with decoder.attending("sdpa"):
        hidden = decoder.run(asked.embeddings, torch.arange(asked.num_tokens), cache)
        answer = decoder.answer(hidden, asked.num_tokens, cache)
    return Outcome(answer, [1.0] * decoder.num_layers, 1.0, 1.0)
