"""What a model's language part sees of a question."""

from typing import Any, NamedTuple

import torch
from decoder import Asked
from examples import Example
from questions import prompt
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

OVERVIEW_SHARE = 0.5
"""Of the tokens that HiRED leaves of a picture with tiles: alpha of arXiv 2408.10945."""
IN_NO_PART = -1.0


class Parts(NamedTuple):
    """Pictures, and of those cut into tiles the overview and the tiles: HiRED's partitions.

    Attributes:
        scores: What the class token attends to in the layer of the vision tower whose features
            the language model sees, mean over heads, [num_image_tokens].
        place: Which part a token belongs to, int64 [num_image_tokens]; -1 for the ends of lines.
        shares: Of all tokens that are left, [num_parts].
    """

    scores: torch.Tensor
    place: torch.Tensor
    shares: torch.Tensor


@torch.inference_mode()
def see(model: Any, processor: Any, example: Example, suffix: str = "") -> Asked:
    """Embed an example's pictures, its first question and the words of its last.

    Args:
        model: A model of `checkpoint.load_model`.
        processor: The model's own.
        example: Pictures and questions.
        suffix: Follows every question, as "Answer with one word."
    """
    texts = [prompt(processor, example, question.text + suffix) for question in example.questions]
    inputs = processor(images=example.images, text=texts[0], return_tensors="pt")
    sizes = {"image_sizes": inputs.image_sizes} if "image_sizes" in inputs else {}
    seen = model.model.get_image_features(inputs.pixel_values, output_attentions=True, **sizes)
    ids = inputs.input_ids[0]
    embed = model.model.get_input_embeddings()
    is_image = ids == model.config.image_token_id
    embeddings = embed(ids).clone()
    embeddings[is_image] = torch.cat(list(seen.pooler_output))
    # Per picture or tile, what its class token attends to.
    first, last = (
        seen.attentions[layer][:, :, 0, 1:].mean(1)
        for layer in (0, model.config.vision_feature_layer)
    )
    parts = _tiles(model, first, last, **sizes) if sizes else _pictures(last)
    other = processor(images=example.images, text=texts[-1], return_tensors="pt").input_ids[0]
    last_image = int((other == model.config.image_token_id).nonzero().max())
    return Asked(embeddings, is_image, *parts, embed(other[last_image + 1 :]))


def _pictures(scores: torch.Tensor) -> Parts:
    """Of pictures that are whole; scores [num_pictures, tokens_per_picture]."""
    num, size = scores.shape
    place = torch.arange(num).repeat_interleave(size)
    return Parts(scores.flatten(), place, torch.full((num,), 1 / num))


def _tiles(model: Any, first: torch.Tensor, last: torch.Tensor, image_sizes: torch.Tensor) -> Parts:
    """Of pictures that are cut into tiles.

    A tile's share of what the overview leaves is that of the overview's first layer's scores which
    lie in it.

    Args:
        model: A LLaVA-NeXT.
        first: Scores of the vision tower's first layer, [num_parts, tokens_per_tile].
        last: Scores of the layer whose features are seen, as `first`.
        image_sizes: Height and width of each picture, [num_pictures, 2].
    """
    config = model.config
    side = config.vision_config.image_size
    num_rows = side // config.vision_config.patch_size
    lines = torch.arange(num_rows)
    shares, grouped, start = [], [], 0
    for size in image_sizes:
        tiling = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
        rows, columns = (lines * num // num_rows for num in tiling)
        tile = (rows[:, None] * tiling[1] + columns).flatten()
        mass = torch.zeros(tiling[0] * tiling[1]).index_add(0, tile, first[start])
        end = start + 1 + len(mass)
        share = torch.cat([torch.ones(1), mass / mass.sum()])
        share[0] *= OVERVIEW_SHARE
        share[1:] *= 1 - OVERVIEW_SHARE
        place = torch.arange(start, end)[:, None].expand(-1, num_rows**2)
        grouped.append(torch.stack([last[start:end], place], dim=-1))
        shares.append(share)
        start = end
    # As the model packs the features themselves: lines over all tiles, without padding, ended.
    packed, lengths = model.model.pack_image_features(
        grouped,
        image_sizes,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_newline=torch.full((2,), IN_NO_PART),
    )
    scores, place = torch.cat(packed).T
    weights = lengths / lengths.sum()
    return Parts(
        scores, place.long(), torch.cat([w * s for w, s in zip(weights, shares, strict=True)])
    )
