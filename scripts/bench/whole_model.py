"""A whole decoder of a 7B model's shape on a GPU: first token and decode, against dense.

    python scripts/bench/whole_model.py --device cuda --json OUT
    TRITON_INTERPRET=1 python scripts/bench/whole_model.py --json OUT --dry-run   # on a CPU

Weights and prompts are random, so the kept share is set, not found. A prompt is computed in one
chunk; its compression comes after the first token and is timed by itself. Requests that decode
fill one amount of KV memory; their steps are replayed from a CUDA graph, and zipvl's tails are
compressed between them, at the host's pace. No prompt is computed meanwhile, and nothing is held
back for one, so that zipvl's number of requests is an upper bound. FlashAttention schedules itself,
where vLLM does so once a step. Of int4 and TurboQuant caches attention.py measures the kernels. A
ratio above 1 is better than dense in the same run.
Before anything is timed, a tiny model with everything kept must give dense attention's logits.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lone_flash
import torch
from attention_cases import DTYPE, Layer
from dense_attention import DenseAttention
from gpu_program import device_of, versions
from whole_model_check import PRETENDED_FLASH, check
from whole_model_decoder import Decoder, ModelShape
from whole_model_dense import request_bytes, why_no_fp8
from whole_model_measure import Bench, Sizes, decode_rows, prefill_rows
from whole_model_timing import Clock

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.ops.prefill_attention import find_kernel

OPS = ("prefill", "decode")
MODELS = {
    "LongVA-7B": ModelShape(Layer(28, 4, 128, 16), 28, 3584, 18944, 152064, 1000000.0),
    # LLaVA-NeXT's own contexts end at 4,096 tokens: longer ones are of its shape alone.
    "LLaVA-NeXT-7B": ModelShape(Layer(32, 32, 128, 16), 32, 4096, 11008, 32064, 10000.0),
}
DRY_MODELS = {
    "LongVA-7B": ModelShape(Layer(2, 1, 32, 16), 2, 64, 96, 128, 10000.0),
    "LLaVA-NeXT-7B": ModelShape(Layer(1, 1, 32, 16), 2, 64, 96, 128, 10000.0),
}
PREFILL_TOKENS, DECODE_TOKENS = (16384, 32768, 131072), 16384
CONFIG = ZipVLConfig(ratio=0.42, low_bits=2, max_kept=0.286)
"""`max_kept` bounds what the cache keeps at 4 bits; attention runs on the whole ratio."""
DRY_SIZES = Sizes((64,), decode_tokens=64, budget_bytes=None, repeats=0, decode_steps=9)
"""Two requests fit, and the second one's tail falls due in the eighth step."""
DRY_CONFIG = ZipVLConfig(
    ratio=0.42, low_bits=2, max_kept=0.286, probe_recent=8, probe_random=8, interval=16, residual=16
)
COLUMNS = (
    ("seconds", "seconds", "{:.4g}"),
    ("ratio", "ratio", "{:.2f}x"),
    ("attention", "attention_share", "{:.1%}"),
    ("kept", "kept", "{:.3f}"),
    ("at kept^2", "roofline_ratio", "{:.2f}x"),
    ("compress s", "compress_seconds", "{:.3f}"),
    ("of prefill", "compress_share", "{:.1%}"),
    ("tokens/s", "tokens_per_second", "{:.0f}"),
    ("step ms", "step_seconds", "{:.2f}"),
    ("between", "between_share", "{:.1%}"),
)


def heading() -> str:
    titles = "".join(f"{title:>12}" for title, _, _ in COLUMNS)
    return f"{'op':<12}{'model':<14}{'tokens':>7}{'requests':>9}{'method':>7}{titles}"


def line(found: dict[str, Any]) -> str:
    """A row of the table; what does not apply is left blank."""
    shape = found["shape"]
    text = f"{found['op']:<12}{shape['model']:<14}{shape['tokens']:>7}"
    text += f"{shape.get('rows', 1):>9}{found['method']:>7}"
    if "absent" in found:
        return f"{text}  absent: {found['absent']}"
    for _, key, form in COLUMNS:
        factor = 1000 if key == "step_seconds" else 1
        text += f"{form.format(found[key] * factor) if key in found else '':>12}"
    if found.get("not_captured"):
        text += f"  no CUDA graph: {found['not_captured']}"
    return text


def dense_of(layer: Layer, pretends: bool) -> DenseAttention:
    dense = DenseAttention(layer)
    if pretends:
        dense.flash, dense.name = PRETENDED_FLASH, "pretended FA3"
    return dense


def thin_bench(is_dry: bool, num_tokens: int, num_requests: int) -> Bench:
    """Two thin layers of LongVA's heads: they launch the kernels that the whole model does."""
    whole = (DRY_MODELS if is_dry else MODELS)["LongVA-7B"]
    thin = DRY_MODELS["LongVA-7B"]
    shape, device = thin._replace(layer=whole.layer), torch.get_default_device()
    budget = num_requests * request_bytes(shape, num_tokens, DTYPE)
    # Of many requests a tail falls due in every step.
    sizes = Sizes((num_tokens,), num_tokens, budget, repeats=0, decode_steps=2)
    dense, decoder = dense_of(whole.layer, pretends=False), Decoder(shape, 2 * num_tokens)
    config = DRY_CONFIG if is_dry else CONFIG
    return Bench("thin", shape, decoder, dense, config, sizes, Clock(device), why_no_fp8(dense))


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    is_dry = arguments.dry_run
    sizes, config = DRY_SIZES, DRY_CONFIG
    if not is_dry:
        budget = round(arguments.kv_gib * 2**30)
        tokens = tuple(arguments.prefill_tokens)
        sizes, config = Sizes(tokens, DECODE_TOKENS, budget, arguments.repeats), CONFIG
    for name in arguments.models:
        shape = (DRY_MODELS if is_dry else MODELS)[name]
        # A dry run goes both ways.
        dense = dense_of(shape.layer, pretends=is_dry and name == "LongVA-7B")
        no_fp8 = check(dense)
        decoder = Decoder(shape, max(*sizes.prefill_tokens, 2 * sizes.decode_tokens))
        bench = Bench(name, shape, decoder, dense, config, sizes, Clock(device), no_fp8)
        for op in arguments.ops:
            if op == "decode":
                yield from decode_rows(bench)
                continue
            for num_tokens in sizes.prefill_tokens:
                yield from prefill_rows(bench, num_tokens)
        del decoder, bench


def about(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    head_size = MODELS["LongVA-7B"].layer.head_size
    kernel = find_kernel("auto", device.type, DTYPE, head_size)
    return versions() | {
        "device": device.type,
        "dtype": str(DTYPE),
        "dense attention": DenseAttention(MODELS["LongVA-7B"].layer).name,
        "sparse prefill attention": kernel,
        "KV GiB": arguments.kv_gib,
        "dry run": arguments.dry_run,
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda",), default="cuda")
    parser.add_argument("--json", type=Path, required=True, help="where the rows are written")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="in turn")
    parser.add_argument("--prefill-tokens", nargs="+", type=int, default=list(PREFILL_TOKENS))
    parser.add_argument("--kv-gib", type=float, default=40, help="KV memory that decode fills")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU: figures mean nothing")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    arguments = parsed()
    device = device_of(arguments.dry_run)
    torch.set_default_device(device)
    if not arguments.dry_run:
        lone_flash.find()
    torch.manual_seed(0)
    known = about(arguments, device)
    print(", ".join(f"{key} {value}" for key, value in known.items()), end="\n\n")
    print(heading())
    known["zipvl"] = asdict(DRY_CONFIG if arguments.dry_run else CONFIG)
    rows = []
    for found in measure(arguments, device):
        print(line(found), flush=True)
        rows.append(found)
        # What is measured stays, if the rest is interrupted.
        arguments.json.write_text(json.dumps({"about": known, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
