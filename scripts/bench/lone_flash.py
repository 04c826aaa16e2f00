"""FlashAttention of vLLM's build where the rest of vLLM does not import.

Its interface asks one thing of vLLM: which GPU this is. So its folder alone is enough to measure
against it, without what vLLM imports. Tests find it with `pytest -p lone_flash`.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType, SimpleNamespace

import torch

NAME = "vllm.vllm_flash_attn"


def _has_capability(number: int) -> bool:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor >= number


def _is_of_family(number: int) -> bool:
    return torch.cuda.get_device_capability()[0] == number // 10


def _forget_vllm() -> None:
    """What an import that failed has left behind."""
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


def find() -> str | None:
    """Make `vllm.vllm_flash_attn` importable if its files are there.

    Returns:
        Why it is not; None if it is.
    """
    spec = find_spec("vllm")
    if spec is None:
        return "there is no vLLM"
    try:
        _import()
    # Half of a vLLM fails in its own ways.
    except Exception:
        return _import_alone(list(spec.submodule_search_locations or []))
    return None


def _import() -> None:
    """With a question that it asks vLLM about, not before."""
    import_module(NAME).is_fa_version_supported(3)


def _import_alone(folders: list[str]) -> str | None:
    """With stand-ins for the packages around it."""
    _forget_vllm()
    spec = ModuleSpec("vllm", None, is_package=True)
    spec.submodule_search_locations = folders
    vllm, platforms = module_from_spec(spec), ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(  # type: ignore[attr-defined]
        has_device_capability=_has_capability, is_device_capability_family=_is_of_family
    )
    sys.modules |= {"vllm": vllm, "vllm.platforms": platforms}
    try:
        _import()
    except Exception as error:
        _forget_vllm()
        return (str(error) or type(error).__name__).splitlines()[0]
    return None


def pytest_configure() -> None:
    """Before the tests look for it: where it fails they would pass without it."""
    if find_spec("vllm") and (reason := find()):
        raise SystemExit(f"no FlashAttention of vLLM: {reason}")
