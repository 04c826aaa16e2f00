"""Where the time goes: the kernels of a sparse prefill layer, and of a layer's compression.

python scripts/bench/gpu_profile.py --json OUT
TRITON_INTERPRET=1 python scripts/bench/gpu_profile.py --json OUT --dry-run
"""

import re
from collections.abc import Callable

import torch
from gpu_cases import DECODE_TOKENS, DRY_TOKENS, MODELS, CompressCase, PrefillCase, layer_of
from gpu_decode import free
from gpu_program import Report, begin, parser_of
from gpu_timing import kernel_times, milliseconds

PREFILL_TOKENS = (8192, 32768)
NUM_SHOWN = 8
REPEAT = 100
"""Milliseconds of each figure."""
NOISE = re.compile(r"void |at::native::|at::|\(anonymous namespace\)::|cub::\w+::|\(.*")


def add_kernels(report: Report, title: str, run: Callable[[], object], is_dry: bool) -> None:
    kernels = kernel_times(run, is_dry)
    total = sum(kernel.milliseconds for kernel in kernels)
    launches = sum(kernel.launches for kernel in kernels)
    found = [kernel._asdict() for kernel in kernels]
    line = f"{title}: {1000 * total:.0f} us in {launches:.0f} launches"
    report.add(line, case=title, ms=total, kernels=found)
    for kernel in kernels[:NUM_SHOWN]:
        name = NOISE.sub("", kernel.name)[:70]
        print(f"  {1000 * kernel.milliseconds:7.1f} us {kernel.launches:5.1f} x {name}", flush=True)


def profile_prefill(report: Report, num_tokens: int, is_dry: bool) -> None:
    layer = layer_of(MODELS[0], is_dry)
    case = PrefillCase(layer, num_tokens)
    dense = milliseconds(case.dense, is_dry, REPEAT)
    sparse = milliseconds(case.sparse, is_dry, REPEAT)
    title = (
        f"sparse prefill, {layer.label} heads, {num_tokens} tokens, {sparse:.3f} ms "
        f"({case.baseline.name} dense {dense:.3f} ms, {dense / sparse:.2f}x)"
    )
    add_kernels(report, title, case.sparse, is_dry)


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    report, is_dry = begin(arguments), arguments.dry_run
    for num_tokens in (DRY_TOKENS,) if is_dry else PREFILL_TOKENS:
        profile_prefill(report, num_tokens, is_dry)
        free()
    for model in MODELS:
        layer, num_tokens = layer_of(model, is_dry), DRY_TOKENS if is_dry else DECODE_TOKENS
        case = CompressCase(layer, num_tokens)
        title = f"compression, {layer.label} heads, {num_tokens} tokens"
        add_kernels(report, title, case.run, is_dry)
        free()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
