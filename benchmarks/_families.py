"""Full-size shapes of the families that people load most: classes of transformers' and the sizes that are published.

What is not given is the default of the config's class, which often is a published model itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Family(NamedTuple):
    """One model."""

    config: str  # the class of its config
    model: str  # its own class
    sizes: dict[str, Any]


def _text(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        **more,
    }


_QWEN3_EXPERTS = {"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
_KIMI = {
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "tie_word_embeddings": False,
}

FAMILIES = {
    "Llama-3.1-8B": Family("LlamaConfig", "LlamaForCausalLM", _text(4096, 14336, 32, 32, 8, 128256)),
    "Llama-4-Scout": Family("Llama4Config", "Llama4ForConditionalGeneration", {}),
    "Qwen2.5-7B": Family("Qwen2Config", "Qwen2ForCausalLM", _text(3584, 18944, 28, 28, 4, 152064)),
    "Qwen2.5-VL-7B": Family(
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": _text(3584, 18944, 28, 28, 4, 152064, layer_types=None),
            "vision_config": {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        },
    ),
    "Qwen3-8B": Family("Qwen3Config", "Qwen3ForCausalLM", _text(4096, 12288, 36, 32, 8, 151936, head_dim=128)),
    "Qwen3-30B-A3B": Family(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM", _text(2048, 6144, 48, 32, 4, 151936, **_QWEN3_EXPERTS)
    ),
    "Qwen3-VL-8B": Family(
        "Qwen3VLConfig",
        "Qwen3VLForConditionalGeneration",
        {
            "text_config": _text(4096, 12288, 36, 32, 8, 151936, head_dim=128),
            "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096},
        },
    ),
    "Qwen3-VL-30B-A3B": Family(
        "Qwen3VLMoeConfig",
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": _text(2048, 6144, 48, 32, 4, 151936, **_QWEN3_EXPERTS),
            "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 2048},
        },
    ),
    "Qwen3-Next-80B-A3B": Family("Qwen3NextConfig", "Qwen3NextForCausalLM", {}),
    "Qwen3.5-35B-A3B": Family("Qwen3_5MoeConfig", "Qwen3_5MoeForConditionalGeneration", {}),
    "Mistral-Small-3.1-24B": Family(
        "Mistral3Config",
        "Mistral3ForConditionalGeneration",
        {"text_config": _text(5120, 32768, 40, 32, 8, 131072, head_dim=128, model_type="mistral")},
    ),
    "Mixtral-8x7B": Family("MixtralConfig", "MixtralForCausalLM", {}),
    "Mistral-4": Family("Mistral4Config", "Mistral4ForCausalLM", {}),
    "Gemma-3-12B": Family(
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _text(3840, 15360, 48, 16, 8, 262208, head_dim=256),
            "vision_config": {
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_hidden_layers": 27,
                "num_attention_heads": 16,
                "image_size": 896,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
    ),
    "Gemma-3n-E4B, text": Family("Gemma3nTextConfig", "Gemma3nForCausalLM", {}),
    "Gemma-4": Family("Gemma4Config", "Gemma4ForConditionalGeneration", {}),
    "gpt-oss-20b": Family("GptOssConfig", "GptOssForCausalLM", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "DeepSeek-V3": Family("DeepseekV3Config", "DeepseekV3ForCausalLM", {}),
    "Kimi-K2": Family("DeepseekV3Config", "DeepseekV3ForCausalLM", _text(7168, 18432, 61, 64, 64, 163840, **_KIMI)),
    "GLM-4-9B": Family("Glm4Config", "Glm4ForCausalLM", {}),
    "GLM-4.5-Air": Family("Glm4MoeConfig", "Glm4MoeForCausalLM", {}),
    "GLM-4.5V": Family("Glm4vMoeConfig", "Glm4vMoeForConditionalGeneration", {}),
    "MiniMax-M2": Family("MiniMaxM2Config", "MiniMaxM2ForCausalLM", {}),
    "Phi-4": Family("Phi3Config", "Phi3ForCausalLM", _text(5120, 17920, 40, 40, 10, 100352)),
    "Phi-4-multimodal": Family("Phi4MultimodalConfig", "Phi4MultimodalForCausalLM", {}),
    "OLMo-3-7B": Family("Olmo3Config", "Olmo3ForCausalLM", {}),
    "Granite-3.1-MoE-3B": Family(
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        _text(1536, 512, 32, 24, 8, 49155, num_local_experts=40, num_experts_per_tok=8),
    ),
    "Nemotron-H-8B": Family(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "hidden_size": 4096,
            "intermediate_size": 21504,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "mamba_num_heads": 128,
            "ssm_state_size": 128,
            "n_groups": 8,
            "vocab_size": 131072,
            "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
        },
    ),
    "Falcon-H1": Family("FalconH1Config", "FalconH1ForCausalLM", {}),
    "LFM2-2.6B": Family("Lfm2Config", "Lfm2ForCausalLM", {}),
    "SmolLM3-3B": Family("SmolLM3Config", "SmolLM3ForCausalLM", {}),
    "ERNIE-4.5-21B-A3B": Family("Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM", {}),
    "Seed-OSS-36B": Family("SeedOssConfig", "SeedOssForCausalLM", _text(5120, 27648, 64, 80, 8, 155136, head_dim=128)),
    "Command-R7B": Family("Cohere2Config", "Cohere2ForCausalLM", _text(4096, 14336, 32, 32, 8, 256000)),
    "EXAONE-4-32B": Family("Exaone4Config", "Exaone4ForCausalLM", _text(5120, 27392, 64, 40, 8, 102400)),
    "Whisper-large-v3": Family(
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            "d_model": 1280,
            "encoder_layers": 32,
            "decoder_layers": 32,
            "encoder_attention_heads": 20,
            "decoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "decoder_ffn_dim": 5120,
            "vocab_size": 51866,
            "num_mel_bins": 128,
        },
    ),
    "bge-m3": Family(
        "XLMRobertaConfig",
        "XLMRobertaModel",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "vocab_size": 250002,
            "max_position_embeddings": 8194,
        },
    ),
    "ModernBERT-base": Family("ModernBertConfig", "ModernBertForMaskedLM", {}),
}
