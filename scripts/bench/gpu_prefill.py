"""A layer's sparse prefill against dense attention, from 4K to 128K tokens.

python scripts/bench/gpu_prefill.py --json OUT
TRITON_INTERPRET=1 python scripts/bench/gpu_prefill.py --json OUT --dry-run
"""

import torch
from attention_cases import check_prefill
from attention_gpu import prefill_row
from gpu_cases import DRY_TOKENS, MODELS, layer_of
from gpu_decode import free
from gpu_program import begin, parser_of

PREFILL_TOKENS = (4096, 8192, 32768, 131072)
PREDICTED = {4096: 0.6, 8192: 1.35, 32768: 3.4, 131072: 4.9}
"""How many times faster than FlashAttention 3 on an H100: 28/4 heads, without near attention."""
REPEAT = 200
"""Milliseconds of each figure."""


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    report, is_dry = begin(arguments), arguments.dry_run
    for model in MODELS[:1] if is_dry else MODELS:
        layer = layer_of(model, is_dry)
        check_prefill(layer)
        for num_tokens in (DRY_TOKENS,) if is_dry else PREFILL_TOKENS:
            row = prefill_row(model, layer, num_tokens, is_dry, REPEAT)
            has_prediction = model == MODELS[0] and num_tokens in PREDICTED
            note = f"(predicted {PREDICTED[num_tokens]}x)" if has_prediction else ""
            report.add(
                f"{layer.label:<6} {num_tokens:>6} tokens: {row['baseline']} "
                f"{1000 * row['baseline_seconds']:8.3f} ms, sparse {1000 * row['seconds']:8.3f} ms "
                f"by {row['kernel']}, {row['ratio']:.2f}x {note}".rstrip(),
                **row,
            )
            free()


if __name__ == "__main__":
    with torch.inference_mode():
        main()
