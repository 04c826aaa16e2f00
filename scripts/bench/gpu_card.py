"""Which GPU this is, what it copies a second, and what dense attention there is.

    python scripts/bench/gpu_card.py --json OUT
    TRITON_INTERPRET=1 python scripts/bench/gpu_card.py --json OUT --dry-run

FlashAttention of vLLM, where its files are there, is timed against torch's own attention.
"""

import torch
from attention_cases import randn
from dense_attention import DenseAttention
from gpu_cases import DRY_TOKENS, MODELS, layer_of
from gpu_program import Report, begin, parser_of
from gpu_timing import copied_bytes_per_second, milliseconds, replayed_milliseconds

PREFILL_TOKENS, DECODE_TOKENS, NUM_ROWS = 8192, 16384, 8
REPEAT = 100
"""Milliseconds of each figure."""


def describe(report: Report, is_dry: bool) -> None:
    about = report.about
    names = ", ".join(f"{key} {value}" for key, value in about.items() if key != "no vLLM flash")
    report.add(names, **about)
    rate = copied_bytes_per_second(is_dry, REPEAT)
    report.add(f"a copy reads and writes {rate / 1e12:.2f} TB/s", copied_bytes_per_second=rate)
    if reason := about["no vLLM flash"]:
        report.add(f"no FlashAttention of vLLM: {reason}", no_flash=reason)


def compare(report: Report, dense: DenseAttention, is_dry: bool) -> None:
    """One way of dense attention, prefill and decode."""
    num_tokens = DRY_TOKENS if is_dry else PREFILL_TOKENS
    layer = dense.layer
    query = randn(num_tokens, layer.num_heads, layer.head_size)
    key, value = randn(2, num_tokens, layer.num_kv_heads, layer.head_size)
    prefill = milliseconds(dense.prefill(query, key, value), is_dry, REPEAT)
    context = DRY_TOKENS if is_dry else DECODE_TOKENS
    decode = replayed_milliseconds(dense.decode(query[:NUM_ROWS], context), is_dry, REPEAT)
    report.add(
        f"{dense.name}, {layer.label} heads: prefill of {num_tokens} tokens {prefill:.3f} ms, "
        f"decode of {NUM_ROWS} rows of {context} {decode:.3f} ms",
        method=dense.name, prefill_ms=prefill, decode_ms=decode,
    )  # fmt: skip


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    report, is_dry = begin(arguments), arguments.dry_run
    describe(report, is_dry)
    best = DenseAttention(layer_of(MODELS[0], is_dry))
    compare(report, best, is_dry)
    if best.flash is not None:
        plain = DenseAttention(best.layer)
        plain.flash, plain.name = None, "torch SDPA"
        compare(report, plain, is_dry)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
