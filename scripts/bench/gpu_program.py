"""What the programs of the GPU suite share: options, the device, and a table that grows."""

import argparse
import json
import os
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import lone_flash
import torch
import triton


def device_of(is_dry: bool) -> torch.device:
    """Where the kernels run.

    Raises:
        SystemExit: There is no GPU, or a dry run without the interpreter.
    """
    if is_dry:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise SystemExit("a dry run interprets the kernels: set TRITON_INTERPRET=1")
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --dry-run goes through the code without one")
    return torch.device("cuda")


def vllm_version() -> str:
    """Whose kernels the baselines are, as its metadata says."""
    names = packages_distributions().get("vllm")
    return version(names[0]) if names else "not installed"


class Report:
    """Rows of a program: a line of each on standard output, all of each in a file."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.rows: list[dict[str, Any]] = []

    def add(self, line: str | None, **row: Any) -> None:
        """What is measured stays, if the rest is cut; nothing is printed where `line` is None."""
        if line is not None:
            print(line, flush=True)
        self.rows.append(row)
        found = {"about": self.about, "rows": self.rows}
        self.path.write_text(json.dumps(found, indent=1) + "\n")


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options that every program has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the rows are written")
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU, interpreted: figures mean nothing"
    )
    return parser


def versions() -> dict[str, Any]:
    """Of what runs here, and the GPU's name."""
    found = {"torch": torch.__version__, "triton": triton.__version__, "vllm": vllm_version()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def begin(arguments: argparse.Namespace) -> Report:
    """Make tensors where the kernels run, and let FlashAttention be found where it can be had."""
    is_dry = arguments.dry_run
    torch.set_default_device(device_of(is_dry))
    torch.manual_seed(0)
    no_flash = "it is a dry run" if is_dry else lone_flash.find()
    return Report(arguments.json, versions() | {"dry run": is_dry, "no vLLM flash": no_flash})
