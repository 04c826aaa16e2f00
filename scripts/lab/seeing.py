"""What a model's language part sees of a question."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from decoder import Asked, Picture
from examples import Example
from questions import prompt
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

LINE_END = -1.0
"""In the place of scores and numbers of tiles, for tokens that show nothing."""


@torch.inference_mode()
def see(model: Any, processor: Any, example: Example, suffix: str = "") -> Asked:
    """Embed an example's pictures, its first question and the words of its last.

    Args:
        model: A model of `checkpoint.load_model`.
        processor: The model's own.
        example: Pictures and questions.
        suffix: Follows every question, as "Answer with one word."

    Returns:
        The first question about the pictures.
    """
    texts = [prompt(processor, example, question.text + suffix) for question in example.questions]
    inputs = processor(images=example.images, text=texts[0], return_tensors="pt")
    sizes = {"image_sizes": inputs.image_sizes} if "image_sizes" in inputs else {}
    with _class_attention(model) as (first, seen):
        features = model.model.get_image_features(inputs.pixel_values, **sizes).pooler_output
    ids = inputs.input_ids[0]
    embed = model.model.get_input_embeddings()
    is_image = ids == model.config.image_token_id
    embeddings = embed(ids).clone()
    embeddings[is_image] = torch.cat(list(features))
    other = processor(images=example.images, text=texts[-1], return_tensors="pt").input_ids[0]
    last_image = int((other == model.config.image_token_id).nonzero().max())
    if sizes:
        pictures = _tiled(model, first[0], seen[0], **sizes)
    else:
        pictures = [Picture(scores, torch.zeros_like(scores).long()) for scores in seen[0]]
    return Asked(embeddings, is_image, pictures, embed(other[last_image + 1 :]))


@contextmanager
def _class_attention(model: Any) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """What the class token attends to while the vision tower runs.

    Yields:
        Of its first layer and of the one whose features are seen, mean over heads: each
        [[num_views, tokens_per_view]].
    """
    layers = model.model.vision_tower.encoder.layers
    index = model.config.vision_feature_layer
    # Features are counted from the embeddings on, which are no layer.
    chosen = layers[index - 1 if index > 0 else index]
    found: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def noting(notes: list[torch.Tensor]) -> Any:
        def note(module: Any, inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            notes.append(output[1][:, :, 0, 1:].mean(1))

        return note

    handles = [
        layer.self_attn.register_forward_hook(noting(notes))
        for layer, notes in zip((layers[0], chosen), found, strict=True)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tiled(
    model: Any, first: torch.Tensor, seen: torch.Tensor, image_sizes: torch.Tensor
) -> list[Picture]:
    """Pictures that are cut into tiles.

    Args:
        model: A LLaVA-NeXT.
        first: What the class token attends to in the vision tower's first layer,
            [num_views, tokens_per_view].
        seen: In the layer whose features are seen, as `first`.
        image_sizes: Height and width of each picture, [num_pictures, 2].
    """
    config = model.config
    side = config.vision_config.image_size
    num_lines = side // config.vision_config.patch_size
    lines = torch.arange(num_lines)
    content, views, start = [], [], 0
    for size in image_sizes:
        tiling = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side)
        # Which tile shows what a token of the overview shows.
        rows, columns = (lines * num // num_lines for num in tiling)
        tile = (rows[:, None] * tiling[1] + columns).flatten()
        content.append(torch.zeros(tiling[0] * tiling[1]).index_add(0, tile, first[start]))
        num_views = 1 + len(content[-1])
        numbers = torch.arange(num_views)[:, None].expand(-1, num_lines**2)
        views.append(torch.stack([seen[start : start + num_views], numbers], dim=-1))
        start += num_views
    # As the model packs the features themselves: lines over all tiles, without padding, ended.
    packed, _ = model.model.pack_image_features(
        views,
        image_sizes,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_newline=torch.full((2,), LINE_END),
    )
    return [
        Picture(scores, numbers.long(), content)
        for (scores, numbers), content in zip((p.T for p in packed), content, strict=True)
    ]
