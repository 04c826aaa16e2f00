"""Modules that are imported on first use, because importing numba takes a second."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


@cache
def numba_module(name: str) -> ModuleType | None:
    """A module that needs numba; None where numba is not installed."""
    return import_module(name) if find_spec("numba") is not None else None
