"""What must hold before a whole model is timed: with everything kept, zipvl is dense attention."""

from typing import Any

import torch
from attention_cases import DTYPE, Layer, agree
from dense_attention import DenseAttention
from whole_model_decoder import Decoder, ModelShape
from whole_model_dense import FP8, DenseRequests, why_no_fp8
from whole_model_prompt import Prompt
from whole_model_requests import ZipVLRequests

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.ops.prefill_attention import reference
from vllm_zipvl.ops.prefill_attention.flash_attn import VarlenAttention

SHAPE = ModelShape(Layer(2, 1, 32, 16), 2, 64, 96, 128, 10000.0)
SHARPNESS = 2.0
"""Attention to a few tokens, so that the logits show where it went wrong."""
EVERYTHING = ZipVLConfig(ratio=1.0, high_bits=16, low_bits=16, interval=16, residual=16)
PROMPT_TOKENS, NUM_STEPS, NUM_REQUESTS = 94, 4, 2
"""In so many steps a tail is compressed, and a block begun after it."""
FP8_SIMILARITY = 0.95


def _attend_like_flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    **others: Any,
) -> Any:
    assert causal and set(others) <= {
        "max_seqlen_q", "max_seqlen_k", "q_descale", "k_descale", "v_descale",
    }  # fmt: skip
    q, k, v = (x.to(DTYPE) for x in (q, k, v))
    out, lse, starts = torch.empty_like(q), torch.empty(q.shape[:2]), cu_seqlens_q.tolist()
    for i, (first, end) in enumerate(zip(starts, starts[1:], strict=False)):
        if block_table is not None and seqused_k is not None:
            keys, values = (x[block_table[i].long()].flatten(0, 1)[: seqused_k[i]] for x in (k, v))
        else:
            assert cu_seqlens_k is not None
            keys, values = (x[cu_seqlens_k[i] : cu_seqlens_k[i + 1]] for x in (k, v))
        own = q[first:end], keys, values
        out[first:end], lse[first:end] = reference.attend_one(*own, softmax_scale)
    return (out, lse.t().contiguous()) if return_softmax_lse else out


PRETENDED_FLASH = VarlenAttention(_attend_like_flash, 3, "return_softmax_lse")
"""Stands in for FlashAttention 3 in a dry run."""


class _Case:
    """A tiny model and what dense prefill makes of a sequence of tokens."""

    def __init__(self, dense: DenseAttention) -> None:
        self.dense = dense
        # Heads of the size that is timed, whose scale `dense` has.
        layer = SHAPE.layer._replace(head_size=dense.layer.head_size)
        self.shape = SHAPE._replace(layer=layer)
        self.num_tokens = PROMPT_TOKENS + NUM_STEPS
        self.decoder = Decoder(self.shape, self.num_tokens, SHARPNESS)
        self.tokens = torch.randint(self.shape.vocab_size, (self.num_tokens,))
        self.positions = torch.arange(self.num_tokens)

    def prefill(self, requests: DenseRequests | Prompt, num_tokens: int) -> torch.Tensor:
        tokens, positions = self.tokens[:num_tokens], self.positions[:num_tokens]
        return self.decoder.logits(tokens, positions, requests.prefill, 1)

    def step(self, requests: DenseRequests | ZipVLRequests, token: int) -> torch.Tensor:
        requests.begin()
        tokens = self.tokens[token].expand(NUM_REQUESTS)
        logits = self.decoder.logits(tokens, requests.positions, requests.decode, NUM_REQUESTS)
        requests.after()
        return logits

    def dense_requests(self, dtype: torch.dtype = DTYPE) -> DenseRequests:
        return DenseRequests(self.shape, self.dense, NUM_REQUESTS, self.num_tokens, dtype)


def check(dense: DenseAttention) -> str | None:
    """Stop the run if dense decode or zipvl computes something else than dense prefill does.

    Returns:
        Why there are no figures of an fp8 cache, if there are none.
    """
    case = _Case(dense)
    requests = case.dense_requests()
    prompt = Prompt(case.shape, EVERYTHING, PROMPT_TOKENS)
    expected_first = case.prefill(requests, PROMPT_TOKENS)
    agree("prefill of a whole model", case.prefill(prompt, PROMPT_TOKENS), expected_first)
    expected = case.prefill(requests, case.num_tokens).expand(NUM_REQUESTS, -1)
    requests.fill()
    agree("dense decode", case.step(requests, -1), expected)
    ours = ZipVLRequests(prompt, NUM_REQUESTS, NUM_STEPS, in_turn=False)
    ours.fill()
    for token in range(PROMPT_TOKENS, case.num_tokens):
        logits = case.step(ours, token)
    agree("decode of a whole model", logits, expected)
    if reason := why_no_fp8(dense):
        return reason
    try:
        return _fault_of_fp8(case, expected)
    # Its kernel is not ours, and the other methods do not depend on it.
    except RuntimeError as error:
        return str(error).splitlines()[0]


def _fault_of_fp8(case: _Case, expected: torch.Tensor) -> str | None:
    requests = case.dense_requests(FP8)
    found = case.prefill(requests, case.num_tokens).expand(NUM_REQUESTS, -1)
    requests.fill()
    for name, logits in (("prefill", found), ("decode", case.step(requests, -1))):
        similarity = torch.cosine_similarity(logits.float(), expected.float())
        if not float(similarity.min()) >= FP8_SIMILARITY:
            return f"fp8 {name} is only {similarity.tolist()} similar to dense {name}"
    return None
