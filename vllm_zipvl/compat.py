"""Every change to vLLM's own behaviour, each with its symptom and when it can go.

`install` is idempotent and changes nothing for engines that do not select the backend, except
that on a CPU one patch mends a scan of vLLM's.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.config import KVTransferConfig, VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_zipvl.backend.names import BACKEND, BACKEND_CLASS, CONNECTOR, CONNECTOR_MODULE

_MARK = "_zipvl_original"


def install() -> None:
    """Register the backend and patch vLLM."""
    register_member()
    from vllm_zipvl.cache.registration import register_manager

    register_manager()
    platform = type(current_platform)
    _wrap_classmethod(platform, "check_and_update_config", _complete_config)
    _check_requests()
    if current_platform.is_cpu():
        _wrap_classmethod(platform, "get_attn_backend_cls", _resolve_on_cpu)
        _hide_llvmlite_from_scan()


def register_member() -> AttentionBackendEnum:
    """Add the enum member that `--attention-backend zipvl` parses to.

    Symptom without `__reduce_ex__`: a spawned worker fails with "Unknown attention backend"
    while it unpickles the configuration, which happens before it loads plugins. Unpickling
    through this function registers the member first. Can go when vLLM loads plugins before
    it unpickles, or pickles backends by name.
    """
    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, BACKEND_CLASS)
        member = AttentionBackendEnum[BACKEND]
        member.__reduce_ex__ = lambda protocol: (register_member, ())
    return AttentionBackendEnum[BACKEND]


def is_selected(vllm_config: VllmConfig) -> bool:
    """Whether this engine asks for the zipvl backend, for all layers or for some."""
    config = vllm_config.attention_config
    return AttentionBackendEnum[BACKEND] in (config.backend, *config.backend_per_kind.values())


def _wrap_classmethod(cls: type, name: str, wrapper: Callable[..., Any]) -> None:
    original = getattr(cls, name)
    if hasattr(original.__func__, _MARK):
        return

    @wraps(original.__func__)
    def wrapped(cls: type, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _MARK, original)
    setattr(cls, name, classmethod(wrapped))


def _complete_config(original: Callable[..., None], vllm_config: VllmConfig) -> None:
    """Refuse what is not supported and put the connector in its slot.

    Symptom without it: the CPU platform never validates a backend, and the connector that
    carries plans and reports would have to be named by the user. Can go when vLLM gives
    backends a hook to complete the configuration.
    """
    if not is_selected(vllm_config):
        original(vllm_config)
        return
    from vllm_zipvl.backend import startup

    # Before the platform drops what it does not support itself with no more than a warning.
    config = startup.validate(vllm_config)
    original(vllm_config)
    if vllm_config.model_config is not None and vllm_config.kv_transfer_config is None:
        # "kv_producer" is the role that leaves everything else as it is.
        vllm_config.kv_transfer_config = KVTransferConfig(
            kv_connector=CONNECTOR,
            kv_connector_module_path=CONNECTOR_MODULE,
            kv_role="kv_producer",
        )
        startup.announce(vllm_config, config)


def _resolve_on_cpu(
    original: Callable[..., str], selected_backend: Any, *args: Any, **kwargs: Any
) -> str:
    """Let the CPU platform use the registered backend.

    Symptom without it: "Cannot use AttentionBackendEnum.ZIPVL backend on CPU." and CPU_ATTN
    runs instead. Can go when `CpuPlatform.get_attn_backend_cls` resolves registered members
    as `CudaPlatform` does.
    """
    config = kwargs.get("attn_selector_config", args[0] if args else None)
    is_decoder = config is not None and config.attn_type == "decoder"
    if selected_backend is AttentionBackendEnum[BACKEND] and is_decoder:
        return BACKEND_CLASS
    if selected_backend is AttentionBackendEnum[BACKEND]:
        selected_backend = None
    return original(selected_backend, *args, **kwargs)


def _check_requests() -> None:
    """Refuse requests in the front end, so that their sender gets the error.

    Symptom without it: a streaming-input session would append to a prompt whose cache was
    compressed already. Can go when vLLM hands `Platform.validate_request` what a request is
    and which engine it is for.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.process_inputs
    if hasattr(original, _MARK):
        return

    @wraps(original)
    def process_inputs(
        self: InputProcessor, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if is_selected(self.vllm_config):
            from vllm_zipvl.backend.requirements import check_request

            check_request(params, resumable=bool(kwargs.get("resumable")))
        return original(self, request_id, prompt, params, *args, **kwargs)

    setattr(process_inputs, _MARK, original)
    InputProcessor.process_inputs = process_inputs


def _hide_llvmlite_from_scan() -> None:
    """Keep llvmlite out of vLLM's scan of all modules for Triton kernels.

    Symptom without it: the second engine of one process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`)
    stops in `_rebind_kernels` with "'_lib_fn_wrapper' object has no attribute 'get'", because
    the first one's decode kernels imported numba, and llvmlite's library handle answers every
    attribute, `__dict__` too. Can go when that scan passes over what is not a mapping.
    """
    from vllm.triton_utils import dispatcher

    original = dispatcher._rebind_kernels
    if hasattr(original, _MARK):
        return

    @wraps(original)
    def rebind(*args: Any, **kwargs: Any) -> None:
        handle = sys.modules.pop("llvmlite.binding.ffi", None)
        try:
            original(*args, **kwargs)
        finally:
            if handle is not None:
                sys.modules["llvmlite.binding.ffi"] = handle

    setattr(rebind, _MARK, original)
    dispatcher._rebind_kernels = rebind
