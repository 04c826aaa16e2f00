"""The lab's models: LLaVA's and LLaVA-NeXT's architecture, small, and a tokenizer of the tasks."""

import dataclasses
import string
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tiny_checkpoints import CHAT_TEMPLATE, SPECIAL_TOKENS, published_name

# The template brings the first token, as vLLM's chat does not let a tokenizer add one.
TEMPLATE = "{{ bos_token }}" + CHAT_TEMPLATE.replace(".upper()", "").replace(
    "ASSISTANT", "assistant"
)
Llava = transformers.LlavaForConditionalGeneration | transformers.LlavaNextForConditionalGeneration
WORDS_OF_TASKS = """
    a above after all are assistant below black blue bottom bus car cat circle colour colours comes
    cross cup dog egg fan from green hat how in ink is it jam key largest larger left leg list many
    map more nearest net no oak object objects of often one orange part pen picture pictures purple
    red right ring rug shape shapes smallest square star sun tea than that the there to top triangle
    user value values van what which white written yellow yes
"""


@dataclasses.dataclass(frozen=True)
class LabModel:
    """What to build.

    Attributes:
        side: Pixels a side of every picture.
        tiles: A side. If more than one, a LLaVA-NeXT that sees an overview and the tiles.
        patch_size: Pixels a side of a patch.
        layers: Of the language model.
        hidden_size: Of the language model.
        heads: Of 64 channels; half as many KV heads.
        vision_layers: Of the vision tower.
        vision_hidden_size: Of the vision tower.
    """

    side: int = 336
    tiles: int = 1
    patch_size: int = 14
    layers: int = 6
    hidden_size: int = 256
    heads: int = 4
    vision_layers: int = 6
    vision_hidden_size: int = 192

    @property
    def tile_side(self) -> int:
        """Pixels a side of what the vision tower sees."""
        return self.side // self.tiles

    @property
    def num_views(self) -> int:
        """How often the vision tower looks at a picture."""
        return 1 + self.tiles**2 if self.tiles > 1 else 1

    @property
    def tokens_per_view(self) -> int:
        return (self.tile_side // self.patch_size) ** 2

    @property
    def tokens_per_image(self) -> int:
        """Of the language model; lines over the tiles have a token for their end."""
        num_lines = self.side // self.patch_size
        line_ends = num_lines if self.tiles > 1 else 0
        return self.num_views * self.tokens_per_view + line_ends


GPU = LabModel()
CPU = LabModel(side=168, layers=4, vision_layers=4)
CPU_TILED = dataclasses.replace(CPU, side=336, tiles=2)
PRESETS = {"gpu": GPU, "cpu": CPU, "cpu-tiled": CPU_TILED}


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word, digit and letter of the tasks; anything else is unknown."""
    words = WORDS_OF_TASKS.split()
    pieces = [*SPECIAL_TOKENS, *words, *string.ascii_lowercase[1:], ":", *string.digits]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    # Digit by digit, as Llama's: a number is read like a word.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=TEMPLATE,
    )


def make_processor(spec: LabModel) -> transformers.LlavaProcessor | transformers.LlavaNextProcessor:
    """Pictures and text to the model's inputs."""
    size = {
        "size": {"shortest_edge": spec.tile_side},
        "crop_size": {"height": spec.tile_side, "width": spec.tile_side},
    }
    common = {
        "tokenizer": make_tokenizer(),
        "chat_template": TEMPLATE,
        "patch_size": spec.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    if spec.tiles == 1:
        return transformers.LlavaProcessor(transformers.CLIPImageProcessor(**size), **common)
    tiler = transformers.LlavaNextImageProcessor(**size, image_grid_pinpoints=_pinpoints(spec))
    return transformers.LlavaNextProcessor(tiler, **common)


def _pinpoints(spec: LabModel) -> list[list[int]]:
    """The one tiling that there is, height and width in pixels."""
    return [[spec.side, spec.side]]


def make_model(spec: LabModel) -> Llava:
    """A model with fresh weights; seed torch before."""
    tokenizer = make_tokenizer()
    vision = transformers.CLIPVisionConfig(
        hidden_size=spec.vision_hidden_size,
        intermediate_size=4 * spec.vision_hidden_size,
        num_hidden_layers=spec.vision_layers,
        num_attention_heads=spec.vision_hidden_size // 64,
        image_size=spec.tile_side,
        patch_size=spec.patch_size,
    )
    text = transformers.LlamaConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=3 * spec.hidden_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=max(1, spec.heads // 2),
        head_dim=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    common = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "image_seq_length": spec.tokens_per_view,
        # The last layer: a small tower has none to spare.
        "vision_feature_layer": -1,
    }
    model: Llava
    if spec.tiles == 1:
        config = transformers.LlavaConfig(**common)
        model = transformers.LlavaForConditionalGeneration(config)
    else:
        config = transformers.LlavaNextConfig(**common, image_grid_pinpoints=_pinpoints(spec))
        model = transformers.LlavaNextForConditionalGeneration(config)
    embeddings = model.model.vision_tower.embeddings
    with torch.no_grad():
        places = embeddings.position_embedding.weight[1:]
        places.copy_(_waves(spec.tile_side // spec.patch_size, spec.vision_hidden_size))
    return model


def _waves(num: int, channels: int) -> torch.Tensor:
    """Rows and columns of `num` x `num` patches as sines and cosines, [num^2, channels].

    Position embeddings to start from: a tower that must first learn where patches lie takes
    several times as long to see.
    """
    rates = 10000.0 ** -torch.linspace(0, 1, channels // 4)
    angles = torch.arange(num)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = waves.repeat_interleave(num, 0), waves.repeat(num, 1)
    return torch.cat([rows, columns], dim=-1)


def save(model: Llava, spec: LabModel, out: Path) -> None:
    """Write a folder that transformers and vLLM load."""
    model.save_pretrained(out, max_shard_size="100GB")
    make_processor(spec).save_pretrained(out)
    weights = out / "model.safetensors"
    tensors = {published_name(name): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
