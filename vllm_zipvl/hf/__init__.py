"""The algorithm in transformers, written plainly: an oracle for the engine, and for studies.

    model = AutoModelForImageTextToText.from_pretrained(name, attn_implementation="zipvl")
    model.generate(**inputs, past_key_values=ZipVLCache(ZipVLConfig(tau=0.99)))

Importing this package registers the implementation. Evicted and quantised tokens are computed with
as the engine would, and held at full size: it saves no memory and no time.
"""

from vllm_zipvl.hf.attention import NAME, register
from vllm_zipvl.hf.cache import ZipVLCache

__all__ = ["NAME", "ZipVLCache", "register"]

register()
