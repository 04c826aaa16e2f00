"""Uninitialised memory that shows where it is read."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

UNINITIALISED = {
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    torch.Tensor.new_empty,
    torch.Tensor.new_empty_strided,
}
POISONED_BYTES = 2**28
"""What is larger is a pool of memory most of which a test never touches."""


class Poisoned(TorchFunctionMode):
    """Fills what is made without values: floats with NaN, integers with their largest value."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in UNINITIALISED and found.nbytes <= POISONED_BYTES:
            poison(found)
        return found


def poison(x: torch.Tensor) -> None:
    if x.dtype == torch.bool:
        x.fill_(True)
    elif x.dtype.is_floating_point:
        x.fill_(float("nan"))
    else:
        x.fill_(torch.iinfo(x.dtype).max)
