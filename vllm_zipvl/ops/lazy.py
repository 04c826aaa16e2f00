"""Modules of kernels, imported on first use: numba and Triton take their time, or are missing."""

import atexit
import hashlib
import os
import shutil
import tempfile
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType


@cache
def _kernel_cache() -> str:
    """The folder of these sources' compiled kernels; one for this process if none can be kept.

    numba compiles a function anew when its own file has changed, but not when another has whose
    functions or constants it uses.
    """
    ops = Path(__file__).parent
    sources = b"".join(path.read_bytes() for path in sorted(ops.rglob("*.py")))
    try:
        user_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = user_cache / "vllm_zipvl" / hashlib.sha256(sources).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # not writable, or no home
        folder = Path(tempfile.mkdtemp(prefix="vllm_zipvl-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return str(folder)


@cache
def numba_module(name: str) -> ModuleType | None:
    """A module that needs numba; None where numba is not installed.

    Its kernels are cached in a folder of their own unless the user has set `NUMBA_CACHE_DIR`.
    """
    if find_spec("numba") is None:
        return None
    from numba import config

    chosen = config.CACHE_DIR
    config.CACHE_DIR = chosen or _kernel_cache()
    try:
        return import_module(name)
    finally:
        config.CACHE_DIR = chosen


@cache
def triton_module(name: str, device_type: str) -> ModuleType | None:
    """A module of Triton kernels; None where they do not run.

    They run on CUDA devices and, with `TRITON_INTERPRET=1` set before Triton is first imported,
    interpreted on the CPU.
    """
    is_interpreted = device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if not (is_interpreted or device_type == "cuda") or find_spec("triton") is None:
        return None
    return import_module(name)
