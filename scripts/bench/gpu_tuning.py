"""Ways to launch the decode kernel, each checked before it is timed; prints those that win.

python scripts/bench/gpu_tuning.py --json OUT
TRITON_INTERPRET=1 python scripts/bench/gpu_tuning.py --json OUT --dry-run
"""

import torch
from gpu_cases import DECODE_TOKENS, DRY_TOKENS, DecodeCase, DecodeShape, layer_of
from gpu_decode import free
from gpu_program import Report, begin, parser_of
from gpu_timing import replayed_milliseconds
from gpu_variants import Variant, applied, tuned_shapes, variants

REPEAT = 60
"""Milliseconds of each figure."""


class Tuning:
    """The variants at one shape, which share a case and its oracle's output."""

    def __init__(self, report: Report, shape: DecodeShape, is_dry: bool) -> None:
        self.report, self.shape, self.is_dry = report, shape, is_dry
        num_tokens = DRY_TOKENS if is_dry else DECODE_TOKENS
        self.case = DecodeCase(layer_of(shape.model, is_dry), shape.num_rows, num_tokens)
        self.expected = self.case.expected()
        self.first: float | None = None
        self.best: float | None = None

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
        self.first = self.first or taken
        wins = self.best is None or taken < self.best
        if wins:
            self.best = taken
        line = f"{self.shape!s:<11} {taken:8.4f} ms {self.first / taken:5.2f}x {variant}"
        self.report.add(line if wins else None, **row, ms=taken)


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    report, is_dry = begin(arguments), arguments.dry_run
    for shape in tuned_shapes(is_dry):
        tuning = Tuning(report, shape, is_dry)
        tried = variants(shape, is_dry)
        for variant in tried:
            tuning.try_out(variant)
        print(f"{shape!s:<11} {len(tried)} variants tried", flush=True)
        free()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
