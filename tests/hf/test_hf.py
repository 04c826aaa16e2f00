"""The transformers oracle by itself: dense identity, padding, eviction, precision, errors."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.hf import ZipVLCache
from vllm_zipvl.hf.attention import zipvl_attention

KEEP_ALL = ZipVLConfig(tau=1.0, high_bits=16, low_bits=16, interval=16, min_tokens=32)
LOSSY = ZipVLConfig(ratio=0.4, low_bits=2, interval=16, residual=16, min_tokens=64)
TEXTS = ("What is it?", "Which colour is the one on the left, and which the one on the right? " * 3)
PROMPTS = [f"USER: <image>\n{text}\nASSISTANT:" for text in TEXTS]
BLOCK_SIZE = 16
NUM_NEW = 40


def draw_image(angle: int) -> Image.Image:
    return Image.linear_gradient("L").rotate(angle).resize((160, 120)).convert("RGB")


@pytest.fixture(scope="module")
def folder(checkpoint) -> Path:
    return checkpoint("llava", dtype="float32", image_size=112)


def load(folder: Path, attention: str) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation=attention
    )


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder, "zipvl")


@pytest.fixture(scope="module")
def inputs(folder: Path) -> list[Any]:
    """Each prompt alone, and at last both, padded on the left."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    images = [draw_image(50 * i) for i in range(len(PROMPTS))]
    alone = [
        processor(images=image, text=prompt, return_tensors="pt")
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    both = processor(images=images, text=PROMPTS, return_tensors="pt", padding=True)
    return [*alone, both]


def generate(model: Any, inputs: Any, cache: Any = None) -> torch.Tensor:
    output = model.generate(
        **inputs,
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=NUM_NEW,
        min_new_tokens=NUM_NEW,
    )
    return output[:, inputs.input_ids.shape[1] :]


def zipvl_cache(config: ZipVLConfig, **settings: Any) -> ZipVLCache:
    return ZipVLCache(config, BLOCK_SIZE, **settings)


def test_keeping_everything_gives_the_tokens_of_sdpa(folder, model, inputs) -> None:
    stock = load(folder, "sdpa")
    for given in inputs:
        cache = zipvl_cache(KEEP_ALL)
        assert torch.equal(generate(model, given, cache), generate(stock, given))
        for request in cache.layers[-1].requests.values():
            assert request.compressed_len > cache.compressible(request.prompt_len), "tails too"


@pytest.mark.parametrize("low_bits", [2, 0])
def test_a_padded_row_is_the_row_alone(model, inputs, low_bits) -> None:
    config = ZipVLConfig(**{**vars(LOSSY), "low_bits": low_bits})
    *alone, both = inputs
    padded = zipvl_cache(config)
    outputs = generate(model, both, padded)
    for row, given in enumerate(alone):
        cache = zipvl_cache(config)
        assert torch.equal(generate(model, given, cache)[0], outputs[row])
        for mine, its in zip(cache.prompt_masks(0), padded.prompt_masks(row), strict=True):
            assert torch.equal(mine, its)


def attended(config: ZipVLConfig) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Output, kept mask, and queries, keys and values of one layer on 120 tokens."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 120, 32) for heads in (4, 2, 2))
    cache = zipvl_cache(config)
    key, value = cache.update(key, value, 0)
    module = torch.nn.Module()
    module.is_causal = True
    out, _ = zipvl_attention(module, query, key, value, None)
    kept = cache.selections()[0].kept
    assert 0 < kept.sum() < 120
    return out.transpose(1, 2), kept, [query, key, value]


def test_by_the_papers_rule_what_is_not_kept_neither_attends_nor_is_attended_to() -> None:
    config = ZipVLConfig(**{**vars(LOSSY), "window": 0, "sinks": 0})
    out, kept, (query, key, value) = attended(config)
    expected = torch.zeros_like(query)
    # Causal among the kept tokens alone, as if there were no others.
    expected[:, :, kept] = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, kept], key[:, :, kept], value[:, :, kept], is_causal=True, enable_gqa=True
    )
    assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize(("window", "sinks"), [(9, 2), (1, 0), (0, 3), (300, 0)])
def test_every_query_attends_to_its_neighbourhood(window: int, sinks: int) -> None:
    config = ZipVLConfig(**{**vars(LOSSY), "window": window, "sinks": sinks, "probe_recent": 16})
    out, kept, (query, key, value) = attended(config)
    for i in range(120):
        seen = [
            j
            for j in range(i + 1)
            if j > i - window or j < sinks or (bool(kept[i]) and bool(kept[j]))
        ]
        expected = torch.nn.functional.scaled_dot_product_attention(
            query[:, :, i : i + 1], key[:, :, seen], value[:, :, seen], enable_gqa=True
        )
        assert torch.allclose(out[:, :, i : i + 1], expected, atol=1e-6)


def test_nothing_attends_to_what_was_evicted(model, inputs) -> None:
    config = ZipVLConfig(**{**vars(LOSSY), "low_bits": 0, "high_bits": 16})
    cache = zipvl_cache(config)
    given = inputs[1]
    with torch.inference_mode():
        model(**given, past_key_values=cache)
        token = torch.tensor([[7]])
        model(input_ids=token, past_key_values=cache)
        for layer in cache.layers:
            evicted = layer.requests[0].evicted.nonzero()[:, 0]
            assert len(evicted) > 20
            layer.keys[0, :, evicted] = torch.nan
        logits = model(input_ids=token, past_key_values=cache).logits
    assert logits.isfinite().all()


def logits_after_compression(model: Any, inputs: Any, config: ZipVLConfig) -> torch.Tensor:
    cache = zipvl_cache(config)
    with torch.inference_mode():
        model(**inputs, past_key_values=cache)
        for _ in range(2):
            logits = model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits
    return logits[0, -1]


def test_fewer_bits_err_more(model, inputs) -> None:
    dense = {"sparse_prefill": False, "tau": 1.0}
    exact = logits_after_compression(
        model, inputs[1], ZipVLConfig(high_bits=16, low_bits=16, **dense)
    )
    errors = [
        float((logits_after_compression(model, inputs[1], config) - exact).norm())
        for config in (
            ZipVLConfig(high_bits=8, low_bits=8, **dense),
            ZipVLConfig(high_bits=4, low_bits=4, **dense),
            ZipVLConfig(ratio=0.3, sparse_prefill=False, high_bits=4, low_bits=2),
        )
    ]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_a_prompt_in_chunks_chooses_nearly_the_same(model, inputs) -> None:
    ids, images = inputs[1].input_ids, inputs[1].pixel_values
    whole, cut = zipvl_cache(LOSSY), zipvl_cache(LOSSY)
    with torch.inference_mode():
        embeddings = model.model.get_input_embeddings()(ids)
        features = model.model.get_image_features(images).pooler_output[0]
        embeddings[ids == model.config.image_token_id] = features
        model.model.language_model(inputs_embeds=embeddings, past_key_values=whole)
        for part in embeddings.tensor_split([ids.shape[1] - 120], dim=1):
            model.model.language_model(inputs_embeds=part, past_key_values=cut)
    assert cut.layers[0].requests[0].prompt_len == ids.shape[1]
    for one, other in zip(whole.prompt_masks(), cut.prompt_masks(), strict=True):
        # A set drawn blindly would share about half.
        assert int((one & other).sum()) > 0.7 * int(one.sum())


def test_recent_probes_alone_choose_too(model, inputs) -> None:
    cache = zipvl_cache(ZipVLConfig(**{**vars(LOSSY), "probe_random": 0}))
    with torch.inference_mode():
        model(**inputs[1], past_key_values=cache)
    num_tokens = inputs[1].input_ids.shape[1]
    assert all(0.4 * num_tokens <= s.kept.sum() < num_tokens for s in cache.selections())


def test_a_cache_of_another_kind_is_refused(model, inputs) -> None:
    with pytest.raises(ValueError, match="past_key_values=ZipVLCache"):
        generate(model, inputs[0])


def test_a_used_cache_is_refused(model, inputs) -> None:
    cache = zipvl_cache(LOSSY)
    generate(model, inputs[0], cache)
    with pytest.raises(ValueError, match="one prompt"), torch.inference_mode():
        model(input_ids=inputs[0].input_ids[:, -5:], past_key_values=cache)


def test_padding_on_the_right_is_refused(folder, model) -> None:
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "right"
    images = [draw_image(50 * i) for i in range(len(PROMPTS))]
    given = processor(images=images, text=PROMPTS, return_tensors="pt", padding=True)
    with pytest.raises(ValueError, match="padding on the left"):
        generate(model, given, zipvl_cache(LOSSY))
