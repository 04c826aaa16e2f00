"""Make small random-weight checkpoints that vLLM loads like the published ones.

Every family has a tokenizer built on the spot (one token per byte, so any text encodes), a chat
template that takes images, and the image processor of the published model, scaled down where the
family cuts an image into tiles. The same parameters always give the same checkpoint.

    python scripts/tiny_checkpoints.py --family llava --out /tmp/llava --layers 4

Random weights attend almost uniformly; `--sharpen 3` multiplies the query and the key weights by
3 each, and so the attention scores by 9, which makes a few tokens carry most of the mass.
"""

import argparse
import dataclasses
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

PATCH_SIZE = 14
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "<video>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'].upper() + ': ' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') -%}
{{ '<image>\n' }}
{%- endfor -%}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') -%}
{{ part['text'] }}
{%- endfor -%}
{%- endif -%}
{{ '\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


@dataclasses.dataclass(frozen=True)
class TinyCheckpoint:
    """What to make; the defaults load and generate within seconds on two cores.

    `image_size` is the side of one tile in pixels; None takes the family's default (LLaVA's own
    336, which is 576 tokens an image, and 112 for the families that cut images into tiles).
    `hidden_size` of a Llama text model may be any multiple of `heads`, and None takes about 256;
    Qwen2 requires heads x head size.
    """

    family: str
    layers: int = 2
    hidden_size: int | None = None
    intermediate_size: int = 512
    heads: int = 8
    kv_heads: int = 4
    head_size: int = 64
    vocab_size: int = 1024
    max_position_embeddings: int = 4096
    image_size: int | None = None
    vision_layers: int = 2
    vision_hidden_size: int = 128
    dtype: str = "bfloat16"
    sharpen: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {sorted(FAMILIES)}, not {self.family!r}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, not {self.dtype!r}")
        if self.vocab_size < 256 + len(SPECIAL_TOKENS):
            raise ValueError(f"vocab_size must hold 256 bytes and the special tokens: {self}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads: {self}")
        if self.tile % PATCH_SIZE:
            raise ValueError(f"image_size must be a multiple of {PATCH_SIZE}, not {self.tile}")

    @property
    def tile(self) -> int:
        return self.image_size or (336 if self.family == "llava" else 112)

    @property
    def tokens_per_tile(self) -> int:
        return (self.tile // PATCH_SIZE) ** 2

    @property
    def pinpoints(self) -> list[list[int]]:
        """The tilings of the published LLaVA-NeXT models, as (height, width) in pixels."""
        return [[rows * self.tile, columns * self.tile] for rows, columns in TILINGS]


TILINGS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


class Parts(NamedTuple):
    """A model and what turns text and images into its inputs."""

    model: transformers.PreTrainedModel
    processor: transformers.ProcessorMixin | transformers.PreTrainedTokenizerFast


def byte_tokenizer(spec: TinyCheckpoint) -> transformers.PreTrainedTokenizerFast:
    """One token per byte; ids above those decode to words that no text encodes to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*SPECIAL_TOKENS, *alphabet]
    pieces += [f"\u0120w{i}" for i in range(len(pieces), spec.vocab_size)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        chat_template=CHAT_TEMPLATE,
        model_max_length=spec.max_position_embeddings,
    )


def token_id(token: str) -> int:
    return SPECIAL_TOKENS.index(token)


def llama_config(spec: TinyCheckpoint) -> transformers.LlamaConfig:
    step = math.lcm(spec.heads, 32)
    hidden_size = spec.hidden_size or step * math.ceil(256 / step)
    return transformers.LlamaConfig(head_dim=spec.head_size, **text_settings(spec, hidden_size))


def qwen2_config(spec: TinyCheckpoint) -> transformers.Qwen2Config:
    hidden_size = spec.heads * spec.head_size
    if spec.hidden_size not in (None, hidden_size):
        raise ValueError(f"Qwen2 has hidden_size = heads x head_size = {hidden_size}: {spec}")
    return transformers.Qwen2Config(**text_settings(spec, hidden_size))


def text_settings(spec: TinyCheckpoint, hidden_size: int) -> dict:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings,
        # Unit-scale projections whatever the width; the stock 0.02 leaves a narrow model inert.
        "initializer_range": hidden_size**-0.5,
        "tie_word_embeddings": False,
        "bos_token_id": token_id("<s>"),
        "eos_token_id": token_id("</s>"),
        "pad_token_id": token_id("<pad>"),
    }


def vision_settings(spec: TinyCheckpoint) -> dict:
    return {
        "hidden_size": spec.vision_hidden_size,
        "intermediate_size": 2 * spec.vision_hidden_size,
        "num_hidden_layers": spec.vision_layers,
        "num_attention_heads": spec.vision_hidden_size // 64,
        "image_size": spec.tile,
        "patch_size": PATCH_SIZE,
    }


def make_llama(spec: TinyCheckpoint) -> Parts:
    return Parts(transformers.LlamaForCausalLM(llama_config(spec)), byte_tokenizer(spec))


def make_llava(spec: TinyCheckpoint) -> Parts:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision_settings(spec)),
        text_config=llama_config(spec),
        image_token_index=token_id("<image>"),
        image_seq_length=spec.tokens_per_tile,
    )
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": spec.tile}, crop_size={"height": spec.tile, "width": spec.tile}
        ),
        **processor_settings(spec),
        patch_size=PATCH_SIZE,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    return Parts(transformers.LlavaForConditionalGeneration(config), processor)


def make_llava_next(spec: TinyCheckpoint) -> Parts:
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**vision_settings(spec)),
        text_config=llama_config(spec),
        image_token_index=token_id("<image>"),
        image_seq_length=spec.tokens_per_tile,
        image_grid_pinpoints=spec.pinpoints,
    )
    processor = transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessor(
            size={"shortest_edge": spec.tile},
            crop_size={"height": spec.tile, "width": spec.tile},
            image_grid_pinpoints=spec.pinpoints,
        ),
        **processor_settings(spec),
        patch_size=PATCH_SIZE,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )
    return Parts(transformers.LlavaNextForConditionalGeneration(config), processor)


def make_llava_onevision(spec: TinyCheckpoint) -> Parts:
    tile = {"height": spec.tile, "width": spec.tile}
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(
            **vision_settings(spec), vision_use_head=False
        ),
        text_config=qwen2_config(spec),
        image_token_index=token_id("<image>"),
        video_token_index=token_id("<video>"),
        image_grid_pinpoints=spec.pinpoints,
    )
    processor = transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size=tile, image_grid_pinpoints=spec.pinpoints
        ),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=tile),
        **processor_settings(spec),
        num_image_tokens=spec.tokens_per_tile,
        vision_feature_select_strategy="full",
    )
    return Parts(transformers.LlavaOnevisionForConditionalGeneration(config), processor)


def processor_settings(spec: TinyCheckpoint) -> dict:
    return {"tokenizer": byte_tokenizer(spec), "chat_template": CHAT_TEMPLATE}


FAMILIES: dict[str, Callable[[TinyCheckpoint], Parts]] = {
    "llama": make_llama,
    "llava": make_llava,
    "llava_next": make_llava_next,
    "llava_onevision": make_llava_onevision,
}


def sharpen_attention(model: torch.nn.Module, factor: float) -> None:
    """Multiply the text model's query and key weights by `factor` each."""
    for name, parameter in model.named_parameters():
        if "vision_tower" not in name and (".q_proj." in name or ".k_proj." in name):
            parameter.data.mul_(factor)


def published_name(name: str) -> str:
    """The name that published checkpoints, and vLLM's loader, give to a saved weight.

    transformers 5 saves the tower's weights without the wrapper that it no longer has.
    """
    prefix, wrapped = "vision_tower.", "vision_tower.vision_model."
    if prefix in name and wrapped not in name:
        return name.replace(prefix, wrapped, 1)
    return name


def make(spec: TinyCheckpoint, out: Path) -> None:
    """Write the checkpoint that `spec` describes into the folder `out`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model, processor = FAMILIES[spec.family](spec)
    sharpen_attention(model, spec.sharpen)
    model.to(getattr(torch, spec.dtype))
    model.save_pretrained(out, max_shard_size="100GB")
    processor.save_pretrained(out)
    weights = out / "model.safetensors"
    tensors = {published_name(name): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def key_of(spec: TinyCheckpoint) -> str:
    """Names what `make` writes: it changes with the parameters and with this file."""
    source = Path(__file__).read_bytes()
    return hashlib.sha256(source + repr(spec).encode()).hexdigest()[:12]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", required=True, choices=sorted(FAMILIES))
    parser.add_argument("--out", required=True, type=Path)
    kinds = {"hidden_size": int, "image_size": int}
    for field in dataclasses.fields(TinyCheckpoint):
        if field.name != "family":
            kind = kinds.get(field.name, type(field.default))
            option = "--" + field.name.replace("_", "-")
            parser.add_argument(option, type=kind, default=field.default)
    return parser.parse_args()


def main() -> None:
    arguments = vars(parse_arguments())
    out = arguments.pop("out")
    spec = TinyCheckpoint(**arguments)
    make(spec, out)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {spec.family}, {spec.layers} layers, {size / 2**20:.1f} MiB, random weights")


if __name__ == "__main__":
    main()
