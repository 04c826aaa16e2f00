"""The attention backend that vLLM selects by the name "ZIPVL"."""

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, replace_as

from vllm_zipvl.backend.impl import ZipVLAttentionImpl
from vllm_zipvl.backend.metadata import ZipVLMetadataBuilder
from vllm_zipvl.backend.requirements import BLOCK_MULTIPLE, check_spec
from vllm_zipvl.cache.spec import ZipVLSpec


class ZipVLAttentionBackend(AttentionBackend):
    """Adaptive sparse prefill with a two-precision paged KV cache."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [
        torch.float16,
        torch.bfloat16,
        torch.float32,
    ]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return "ZIPVL"

    @staticmethod
    def get_impl_cls() -> type[ZipVLAttentionImpl]:
        return ZipVLAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[ZipVLMetadataBuilder]:
        return ZipVLMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_MULTIPLE)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """All layers of a block side by side, so that a block can serve as heap memory."""
        return (KVCacheLayout.BLHNC,)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        check_spec(spec)
        dense_only = ("sliding_window", "attention_chunk_size", "non_causal")
        return replace_as(spec, ZipVLSpec, drop=dense_only)
