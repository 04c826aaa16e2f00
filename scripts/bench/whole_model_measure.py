"""Time to the first token, and decode in one amount of KV memory, of each method."""

import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import whole_model_dense
import whole_model_requests
from attention_cases import DTYPE
from attention_rows import absent, row
from dense_attention import DenseAttention
from whole_model_decoder import Decoder, ModelShape
from whole_model_dense import FP8, DenseRequests
from whole_model_prompt import Compressor, Prompt, geometry_of
from whole_model_requests import ZipVLRequests, interval_of, prompt_tokens
from whole_model_timing import Clock, Pace, Prefilled, Run

from vllm_zipvl.config import ZipVLConfig


class Sizes(NamedTuple):
    """What is measured.

    Attributes:
        prefill_tokens: Lengths of prompts.
        decode_tokens: Context of each request that decodes.
        budget_bytes: KV memory that they fill; None is that of two dense requests.
        repeats: Medians are over as many, after a first run that is not counted; 0 counts that one.
        decode_steps: Of a run; None are so many that the tail of every request falls due once.
    """

    prefill_tokens: tuple[int, ...]
    decode_tokens: int
    budget_bytes: int | None
    repeats: int
    decode_steps: int | None = None


class Bench(NamedTuple):
    """A model on a device."""

    name: str
    shape: ModelShape
    decoder: Decoder
    dense: DenseAttention
    config: ZipVLConfig
    sizes: Sizes
    clock: Clock
    why_no_fp8: str | None

    @property
    def device(self) -> torch.device:
        return self.clock.device

    def shape_of(self, num_tokens: int, **more: int) -> dict[str, Any]:
        found = {"model": self.name, "tokens": num_tokens, "heads": self.shape.layer.heads}
        return found | more

    def prefill(self, num_tokens: int, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        """The first token after a random prompt."""
        tokens = torch.randint(self.shape.vocab_size, (num_tokens,))
        positions = torch.arange(num_tokens)
        return self.decoder.logits(tokens, positions, attend, 1).argmax(-1)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _fp8_row(
    bench: Bench, op: str, shape: dict[str, Any], measured: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The row of the fp8 cache, or why there is none."""
    reason = bench.why_no_fp8
    if reason is None:
        try:
            return measured()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    return absent(op, shape, "fp8", reason)


# Time to the first token.


def _dense_prefill(bench: Bench, num_tokens: int, dtype: torch.dtype) -> Prefilled:
    requests = DenseRequests(bench.shape, bench.dense, 1, num_tokens, dtype)
    return _prefilled(bench, num_tokens, requests)


def _prefilled(bench: Bench, num_tokens: int, requests: DenseRequests | Prompt) -> Prefilled:
    def run(attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        return bench.prefill(num_tokens, attend)

    return bench.clock.prefill(run, requests.prefill, bench.sizes.repeats)


def prefill_rows(bench: Bench, num_tokens: int) -> Iterator[dict[str, Any]]:
    shape = bench.shape_of(num_tokens)

    def found(method: str, prefilled: Prefilled, **more: Any) -> dict[str, Any]:
        share = prefilled.attention_seconds / prefilled.seconds
        return row(
            "first token", shape, method, prefilled.seconds, bench.dense.name, dense.seconds,
            attention_seconds=prefilled.attention_seconds, attention_share=share, **more,
        )  # fmt: skip

    dense = _dense_prefill(bench, num_tokens, DTYPE)
    yield found("dense", dense)
    _free(bench.device)
    ours, more = _zipvl_prefill(bench, num_tokens, dense)
    yield found("zipvl", ours, **more)
    _free(bench.device)
    yield _fp8_row(
        bench, "first token", shape, lambda: found("fp8", _dense_prefill(bench, num_tokens, FP8))
    )
    _free(bench.device)


def _zipvl_prefill(
    bench: Bench, num_tokens: int, dense: Prefilled
) -> tuple[Prefilled, dict[str, Any]]:
    prompt = Prompt(bench.shape, bench.config, num_tokens)
    prefilled = _prefilled(bench, num_tokens, prompt)
    compressor = Compressor(prompt)
    compression = bench.clock.median_of(compressor.run, bench.sizes.repeats)
    rest = dense.seconds - dense.attention_seconds
    ideal = rest + prompt.kept**2 * dense.attention_seconds
    return prefilled, {
        "kernel": prompt.kernel,
        "kept": prompt.kept,
        # After the first token, before the second or third.
        "compress_seconds": compression,
        "compress_share": compression / prefilled.seconds,
        # If attention took the square of the kept share of what it takes dense.
        "roofline_ratio": dense.seconds / ideal,
    }


# Decode.


class Decoded(NamedTuple):
    """How requests decode that fill the KV memory."""

    num_requests: int
    request_bytes: int
    pace: Pace
    not_captured: str | None

    @property
    def tokens_per_second(self) -> float:
        return self.num_requests / self.pace.seconds


def _decoded(
    bench: Bench,
    requests: DenseRequests | ZipVLRequests,
    num_requests: int,
    request_bytes: int,
    num_steps: int,
) -> Decoded:
    requests.fill()
    tokens = torch.randint(bench.shape.vocab_size, (num_requests,))

    def step() -> None:
        requests.begin()
        logits = bench.decoder.logits(tokens, requests.positions, requests.decode, num_requests)
        tokens.copy_(logits.argmax(-1))

    graphed = bench.clock.captured(step)
    run = Run(requests.rewind, graphed.step, requests.after)
    pace = bench.clock.pace(run, num_steps, bench.sizes.repeats)
    return Decoded(num_requests, request_bytes, pace, graphed.not_captured)


def _dense_decode(bench: Bench, budget: int, dtype: torch.dtype, num_steps: int) -> Decoded:
    num_tokens = bench.sizes.decode_tokens
    request_bytes = whole_model_dense.request_bytes(bench.shape, num_tokens, dtype)
    num_requests = budget // request_bytes
    requests = DenseRequests(bench.shape, bench.dense, num_requests, num_tokens, dtype)
    bench.prefill(num_tokens, requests.prefill)
    return _decoded(bench, requests, num_requests, request_bytes, num_steps)


def _zipvl_decode(bench: Bench, budget: int, num_steps: int) -> tuple[Decoded, float]:
    """Also the share of the prompt kept at high precision."""
    geometry = geometry_of(bench.shape, bench.config)
    num_tokens = prompt_tokens(bench.config, geometry, bench.sizes.decode_tokens)
    prompt = Prompt(bench.shape, bench.config, num_tokens)
    bench.prefill(num_tokens, prompt.prefill)
    masks = prompt.masks()
    request_bytes = whole_model_requests.request_bytes(prompt, prompt.num_pages(masks))
    num_requests = budget // request_bytes
    requests = ZipVLRequests(prompt, num_requests, num_steps)
    decoded = _decoded(bench, requests, num_requests, request_bytes, num_steps)
    return decoded, float(masks.float().mean())


def decode_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """Requests at `decode_tokens`, as many as fit into the budget."""
    num_tokens = bench.sizes.decode_tokens
    two = 2 * whole_model_dense.request_bytes(bench.shape, num_tokens, DTYPE)
    budget = bench.sizes.budget_bytes or two
    interval = interval_of(bench.config, geometry_of(bench.shape, bench.config))
    num_steps = bench.sizes.decode_steps or interval

    def found(method: str, decoded: Decoded, **more: float) -> dict[str, Any]:
        pace = decoded.pace
        return row(
            "decode", bench.shape_of(num_tokens, rows=decoded.num_requests), method,
            1 / decoded.tokens_per_second, bench.dense.name, 1 / dense.tokens_per_second,
            tokens_per_second=decoded.tokens_per_second,
            requests_ratio=decoded.num_requests / dense.num_requests,
            step_seconds=pace.step_seconds, between_share=1 - pace.step_seconds / pace.seconds,
            request_bytes=decoded.request_bytes, budget_bytes=budget,
            not_captured=decoded.not_captured, **more,
        )  # fmt: skip

    dense = _dense_decode(bench, budget, DTYPE, num_steps)
    yield found("dense", dense)
    _free(bench.device)
    decoded, kept = _zipvl_decode(bench, budget, num_steps)
    yield found("zipvl", decoded, kept=kept)
    _free(bench.device)
    yield _fp8_row(
        bench, "decode", bench.shape_of(num_tokens),
        lambda: found("fp8", _dense_decode(bench, budget, FP8, num_steps)),
    )  # fmt: skip
    _free(bench.device)
