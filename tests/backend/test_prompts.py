"""Choosing a prompt's tokens: whole or cut, at once or after the first token."""

import gc
import weakref
from typing import Any

import pytest
import torch

from vllm_zipvl.backend.prompts import PromptSelector
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import PageGeometry
from vllm_zipvl.core.sequences import Sequences
from vllm_zipvl.plan import ChunkPlan
from vllm_zipvl.rules import CacheRules

NUM_TOKENS, NUM_LAYERS, SLOT = 1000, 2, 3
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4, 2, 32
SCALE = HEAD_SIZE**-0.5
NUM_PLANTED = 150
RECENT = 64
MAX_TOKENS = 2 * NUM_TOKENS
CPU = torch.device("cpu")


def make_selector(**settings: Any) -> PromptSelector:
    geometry = PageGeometry(NUM_LAYERS, NUM_KV_HEADS, HEAD_SIZE, 4, 16, 4, 2)
    config = ZipVLConfig(**{"ratio": NUM_PLANTED / NUM_TOKENS, "low_bits": 2, **settings})
    return PromptSelector(CacheRules(config, geometry), lambda mass: mass, MAX_TOKENS)


class Prompt:
    """Queries that look in one direction, and some keys of each layer that point there."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
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

    def run(self, selector: PromptSelector, chunk_size: int, slot: int = SLOT) -> None:
        for start in range(0, NUM_TOKENS, chunk_size):
            run_chunks(selector, [(self, chunk_plan(start, start + chunk_size, slot))])

    def masks(
        self, selector: PromptSelector, chunk_size: int = NUM_TOKENS, slot: int = SLOT
    ) -> torch.Tensor:
        self.run(selector, chunk_size, slot)
        return take_masks(selector, {slot: self})[slot]


def chunk_plan(start: int, end: int, slot: int = SLOT, attends_densely: bool = False) -> ChunkPlan:
    end = min(end, NUM_TOKENS)
    return ChunkPlan(f"r{slot}", slot, 7, start, end, end == NUM_TOKENS, attends_densely)


def run_chunks(selector: PromptSelector, chunks: list[tuple[Prompt, ChunkPlan]]) -> None:
    """One step."""
    prompts = {chunk.slot: prompt for prompt, chunk in chunks}
    for batch in selector.batches([chunk for _, chunk in chunks], CPU):
        own = [(prompts[chunk.slot], chunk) for chunk in batch.chunks]
        for layer in range(NUM_LAYERS):
            query = torch.cat([prompt.queries[layer, c.start : c.end] for prompt, c in own])
            key = torch.cat([prompt.keys[layer, : c.end] for prompt, c in own])
            selector.select(layer, batch, query, key, SCALE)
    for _, chunk in chunks:
        selector.finish_chunk(chunk)


def take_masks(selector: PromptSelector, prompts: dict[int, Prompt]) -> dict[int, torch.Tensor]:
    """Of prompts that are compressed at once, by slot."""

    def keys(slots: list[int], contexts: Sequences) -> Any:
        assert contexts.lengths == (NUM_TOKENS,) * len(slots)
        assert contexts.num_tokens <= MAX_TOKENS
        return lambda layer: torch.cat([prompts[slot].keys[layer] for slot in slots])

    selector.choose_waiting(list(prompts), keys, SCALE)
    return {slot: selector.take_masks(slot) for slot in prompts}


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
    last = NUM_TOKENS - 1
    run_chunks(single, [(prompt, chunk_plan(0, last))])
    single.take_single(chunk_plan(last, NUM_TOKENS), prompt.queries[:, last])
    single.finish_chunk(chunk_plan(last, NUM_TOKENS))
    assert torch.equal(take_masks(single, {SLOT: prompt})[SLOT], expected)


def test_prompts_of_a_step_choose_as_each_alone() -> None:
    """Whole ones, later chunks and dense ones side by side, more than fit into a batch."""
    settings = {"ratio": None, "tau": 0.9, "min_tokens": 500}
    prompts, selector = {slot: Prompt(slot) for slot in range(5)}, make_selector(**settings)
    begun = [(prompts[0], chunk_plan(0, 300, 0)), (prompts[3], chunk_plan(0, 600, 3))]
    run_chunks(selector, begun)
    whole = [(prompts[slot], chunk_plan(0, NUM_TOKENS, slot)) for slot in (1, 2)]
    dense = [(prompts[4], chunk_plan(0, NUM_TOKENS, 4, attends_densely=True))]
    late = [(prompts[0], chunk_plan(300, NUM_TOKENS, 0)), (prompts[3], chunk_plan(600, 900, 3))]
    run_chunks(selector, whole + dense + late)
    run_chunks(selector, [(prompts[3], chunk_plan(900, NUM_TOKENS, 3))])
    masks = take_masks(selector, prompts)

    for slot, cuts in ((0, [0, 300]), (1, [0]), (2, [0]), (3, [0, 600, 900])):
        alone = make_selector(**settings)
        for start, end in zip(cuts, [*cuts[1:], NUM_TOKENS], strict=True):
            run_chunks(alone, [(prompts[slot], chunk_plan(start, end, slot))])
        assert torch.equal(masks[slot], take_masks(alone, {slot: prompts[slot]})[slot])
    assert torch.equal(masks[4], prompts[4].masks(make_selector(**settings), slot=4))
    assert not torch.equal(masks[1], masks[2])


def test_dense_prompts_are_not_probed_before_their_first_token() -> None:
    selector, prompt = make_selector(sparse_prefill=False), Prompt()
    selector._accumulate_mass = None
    prompt.run(selector, NUM_TOKENS)


def test_a_prompt_that_is_not_compressed_leaves_nothing() -> None:
    selector = make_selector(compress=False, min_tokens=NUM_TOKENS)
    Prompt().run(selector, 256)
    assert not selector._prompts


def test_a_prompt_too_short_to_be_compressed_is_not_probed() -> None:
    selector = make_selector()
    (batch,) = selector.batches([ChunkPlan("r", SLOT, 7, 0, 40, True, False)], CPU)
    query, key = torch.randn(40, NUM_HEADS, HEAD_SIZE), torch.randn(40, NUM_KV_HEADS, HEAD_SIZE)
    assert selector.select(0, batch, query, key, SCALE) is None
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
    geometry, start = rules.geometry, rules.head_len
    kept = masks[:, start:end].sum(1).tolist()
    rest = [end - start - k for k in kept]
    pages = sum(
        geometry.num_pages(k, 4) + geometry.num_pages(r, 2) for k, r in zip(kept, rest, strict=True)
    )
    assert pages <= rules.num_reserved_pages(NUM_TOKENS)


@pytest.mark.parametrize("settings", [{}, {"sparse_prefill": False}], ids=str)
@pytest.mark.parametrize("is_compressed", [True, False])
def test_nothing_is_held_for_a_prompt_that_is_gone(
    is_compressed: bool, settings: dict[str, Any]
) -> None:
    """Compressed or aborted before; a GPU's memory is not to wait for Python's collector."""
    selector, prompt = make_selector(**settings), Prompt()
    gc.disable()
    try:
        prompt.run(selector, NUM_TOKENS)
        state = weakref.ref(selector._prompts[SLOT])
        if is_compressed:
            take_masks(selector, {SLOT: prompt})
        else:
            selector.forget(SLOT)
        assert state() is None
    finally:
        gc.enable()
