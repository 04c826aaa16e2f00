import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_floats_without_values_are_nan(dtype: torch.dtype) -> None:
    x = torch.zeros(3, dtype=dtype)
    made = (torch.empty(3, dtype=dtype), torch.empty_like(x), x.new_empty(3))
    assert all(one.float().isnan().all() for one in made)
    assert not x.float().any()


def test_integers_without_values_are_no_index() -> None:
    assert torch.empty(2, dtype=torch.int32).tolist() == 2 * [2**31 - 1]
    assert torch.empty(2, dtype=torch.uint8).tolist() == [255, 255]
    assert torch.empty(2, dtype=torch.bool).all()
