"""A layer's decode step at 16,384 tokens, replayed from a CUDA graph: ours at 4/2 bits, and dense.

    python scripts/bench/gpu_decode.py --json OUT [--fp8]
    TRITON_INTERPRET=1 python scripts/bench/gpu_decode.py --json OUT --dry-run

Every output is checked before it is timed. Apart are the kernels of ours. What is
predicted counts instructions: 2.4 for each element that `_attend` dequantises.
"""

import gc
from typing import Any

import torch
from attention_cases import DTYPE, Layer, randn
from decode_baselines import FlashFp8Rows, wrong
from dense_attention import DenseAttention
from gpu_cases import DECODE_TOKENS, DRY_TOKENS, DecodeCase, DecodeShape, decode_shapes, layer_of
from gpu_program import Report, begin, parser_of
from gpu_timing import (
    MILLISECOND,
    KernelTime,
    copied_bytes_per_second,
    kernel_times,
    replayed_milliseconds,
)

REPEAT = 150
"""Milliseconds of each figure."""
PREDICTED = {"28/4 x 1": 1.2, "28/4 x 8": 2.3, "28/4 x 64": 4.0, "32/32 x 64": 3.5}
"""How many times faster than FlashAttention 3 the present kernels are on an H100."""
CHECKED_ROWS, CHECKED_TOKENS = 2, 111
"""Of the fp8 kernel, whose oracle holds all keys in float32."""


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Measured:
    """The methods at one shape, the first of which the others are compared with."""

    def __init__(self, report: Report, shape: DecodeShape, is_dry: bool, copy_rate: float) -> None:
        self.report, self.shape, self.is_dry, self.copy_rate = report, shape, is_dry, copy_rate
        self.layer: Layer = layer_of(shape.model, is_dry)
        self.num_tokens = DRY_TOKENS if is_dry else DECODE_TOKENS
        self.baseline: float | None = None

    def add(self, method: str, taken: float, read_bytes: int, note: str = "", **more: Any) -> None:
        share = read_bytes / (taken * MILLISECOND) / self.copy_rate
        self.baseline = self.baseline or taken
        ratio = self.baseline / taken
        self.report.add(
            f"{self.shape!s:<11} {method:<10} {taken:8.4f} ms {share:4.0%} of copy "
            f"{ratio:5.2f}x {note}".rstrip(),
            shape=str(self.shape), method=method, ms=taken, share_of_copy=share, ratio=ratio,
            **more,
        )  # fmt: skip

    def dense(self) -> None:
        layer, rows = self.layer, self.shape.num_rows
        dense = DenseAttention(layer)
        query = randn(rows, layer.num_heads, layer.head_size)
        run = dense.decode(query, self.num_tokens)
        read = 2 * rows * self.num_tokens * layer.num_kv_heads * layer.head_size * DTYPE.itemsize
        self.add(dense.name, replayed_milliseconds(run, self.is_dry, REPEAT), read)

    def fp8(self) -> None:
        """FlashAttention 3 over an fp8 cache."""
        found = DenseAttention(self.layer).flash
        if found is None or found.version != 3:
            self.report.add(f"{self.shape!s:<11} no fp8: FlashAttention 3 is not here")
            return
        few = FlashFp8Rows(self.layer, CHECKED_ROWS, CHECKED_TOKENS)
        if reason := wrong(few):
            self.report.add(f"{self.shape!s:<11} fp8 is {reason}")
            return
        rows = FlashFp8Rows(self.layer, self.shape.num_rows, self.num_tokens)
        taken = replayed_milliseconds(rows, self.is_dry, REPEAT)
        self.add("FA3 fp8", taken, rows.read_bytes)

    def ours(self, apart: bool) -> None:
        case = DecodeCase(self.layer, self.shape.num_rows, self.num_tokens)
        if reason := case.fault():
            self.report.add(f"{self.shape!s:<11} 4/2 {reason}: not timed", fault=reason)
            return
        taken = replayed_milliseconds(case.run, self.is_dry, REPEAT)
        kernels = kernel_times(case.run, self.is_dry) if apart else []
        predicted = PREDICTED.get(str(self.shape))
        note = f"(predicted {predicted}x over FA3) " if predicted else ""
        note += parts_of(kernels) if apart else ""
        found = [kernel._asdict() for kernel in kernels]
        self.add("ours 4/2", taken, case.read_bytes, note, kernels=found)


def parts_of(kernels: list[KernelTime]) -> str:
    """The decode kernels' times, and those of what comes before them."""
    own = {k.name: k.milliseconds for k in kernels if k.name in ("fold", "_attend", "combine")}
    others = [kernel for kernel in kernels if kernel.name not in own]
    parts = [f"{name} {taken:.4f}" for name, taken in own.items()]
    launches = sum(kernel.launches for kernel in others)
    before = sum(kernel.milliseconds for kernel in others)
    return ", ".join([*parts, f"before {before:.4f} in {launches:.0f} launches"])


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--fp8", action="store_true", help="an fp8 cache too, kernels not apart")
    arguments = parser.parse_args()
    report, is_dry = begin(arguments), arguments.dry_run
    copy_rate = copied_bytes_per_second(is_dry, REPEAT)
    for shape in decode_shapes(is_dry):
        measured = Measured(report, shape, is_dry, copy_rate)
        measured.dense()
        free()
        if arguments.fp8:
            measured.fp8()
            free()
        measured.ours(apart=not arguments.fp8)
        free()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
