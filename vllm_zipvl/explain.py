"""Show which image tokens a question keeps.

    python -m vllm_zipvl.explain --image FILE --question TEXT --model DIR --out PNG

Runs the transformers oracle on a CPU: no engine, any LLaVA-family checkpoint with a chat template.
Of a picture that the model cuts into tiles, the overview is shown.
"""

import argparse
import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.hf import NAME, ZipVLCache

NUM_SHOWN = 6
"""Layers whose kept patches are drawn, at most."""
INTEGERS = ("window", "sinks", "probe_recent", "probe_random", "high_bits", "low_bits")
"""Settings that the command line takes beside tau and ratio."""


class Explanation(NamedTuple):
    """What the model saw, kept and said.

    Attributes:
        picture: As the vision tower gets it, float32 [height, width, 3] in 0 to 1.
        kept: Per layer, which patches of it are kept, bool [num_layers, rows, columns].
        shares: Per layer, the kept share of all the prompt's tokens.
        num_tokens: Tokens of the prompt.
        answer: With all tokens.
        sparse_answer: With the kept ones.
    """

    picture: np.ndarray
    kept: np.ndarray
    shares: list[float]
    num_tokens: int
    answer: str
    sparse_answer: str


def _picture(inputs: Any, processor: Any) -> np.ndarray:
    pixels = inputs["pixel_values"][0]
    # Models that cut pictures into tiles have a dimension for these, the overview first.
    pixels = pixels[0] if pixels.ndim == 4 else pixels
    image_processor = processor.image_processor
    mean, std = (torch.tensor(x) for x in (image_processor.image_mean, image_processor.image_std))
    return (pixels.permute(1, 2, 0) * std + mean).clamp(0, 1).numpy()


def explain(
    model: Any, processor: Any, image: Any, question: str, config: ZipVLConfig, max_tokens: int
) -> Explanation:
    """Ask with all tokens and with the kept ones.

    Raises:
        ValueError: The model merges patches: the picture has fewer tokens than patches.
    """
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(dtype=model.dtype)
    num_tokens = inputs["input_ids"].shape[1]
    tokens = {"max_new_tokens": max_tokens, "do_sample": False}
    answers, cache = [], ZipVLCache(config)
    keep_all = ZipVLConfig(tau=1.0, sparse_prefill=False, high_bits=16, low_bits=16)
    for each in (ZipVLCache(keep_all), cache):
        output = model.generate(**inputs, past_key_values=each, **tokens)
        text = processor.decode(output[0, num_tokens:], skip_special_tokens=True)
        answers.append(text.strip())
    kept = torch.stack([selection.kept for selection in cache.selections()])
    (places,) = (inputs["input_ids"][0] == model.config.image_token_id).nonzero(as_tuple=True)
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    if len(places) < side * side:
        raise ValueError(
            f"{len(places)} image tokens are fewer than the {side} x {side} patches of a picture: "
            "this model merges patches, which cannot be shown"
        )
    overview = kept[:, places[: side * side]].view(-1, side, side)
    return Explanation(
        _picture(inputs, processor),
        overview.numpy(),
        kept.float().mean(1).tolist(),
        num_tokens,
        *answers,
    )


def draw(explanation: Explanation, question: str, out: Path) -> None:
    """Write the figure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    picture, kept = explanation.picture, explanation.kept
    num_layers = len(kept)
    shown = sorted({round(i) for i in np.linspace(0, num_layers - 1, min(NUM_SHOWN, num_layers))})
    columns = max(3, math.ceil((len(shown) + 3) / 2))
    figure, axes = plt.subplots(2, columns, figsize=(3.2 * columns, 7.2), layout="constrained")
    panels = iter(axes.flat)
    extent = (0, picture.shape[1], picture.shape[0], 0)

    def show(title: str, visible: np.ndarray | None = None) -> Any:
        panel = next(panels)
        panel.imshow(picture, extent=extent)
        if visible is not None:
            shade = np.zeros((*visible.shape, 4))
            shade[..., 3] = 0.85 * (1 - visible)
            panel.imshow(shade, extent=extent, interpolation="nearest")
        panel.set_title(title, fontsize=10)
        panel.set_axis_off()
        return panel

    show("what the model sees")
    show(f"mean of {num_layers} layers", kept.mean(0))
    for layer in shown:
        show(f"layer {layer}: {100 * kept[layer].mean():.0f} % of the picture", kept[layer])
    bars = next(panels)
    bars.bar(range(num_layers), [100 * share for share in explanation.shares])
    bars.set(xlabel="layer", ylim=(0, 100))
    bars.set_title(f"kept of all {explanation.num_tokens} tokens, %", fontsize=10)
    bars.xaxis.get_major_locator().set_params(integer=True)
    for panel in panels:
        panel.set_axis_off()
    figure.suptitle(
        f"{question}\nall tokens: {explanation.answer or '(nothing)'}"
        f"     kept tokens: {explanation.sparse_answer or '(nothing)'}"
    )
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_zipvl.explain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--question", required=True)
    parser.add_argument("--model", required=True, help="folder or name of a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="a .png")
    parser.add_argument("--max-tokens", type=int, default=32, help="of the answer")
    for field in fields(ZipVLConfig):
        if field.name in ("tau", "ratio"):
            parser.add_argument(f"--{field.name}", type=float, default=field.default)
        elif field.name in INTEGERS:
            name = f"--{field.name.replace('_', '-')}"
            parser.add_argument(name, type=int, default=field.default)
    return parser.parse_args(arguments)


def _check_out(out: Path) -> None:
    """Before the model takes its time.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: Nothing can be written there.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError("matplotlib is missing: pip install vllm-zipvl[explain]") from error
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no folder; make it or choose another --out")
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if out.suffix.removeprefix(".") not in known:
        raise ValueError(f"{out} must end in one of {', '.join(known)}")


def main(arguments: list[str] | None = None) -> None:
    """Read the command line; errors are one line each."""
    from PIL import Image
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    given = _parse_arguments(arguments)
    settings = {field.name for field in fields(ZipVLConfig)} & set(vars(given))
    try:
        config = ZipVLConfig(min_tokens=1, **{name: getattr(given, name) for name in settings})
        _check_out(given.out)
        image = Image.open(given.image).convert("RGB")
        model_config = AutoConfig.from_pretrained(given.model)
        vision = getattr(model_config, "vision_config", None)
        if vision is None:
            raise ValueError(
                f"{given.model} has no vision tower ({model_config.model_type}); "
                "choose a LLaVA-family checkpoint"
            )
        if not (hasattr(vision, "image_size") and hasattr(vision, "patch_size")):
            raise ValueError(
                f"{given.model} takes pictures of any size ({model_config.model_type}), whose "
                "patches cannot be shown; choose a LLaVA-family checkpoint"
            )
        processor = AutoProcessor.from_pretrained(given.model)
        model = AutoModelForImageTextToText.from_pretrained(given.model, attn_implementation=NAME)
        found = explain(model, processor, image, given.question, config, given.max_tokens)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"explain: {str(error).splitlines()[0]}")
    draw(found, given.question, given.out)
    mean = sum(found.shares) / len(found.shares)
    print(f"kept {100 * mean:.1f} % of {found.num_tokens} tokens, mean over layers")
    print(f"all tokens:  {found.answer}\nkept tokens: {found.sparse_answer}\nwrote {given.out}")


if __name__ == "__main__":
    main()
