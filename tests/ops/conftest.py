from collections.abc import Iterator

import pytest
import torch
from kernels import DEVICE
from poison import Poisoned


@pytest.fixture(autouse=True)
def device() -> Iterator[torch.device]:
    """Where the tests' tensors are made; those without values are poisoned."""
    with Poisoned(), torch.device(DEVICE) as device:
        yield device
