"""Which implementations of an operation run here.

With `TRITON_INTERPRET=1` those are the Triton kernels, interpreted on the CPU, and with
`ZIPVL_TEST_DEVICE=cuda` compiled ones. Interpreting is slow, so shapes are smaller then.
`ZIPVL_TEST_SEED` gives other random inputs.
"""

import os
from importlib import import_module
from types import ModuleType

import pytest
import torch

from vllm_zipvl.ops.lazy import numba_module, triton_module

DEVICE = os.environ.get("ZIPVL_TEST_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IN_TRITON = INTERPRETED or DEVICE != "cpu"

SEED = int(os.environ.get("ZIPVL_TEST_SEED", "0"))

numba_only = pytest.mark.skipif(IN_TRITON, reason="about the kernels in numba")


def kernels(operation: str) -> ModuleType:
    """The module whose kernels the operation's API uses here."""
    name = f"vllm_zipvl.ops.{operation}."
    module = triton_module(name + "triton", DEVICE) or numba_module(name + "cpu")
    assert module is not None
    return module


def seed(number: int) -> None:
    """Seed torch for a case; the same case gets other inputs with another `ZIPVL_TEST_SEED`."""
    torch.manual_seed(1000 * SEED + number)


def name_of(implementation: ModuleType) -> str:
    return implementation.__name__.split(".")[-1]


def implementations(operation: str) -> pytest.MarkDecorator:
    """Parametrises a test by `implementation`: the kernels used here and their oracle."""
    oracle = import_module(f"vllm_zipvl.ops.{operation}.reference")
    modules = [kernels(operation), oracle]
    return pytest.mark.parametrize("implementation", modules, ids=name_of)
