"""Values of the host on a device."""

from collections.abc import Sequence

import numpy as np
import torch


def to_device(
    values: np.ndarray | Sequence[int] | Sequence[tuple[int, ...]],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A tensor of `values`, int64 if they are Python's; a GPU is not waited for."""
    if isinstance(values, np.ndarray):
        tensor = torch.from_numpy(values)
    else:
        tensor = torch.tensor(values, device="cpu")
    # Converted here: a copy that converts goes through memory that is not pinned.
    tensor = tensor.to(dtype or tensor.dtype)
    if device.type == "cuda":
        # From pageable memory the copy would wait for all that the GPU was asked to do before.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def table_to_device(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Rows of different lengths as one table, int32 [len(rows), longest]; zeros where they end."""
    table = np.zeros((len(rows), max(map(len, rows), default=0)), dtype=np.int32)
    for place, row in zip(table, rows, strict=True):
        place[: len(row)] = row
    return to_device(table, device)
