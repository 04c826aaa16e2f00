"""What serves: 7B models' heads, bfloat16, kept tokens at 4 bits and the rest at 2, in batches.

A GPU runs these before anything is timed there.
"""

import pytest
import torch
from kernels import DEVICE, INTERPRETED, seed
from test_decode_attention import Row
from test_decode_attention import check as check_decode
from test_page_codec import check_tokens_of_all_layers
from test_prefill_attention import check_sparse
from test_probe_scores import check_mass
from test_tail_scores import check_scores

from vllm_zipvl.core.geometry import PageGeometry

pytestmark = pytest.mark.skipif(INTERPRETED, reason="these shapes take too long to interpret")

HEAD_SIZE, BLOCK_SIZE = 128, 16
HEADS = pytest.mark.parametrize("heads", [(28, 4), (32, 32)], ids=str)
IS_ON_GPU = DEVICE != "cpu"
LONG = Row(4676, 11660, 47) if IS_ON_GPU else Row(275, 685, 47)
MANY = [
    Row(7 * i % 90, 11 * i % 170, 1 + i, i % 3 * BLOCK_SIZE) for i in range(64 if IS_ON_GPU else 5)
]


def geometry_of(heads: tuple[int, int]) -> PageGeometry:
    return PageGeometry(2, heads[1], HEAD_SIZE, 2, BLOCK_SIZE, 4, 2)


@HEADS
@pytest.mark.parametrize("rows", [[LONG], [LONG, *MANY[:7]], MANY], ids=["one", "few", "many"])
def test_decode(heads: tuple[int, int], rows: list[Row]) -> None:
    check_decode(heads[0], geometry_of(heads), torch.bfloat16, tuple(rows), normalised=True)


@HEADS
def test_codec(heads: tuple[int, int]) -> None:
    seed(0)
    check_tokens_of_all_layers((4, 2), heads[1], HEAD_SIZE)


@HEADS
@pytest.mark.parametrize("num_tokens", [111, 4096 if IS_ON_GPU else 500])
def test_probes(heads: tuple[int, int], num_tokens: int) -> None:
    check_mass(num_tokens, heads, HEAD_SIZE, torch.bfloat16, (64, 64))


@HEADS
def test_tail(heads: tuple[int, int]) -> None:
    check_scores(HEAD_SIZE, heads, torch.bfloat16, (128, 1, 32, 144))


@HEADS
@pytest.mark.parametrize("shape", [(1000, 1000), (63, 1000)], ids=str)
def test_sparse_prefill(heads: tuple[int, int], shape: tuple[int, int]) -> None:
    check_sparse(shape, torch.bfloat16, 64, 4, heads=heads, head_size=HEAD_SIZE)
