"""Each patch is still needed, and installing twice patches once.

A test here that starts to fail says that vLLM no longer has the symptom: drop the patch.
"""

import pickle
import subprocess
import sys
from typing import ClassVar

import pytest
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_zipvl import compat, plugin
from vllm_zipvl.backend.names import BACKEND, BACKEND_CLASS


@pytest.fixture(autouse=True)
def installed():
    plugin.register()


def original_of(function):
    return getattr(getattr(function, "__func__", function), compat._MARK)


def test_registering_again_wraps_nothing_twice():
    first = current_platform.check_and_update_config
    plugin.register()
    again = current_platform.check_and_update_config
    assert again.__func__ is first.__func__
    assert not hasattr(original_of(again).__func__, compat._MARK)


def test_the_member_parses_in_any_case():
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model="any", attention_backend="zipvl")
    assert args.attention_backend in ("zipvl", AttentionBackendEnum[BACKEND])


def test_unpickling_registers_the_member():
    pickled = pickle.dumps(AttentionBackendEnum[BACKEND])
    program = f"import pickle; print(pickle.loads({pickled!r}).name)"
    environment = {"VLLM_PLUGINS": "", "PATH": "/usr/bin"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert run.stdout.split()[-1] == BACKEND, run.stderr[-500:]


def test_a_plain_enum_member_still_fails_to_unpickle():
    program = (
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend\n"
        "register_backend('OTHER', 'a.b.C')\n"
        "import pickle, sys; sys.stdout.buffer.write(pickle.dumps(AttentionBackendEnum.OTHER))"
    )
    environment = {"VLLM_PLUGINS": "", "PATH": "/usr/bin"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    with pytest.raises(ValueError):
        pickle.loads(run.stdout[run.stdout.index(b"\x80") :])


class Selector:
    use_sparse = use_mla = False
    attn_type = "decoder"


def test_the_cpu_platform_still_ignores_registered_backends():
    stock = original_of(current_platform.get_attn_backend_cls)
    assert stock(AttentionBackendEnum[BACKEND], Selector()) != BACKEND_CLASS
    resolved = current_platform.get_attn_backend_cls(AttentionBackendEnum[BACKEND], Selector())
    assert resolved == BACKEND_CLASS


def test_the_kernel_scan_still_stumbles_over_llvmlite():
    import llvmlite.binding.ffi  # noqa: F401  (the scan looks at loaded modules)
    from vllm.triton_utils import dispatcher

    with pytest.raises(AttributeError, match="_lib_fn_wrapper"):
        getattr(dispatcher._rebind_kernels, compat._MARK)([])
    dispatcher._rebind_kernels([])
    assert "llvmlite.binding.ffi" in sys.modules


def test_streaming_sessions_are_refused_only_for_this_backend():
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    class Attention:
        backend = AttentionBackendEnum[BACKEND]
        backend_per_kind: ClassVar = {}

    class Config:
        attention_config = Attention()

    class Processor:
        vllm_config = Config()

    process = InputProcessor.process_inputs
    with pytest.raises(VLLMValidationError, match="streaming input"):
        process(Processor(), "id", "prompt", None, resumable=True)
    Attention.backend = AttentionBackendEnum.CPU_ATTN
    with pytest.raises(AttributeError):  # goes on into vLLM, which needs a real processor
        process(Processor(), "id", "prompt", None, (), resumable=True)
