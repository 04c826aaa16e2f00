"""The KV cache spec of a layer, and what follows from an engine's configuration."""

from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_zipvl.cache.heap import HeapTables
from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import PageGeometry, cdiv
from vllm_zipvl.rules import CacheRules


@dataclass(frozen=True, kw_only=True)
class ZipVLSpec(AttentionSpec):
    """Full attention whose old tokens are moved into compressed pages.

    It derives from `AttentionSpec` rather than `FullAttentionSpec` so that vLLM merges it
    with nothing else.
    """

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of this layer for one request of `max_model_len`: its blocks and its heap."""
        max_len = vllm_config.model_config.max_model_len
        rules = rules_of(self, vllm_config)
        num_blocks = cdiv(max_len, self.block_size) + rules.max_heap_blocks(max_len)
        return num_blocks * self.page_size_bytes


def rules_of(spec: AttentionSpec, vllm_config: VllmConfig) -> CacheRules:
    """The rules of an engine whose layers have `spec`."""
    shape = (spec.num_kv_heads, spec.head_size, spec.block_size)
    return rules_of_layers(vllm_config, *shape, spec.dtype)


def rules_of_layers(
    vllm_config: VllmConfig,
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    dtype: torch.dtype,
) -> CacheRules:
    """The rules of an engine with such layers, all alike; heads are those of one rank."""
    config = ZipVLConfig.from_additional_config(vllm_config.additional_config)
    geometry = PageGeometry(
        num_layers=vllm_config.model_config.get_num_layers(vllm_config.parallel_config),
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        itemsize=get_dtype_size(dtype),
        block_size=block_size,
        high_bits=config.high_bits,
        low_bits=config.low_bits,
    )
    return CacheRules(config, geometry)


def make_tables(rules: CacheRules, vllm_config: VllmConfig, device: torch.device) -> HeapTables:
    """Tables for as many requests as may run, and a slot more for rows that are nobody's."""
    num_slots = vllm_config.scheduler_config.max_num_seqs + 1
    max_tokens = vllm_config.model_config.max_model_len if rules.config.compress else 0
    return HeapTables(rules.geometry, num_slots, max_tokens, device)


def max_gathered_tokens(vllm_config: VllmConfig) -> int:
    """Tokens of contexts that are gathered at once: a step's, or those of the longest request."""
    max_new = vllm_config.scheduler_config.max_num_batched_tokens
    return max(vllm_config.model_config.max_model_len, max_new)
