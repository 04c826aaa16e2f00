"""FlashAttention of a vLLM whose other files do not import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
INTERFACE = """
from vllm.platforms import current_platform

def is_fa_version_supported(version):
    return version == 3 and current_platform.is_device_capability_family(90)
"""
PROGRAM = """
import sys
import torch
import lone_flash

torch.cuda.get_device_capability = lambda: (9, 0)
print(lone_flash.find(), "|", [name for name in sys.modules if name.startswith("vllm")])
from vllm_zipvl.ops.prefill_attention.flash_attn import find_varlen
print(find_varlen(), lone_flash.find())
"""


def found(folder: Path) -> list[str]:
    paths = [str(folder), str(BENCH), str(BENCH.parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    """A vLLM that misses what it imports."""
    package = tmp_path / "vllm"
    (package / "vllm_flash_attn").mkdir(parents=True)
    (package / "__init__.py").write_text("import vllm.envs\nimport nothing_of_this_name\n")
    (package / "envs.py").touch()
    return tmp_path


def test_its_interface_is_enough(vllm: Path) -> None:
    interface = INTERFACE + "def flash_attn_varlen_func():\n    pass\n"
    (vllm / "vllm" / "vllm_flash_attn" / "__init__.py").write_text(interface)
    first, second = found(vllm)
    assert first.startswith("None |")
    assert "version=3" in second
    assert second.endswith(" None"), "found again"


def test_it_asks_when_it_is_called(tmp_path: Path) -> None:
    interface = """
def is_fa_version_supported(version):
    from vllm.platforms import current_platform
    return version == 3 and current_platform.is_device_capability_family(90)

def flash_attn_varlen_func():
    pass
"""
    folder = tmp_path / "vllm" / "vllm_flash_attn"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(interface)
    (folder.parent / "__init__.py").touch()
    first, second = found(tmp_path)
    assert first.startswith("None |")
    assert "version=3" in second


def test_why_it_is_not_there(vllm: Path) -> None:
    interface = "raise ImportError('built for another torch')\n"
    (vllm / "vllm" / "vllm_flash_attn" / "__init__.py").write_text(interface)
    assert found(vllm) == ["built for another torch | []", "None built for another torch"]
