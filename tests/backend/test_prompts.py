"""Choosing a prompt's tokens: whole or cut, at once or after the first token."""

from typing import Any

import pytest
import torch

from vllm_zipvl.backend.prompts import ProbeQueries, PromptSelector
from vllm_zipvl.cache.messages import ChunkPlan
from vllm_zipvl.cache.spec import CacheRules
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import PageGeometry

NUM_TOKENS, NUM_LAYERS, SLOT = 1000, 2, 3
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4, 2, 32
SCALE = HEAD_SIZE**-0.5
NUM_PLANTED = 150
RECENT = 64


def make_selector(**settings: Any) -> PromptSelector:
    geometry = PageGeometry(NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE, 4, 16, 4, 2)
    config = ZipVLConfig(**{"ratio": NUM_PLANTED / NUM_TOKENS, **settings})
    return PromptSelector(CacheRules(config, geometry), lambda mass: mass)


class Prompt:
    """Queries that look in one direction, and some keys of each layer that point there."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(HEAD_SIZE, generator=generator)
        direction /= direction.norm()
        shape = (NUM_LAYERS, NUM_TOKENS)
        noise = torch.randn(*shape, NUM_HEADS + NUM_KV_HEADS, HEAD_SIZE, generator=generator)
        self.queries, self.keys = (0.1 * noise).split([NUM_HEADS, NUM_KV_HEADS], dim=2)
        self.queries += 20 * direction
        self.planted = torch.zeros(shape, dtype=torch.bool)
        for layer in range(NUM_LAYERS):
            # Not among the recent ones, which are kept in any case.
            places = torch.randperm(NUM_TOKENS - RECENT, generator=generator)[:NUM_PLANTED]
            self.planted[layer, places] = True
            self.keys[layer, places] += 2 * direction

    def run(self, selector: PromptSelector, chunk_size: int) -> None:
        for start in range(0, NUM_TOKENS, chunk_size):
            end = min(start + chunk_size, NUM_TOKENS)
            chunk = ChunkPlan("r", SLOT, 7, start, end, end == NUM_TOKENS, False)
            for layer in range(NUM_LAYERS):
                query, key = self.queries[layer, start:end], self.keys[layer, :end]
                selector.select(layer, chunk, query, key, SCALE)
            selector.finish_chunk(chunk)

    def masks(self, selector: PromptSelector, chunk_size: int = NUM_TOKENS) -> torch.Tensor:
        self.run(selector, chunk_size)
        return torch.stack(selector.take_masks(SLOT, NUM_LAYERS, lambda layer: self.keys[layer]))


@pytest.mark.parametrize("chunk_size", [1000, 600, 256])
def test_what_carries_the_attention_is_kept_whole_or_cut(chunk_size: int) -> None:
    prompt = Prompt()
    expected = prompt.planted.clone()
    # The last chunk's recent probes are kept too.
    expected[:, -RECENT:] = True
    assert torch.equal(prompt.masks(make_selector(), chunk_size), expected)


@pytest.mark.parametrize("chunk_size", [600, 256, 100])
def test_a_cut_prompt_keeps_nearly_as_many(chunk_size: int) -> None:
    prompt, selector = Prompt(), make_selector(ratio=None, tau=0.9)
    whole, cut = prompt.masks(selector).sum(1), prompt.masks(selector, chunk_size).sum(1)
    assert (cut - whole).abs().max() <= 0.05 * NUM_TOKENS


@pytest.mark.parametrize("chunk_size", [1000, 256])
def test_waiting_probes_choose_what_they_would_have_chosen_at_once(chunk_size: int) -> None:
    prompt = Prompt()
    # Both attend densely before the last chunk, where only the second one selects at once.
    waiting = make_selector(min_tokens=NUM_TOKENS + 1)
    at_once = make_selector(min_tokens=NUM_TOKENS)
    assert torch.equal(prompt.masks(waiting, chunk_size), prompt.masks(at_once, chunk_size))


def test_a_last_chunk_of_one_token_chooses_as_if_selected_at_once() -> None:
    prompt, at_once, single = Prompt(), make_selector(), make_selector()
    expected = prompt.masks(at_once, NUM_TOKENS - 1)
    last, select = NUM_TOKENS - 1, single.select

    def select_most(layer: int, chunk: ChunkPlan, *rest: Any) -> Any:
        return None if chunk.is_single_token else select(layer, chunk, *rest)

    single.select = select_most
    prompt.run(single, NUM_TOKENS - 1)
    chunk = ChunkPlan("r", SLOT, 7, last, NUM_TOKENS, True, False)
    single.take_single(chunk, (ProbeQueries(x[last:], SCALE) for x in prompt.queries))
    masks = single.take_masks(SLOT, NUM_LAYERS, lambda layer: prompt.keys[layer])
    assert torch.equal(torch.stack(masks), expected)


def test_dense_prompts_are_not_probed_before_their_first_token() -> None:
    selector, prompt = make_selector(sparse_prefill=False), Prompt()
    selector._choose = None
    prompt.run(selector, NUM_TOKENS)


def test_a_prompt_that_is_not_compressed_leaves_nothing() -> None:
    selector = make_selector(compress=False, min_tokens=NUM_TOKENS)
    Prompt().run(selector, 256)
    assert not selector._prompts


def test_a_prompt_too_short_to_be_compressed_is_not_probed() -> None:
    selector = make_selector()
    chunk = ChunkPlan("r", SLOT, 7, 0, 40, True, False)
    query, key = torch.randn(40, NUM_HEADS, HEAD_SIZE), torch.randn(40, NUM_KV_HEADS, HEAD_SIZE)
    assert selector.select(0, chunk, query, key, SCALE) is None
    assert not selector._prompts


def test_a_cap_below_tau_1_keeps_what_carries_the_attention() -> None:
    prompt = Prompt()
    selector = make_selector(ratio=None, tau=1.0, max_kept=NUM_PLANTED / NUM_TOKENS)
    expected = prompt.planted.clone()
    expected[:, -RECENT:] = True
    assert torch.equal(prompt.masks(selector), expected)


@pytest.mark.parametrize("max_kept", [0.01, 0.2, 0.9])
def test_the_reserve_covers_what_a_cap_lets_through(max_kept: float) -> None:
    selector = make_selector(max_kept=max_kept, ratio=1.0)
    masks = Prompt().masks(selector)
    rules, end = selector.rules, selector.rules.compressible_end(NUM_TOKENS)
    kept = masks[:, :end].sum(1).tolist()
    geometry = rules.geometry
    pages = sum(geometry.num_pages(k, 4) + geometry.num_pages(end - k, 2) for k in kept)
    assert pages <= rules.num_reserved_pages(NUM_TOKENS)
