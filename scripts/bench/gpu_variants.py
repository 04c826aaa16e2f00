"""Ways to launch the decode kernel: tiles, loads ahead, registers, and how contexts are cut."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from gpu_cases import DecodeShape, layer_of

from vllm_zipvl.ops.decode_attention import triton as kernels

LAUNCHES = (
    kernels.Launch(32, True, 1, 168), kernels.Launch(32, False, 1, 168),
    kernels.Launch(32, False, 1, 144), kernels.Launch(32, False, 1, 128),
    kernels.Launch(16, True, 1, 128), kernels.Launch(16, False, 1, 128),
    kernels.Launch(32, True, 1, None),
)  # fmt: skip
PROGRAMS = (8, 12, 16, 24)


class Variant(NamedTuple):
    """One way; contexts are cut so that a processor has `programs` at once."""

    launch: kernels.Launch
    programs: int

    def __str__(self) -> str:
        slots, ahead, warps, registers = self.launch
        return (
            f"{slots} slots, {'values' if ahead else 'keys'} ahead, {warps} warps, "
            f"{registers} registers, {self.programs} programs"
        )

    @property
    def row(self) -> dict[str, int | bool | None]:
        return {**self.launch._asdict(), "programs": self.programs}


def present() -> Variant:
    """What serves."""
    return Variant(kernels.LAUNCH, kernels.PROGRAMS_PER_PROCESSOR)


@contextmanager
def applied(variant: Variant) -> Iterator[None]:
    """Launch decode attention so while the block runs."""
    replaced = {"LAUNCH": variant.launch, "PROGRAMS_PER_PROCESSOR": variant.programs}
    before = {name: getattr(kernels, name) for name in replaced}
    try:
        for name, value in replaced.items():
            setattr(kernels, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(kernels, name, value)


def _num_shares(shape: DecodeShape, variant: Variant, is_dry: bool) -> int:
    layer = layer_of(shape.model, is_dry)
    programs = shape.num_rows * layer.num_kv_heads
    num_sums = kernels._num_sums(layer.num_heads, layer.num_kv_heads, layer.head_size)
    with applied(variant):
        return kernels._num_shares(programs, num_sums, torch.get_default_device())


def variants(shape: DecodeShape, is_dry: bool) -> list[Variant]:
    """What serves, then all others that differ from each other at this shape."""
    launches, programs = (LAUNCHES[1:2], PROGRAMS[:1]) if is_dry else (LAUNCHES, PROGRAMS)
    found: dict[tuple[kernels.Launch, int], Variant] = {}
    for variant in (present(), *(Variant(launch, n) for launch in launches for n in programs)):
        found.setdefault((variant.launch, _num_shares(shape, variant, is_dry)), variant)
    return list(found.values())
