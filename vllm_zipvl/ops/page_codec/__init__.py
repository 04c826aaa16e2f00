"""Heap pages: writing compressed tokens and reading them back."""

from vllm_zipvl.ops.page_codec.api import PageTables, read_pages, write_pages, write_tokens

__all__ = ["PageTables", "read_pages", "write_pages", "write_tokens"]
