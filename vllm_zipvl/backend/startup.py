"""What happens when the configuration of an engine that selects the backend is completed."""

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_zipvl.backend.requirements import check_supported
from vllm_zipvl.cache.spec import rules_of_layers
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import UNQUANTISED
from vllm_zipvl.ops.prefill_attention import find_kernel

logger = init_logger("vllm.zipvl")


def validate(vllm_config: VllmConfig) -> ZipVLConfig:
    """The settings of the engine.

    Raises:
        ValueError: A setting is invalid, or the engine asks for something unsupported.
    """
    config = ZipVLConfig.from_additional_config(vllm_config.additional_config)
    check_supported(vllm_config, config)
    model = vllm_config.model_config
    if model is not None and config.prefill_kernel != "auto":
        try:
            find_kernel(
                config.prefill_kernel,
                current_platform.device_type,
                model.dtype,
                model.get_head_size(),
            )
        except ValueError as error:
            raise ValueError(f"zipvl.prefill_kernel: {error}") from error
    return config


def announce(vllm_config: VllmConfig, config: ZipVLConfig) -> None:
    """Log once what is active."""
    logger.info("%s", describe(vllm_config, config))


def describe(vllm_config: VllmConfig, config: ZipVLConfig) -> str:
    """One line: what decides, at which bits, and what a token costs against 16 bit."""
    model = vllm_config.model_config
    num_kv_heads = model.get_num_kv_heads(vllm_config.parallel_config)
    block_size = vllm_config.cache_config.block_size
    rules = rules_of_layers(
        vllm_config, num_kv_heads, model.get_head_size(), block_size, model.dtype
    )
    geometry = rules.geometry
    rule = f"ratio {config.ratio}" if config.ratio is not None else f"tau {config.tau}"
    prefill = (
        f"sparse prefill from {config.min_tokens} tokens with a window of {config.window} and "
        f"{config.sinks} sinks"
        if config.prefills_sparsely
        else "dense prefill"
    )
    if not config.compress:
        return f"zipvl: {rule}, {prefill}, cache not compressed"
    full = geometry.token_head_bytes(UNQUANTISED)
    high, low = (geometry.token_head_bytes(bits) for bits in geometry.bits)
    return (
        f"zipvl: {rule}, {prefill}, cache at {config.high_bits}/{config.low_bits} bits: "
        f"{high}/{low} bytes per token and KV head of {geometry.head_size} "
        f"instead of {full} ({full / high:.1f}x/{full / low if low else float('inf'):.1f}x)"
    )
