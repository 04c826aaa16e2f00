"""How kernels are cached on disk, with a package whose only kernel uses another file's constant."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_zipvl.ops.lazy

KERNEL = """
import numba
from vllm_zipvl.ops.helper import VALUE

@numba.njit(cache=True)
def kernel():
    return VALUE
"""
CALL = """
import numba
from vllm_zipvl.ops.lazy import numba_module

print(numba_module("vllm_zipvl.ops.kernel").kernel(), numba.config.CACHE_DIR)
"""


def run(root: Path, value: int, **environment: str) -> list[str]:
    """What the kernel gives, and numba's cache folder afterwards."""
    ops = root / "vllm_zipvl" / "ops"
    ops.mkdir(parents=True, exist_ok=True)
    (ops / "lazy.py").write_text(Path(vllm_zipvl.ops.lazy.__file__).read_text())
    (ops / "helper.py").write_text(f"VALUE = {value}")
    if not (ops / "kernel.py").exists():
        (ops / "kernel.py").write_text(KERNEL)
        for package in (ops, ops.parent):
            (package / "__init__.py").touch()
    inherited = {name: x for name, x in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", CALL],
        cwd=root, env=inherited | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.parametrize("writable", [True, False])
def test_an_edit_of_another_file_is_seen(tmp_path: Path, writable: bool) -> None:
    cache = tmp_path / "cache"
    if not writable:
        cache.touch()
    for value in (1, 2):
        assert run(tmp_path, value, XDG_CACHE_HOME=str(cache)) == [str(value)]
    kept = list(cache.rglob("*.nbc"))
    assert len(kept) == (2 if writable else 0)


def test_the_folder_that_the_user_has_set_is_used(tmp_path: Path) -> None:
    user, own = str(tmp_path / "user"), str(tmp_path / "own")
    assert run(tmp_path, 1, NUMBA_CACHE_DIR=user, XDG_CACHE_HOME=own) == ["1", user]
    assert list((tmp_path / "user").rglob("*.nbc"))
    assert not (tmp_path / "own").exists()
