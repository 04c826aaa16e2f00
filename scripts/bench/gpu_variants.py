"""Ways to launch the decode kernel: tiles, warps, stages, and into how many a context is cut."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from gpu_cases import BITS, DecodeShape, decode_shapes, layer_of

from vllm_zipvl.ops.decode_attention import triton as kernels

TILES, WARPS, STAGES, PROGRAMS = (64, 128), (4, 8), (3, 5), (2, 4, 8, 16)
DEFAULT_WARPS, DEFAULT_STAGES = 4, 3
"""Triton's, where a launch names none."""
NUM_PARTS = 3
"""Of a row's context at two precisions."""


class Variant(NamedTuple):
    """One way; `programs` are those that a processor gets before contexts are no longer cut."""

    tile_tokens: int
    num_warps: int
    num_stages: int
    programs: int

    def __str__(self) -> str:
        tile, warps, stages, programs = self
        return f"tile {tile}, {warps} warps, {stages} stages, {programs} programs"


class _Launched:
    """A kernel, launched with these options."""

    def __init__(self, kernel: Any, **options: int) -> None:
        self._kernel, self._options = kernel, options

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._kernel[grid], **self._options)


def present() -> Variant:
    """What serves."""
    tile = kernels.tile_side(head_size=128, itemsize=2)
    return Variant(tile, DEFAULT_WARPS, DEFAULT_STAGES, kernels.PROGRAMS_PER_PROCESSOR)


@contextmanager
def applied(variant: Variant) -> Iterator[None]:
    """Launch decode attention so while the block runs."""
    attend = kernels._attend
    replaced = {
        "tile_side": lambda *sizes: variant.tile_tokens,
        "PROGRAMS_PER_PROCESSOR": variant.programs,
        "_attend": _Launched(attend, num_warps=variant.num_warps, num_stages=variant.num_stages),
    }
    before = {name: getattr(kernels, name) for name in replaced}
    try:
        for name, value in replaced.items():
            setattr(kernels, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(kernels, name, value)


def _num_shares(shape: DecodeShape, variant: Variant, is_dry: bool) -> int:
    programs = shape.num_rows * layer_of(shape.model, is_dry).num_kv_heads * NUM_PARTS
    with applied(variant):
        return kernels._num_shares(programs, torch.get_default_device())


def tuned_shapes(is_dry: bool) -> list[DecodeShape]:
    return [shape for shape in decode_shapes(is_dry) if shape.num_rows > 1]


def variants(shape: DecodeShape, is_dry: bool) -> list[Variant]:
    """What serves, then all others that differ from each other at this shape."""
    tiles, warps, stages = ((32,), (4,), (3,)) if is_dry else (TILES, WARPS, STAGES)
    found: dict[tuple[int, ...], Variant] = {}
    for variant in (present(), *map(Variant._make, product(tiles, warps, stages, PROGRAMS))):
        found.setdefault((*variant[:3], _num_shares(shape, variant, is_dry)), variant)
    return list(found.values())


assert len(BITS) + 1 == NUM_PARTS
