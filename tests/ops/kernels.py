"""Which implementations of an operation run here.

With `TRITON_INTERPRET=1` those are the Triton kernels, interpreted: the tests of this folder run
once without and once with it. It is slow, so shapes are smaller then.
"""

import os
from importlib import import_module
from types import ModuleType

import pytest

from vllm_zipvl.ops.lazy import numba_module

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def kernels(operation: str) -> ModuleType:
    """The module that the operation's API uses here, on the CPU."""
    name = f"vllm_zipvl.ops.{operation}."
    module = import_module(name + "triton") if INTERPRETED else numba_module(name + "cpu")
    assert module is not None
    return module


def name_of(implementation: ModuleType) -> str:
    return implementation.__name__.split(".")[-1]


def implementations(operation: str) -> pytest.MarkDecorator:
    """Parametrises a test by `implementation`: the kernels of here and their oracle."""
    oracle = import_module(f"vllm_zipvl.ops.{operation}.reference")
    modules = [kernels(operation), oracle]
    return pytest.mark.parametrize("implementation", modules, ids=name_of)


numba_only = pytest.mark.skipif(INTERPRETED, reason="about the kernels in numba")
