"""The checkpoints that the lab evaluates: LLaVA, and LLaVA-NeXT, which cuts pictures into tiles."""

from pathlib import Path
from typing import Any

import torch
import transformers

MODELS = {
    "llava": transformers.LlavaForConditionalGeneration,
    "llava_next": transformers.LlavaNextForConditionalGeneration,
}
CLIP = "clip_vision_model"


def config_of(folder: Path) -> Any:
    """A checkpoint's config.

    Raises:
        SystemExit: It is no folder of a model that the lab takes.
    """
    if not folder.is_dir():
        raise SystemExit(f"--model {folder}: there is no such folder")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} has no config of a model: {error}") from error
    if config.model_type not in MODELS:
        raise SystemExit(
            f"{folder} is of type {config.model_type}; "
            f"--model takes a vision-language model of type {' or '.join(MODELS)}"
        )
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    if config.vision_config.model_type != CLIP or strategy != "default" or not layer:
        raise SystemExit(
            f"{folder}: its vision tower must be CLIP's, whose class token is left out"
        )
    if not isinstance(layer, int):
        raise SystemExit(f"{folder} sees features of the layers {layer}, and must see those of one")
    if not list(folder.glob("*.safetensors")):
        raise SystemExit(f"{folder} has no weights in safetensors")
    return config


def load_model(folder: Path) -> Any:
    """A model for evaluation, float32; its vision tower gives attention weights.

    Raises:
        SystemExit: As `config_of`.
    """
    attention = {"text_config": "sdpa", "vision_config": "eager"}
    model = MODELS[config_of(folder).model_type].from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32
    )
    return model.eval()


def picture_side(config: Any) -> int:
    """Pixels a side of the square pictures to draw: all that the model can see of one."""
    tilings = getattr(config, "image_grid_pinpoints", [])
    squares = [height for height, width in tilings if height == width]
    return max(squares, default=config.vision_config.image_size)
