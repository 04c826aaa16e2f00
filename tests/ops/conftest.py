from collections.abc import Iterator

import pytest
import torch
from kernels import DEVICE


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """Where the tests' tensors are made."""
    with torch.device(DEVICE) as device:
        yield device
