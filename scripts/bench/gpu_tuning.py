"""Ways to launch the decode kernel, each checked before it is timed.

    python scripts/bench/gpu_tuning.py --json OUT [--shapes "28/4 x 64" ...]
    TRITON_INTERPRET=1 python scripts/bench/gpu_tuning.py --json OUT --dry-run

Of each launch the best cut of contexts is printed, the fastest launch first, and of what serves the
kernels apart.
"""

import torch
from gpu_cases import (
    DECODE_TOKENS,
    DRY_TOKENS,
    DecodeCase,
    DecodeShape,
    decode_shapes,
    layer_of,
)
from gpu_decode import free, parts_of
from gpu_program import Report, begin, parser_of
from gpu_timing import kernel_times, replayed_milliseconds
from gpu_variants import Variant, applied, variants

REPEAT = 60
"""Milliseconds of each figure."""


class Tuning:
    """The variants at one shape, which share a case and its oracle's output."""

    def __init__(self, report: Report, shape: DecodeShape, is_dry: bool) -> None:
        self.report, self.shape, self.is_dry = report, shape, is_dry
        num_tokens = DRY_TOKENS if is_dry else DECODE_TOKENS
        self.case = DecodeCase(layer_of(shape.model, is_dry), shape.num_rows, num_tokens)
        self.expected = self.case.expected()
        self.taken: dict[Variant, float] = {}

    def try_out(self, variant: Variant) -> None:
        row = {"shape": str(self.shape), **variant.row}
        try:
            with applied(variant):
                if reason := self.case.fault(self.expected):
                    self.report.add(f"{self.shape!s:<11} {variant} {reason}", **row, fault=reason)
                    return
                taken = replayed_milliseconds(self.case.run, self.is_dry, REPEAT)
        # A variant that does not fit into a processor; the others do not depend on it.
        except Exception as error:
            self.report.add(None, **row, absent=f"{type(error).__name__}: {error}")
            return
        self.taken[variant] = taken
        self.report.add(None, **row, ms=taken)

    def conclude(self) -> None:
        """Print the best cut of each launch, and where the time of what serves goes."""
        if not self.taken:
            print(f"{self.shape!s:<11} no variant gives what the reference does", flush=True)
            return
        best: dict[object, Variant] = {}
        for variant in sorted(self.taken, key=lambda variant: self.taken[variant]):
            best.setdefault(variant.launch, variant)
        for variant in best.values():
            print(f"{self.shape!s:<11} {self.taken[variant]:8.4f} ms {variant}", flush=True)
        kernels = kernel_times(self.case.run, self.is_dry)
        found = [kernel._asdict() for kernel in kernels]
        self.report.add(
            f"{self.shape!s:<11} {parts_of(kernels)}", shape=str(self.shape), kernels=found
        )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="+", help="heads and rows as printed; all by default")
    arguments = parser.parse_args()
    report, is_dry = begin(arguments), arguments.dry_run
    for shape in decode_shapes(is_dry):
        if arguments.shapes and str(shape) not in arguments.shapes:
            continue
        tuning = Tuning(report, shape, is_dry)
        for variant in variants(shape, is_dry):
            tuning.try_out(variant)
        tuning.conclude()
        free()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
