"""Attention of single queries over heap pages and the dense tail."""

from vllm_zipvl.ops.decode_attention.api import (
    CachedContext,
    DecodeRows,
    decode_attention,
    workspace_bytes,
)

__all__ = ["CachedContext", "DecodeRows", "decode_attention", "workspace_bytes"]
