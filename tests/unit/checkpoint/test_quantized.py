"""What tells that a checkpoint is quantized already, and what does not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers import headers
from octavo.checkpoint.quantized import Quantization, find_quantization

#: name -> (dtype, shape)
Tensors = Mapping[str, tuple[str, Sequence[int]]]
PLAIN: Tensors = {"model.up.weight": ("BF16", (8, 8)), "model.norm.weight": ("F32", (8,))}


def find(folder: Path, config: Mapping[str, Any], tensors: Tensors = PLAIN) -> Quantization | None:
    checkpoint = headers({name: shape for name, (_, shape) in tensors.items()}, {n: d for n, (d, _) in tensors.items()})
    return find_quantization(folder, config, checkpoint.tensors)


# -- declared ---------------------------------------------------------------------------------------------------------

DECLARED: dict[str, tuple[dict[str, Any], str, str]] = {
    "at the top": ({"quantization_config": {"quant_method": "gptq"}}, "gptq", "says its config.json"),
    "without a method": ({"quantization_config": {"load_in_4bit": True}}, "unknown", "says its config.json"),
    "of the text model": (
        {"text_config": {"quantization_config": {"quant_method": "compressed-tensors"}}},
        "compressed-tensors",
        "says text_config in its config.json",
    ),
    "of a part of a part": (
        {"thinker_config": {"text_config": {"quantization_config": {"quant_method": "awq"}}}},
        "awq",
        "says thinker_config.text_config in its config.json",
    ),
    "by an older key": (
        {"compression_config": {"format": "float-quantized"}},
        "float-quantized",
        "compression_config in",
    ),
    "of a part, by an older key": (
        {"llm_config": {"compression_config": {"format": "pack-quantized"}}},
        "pack-quantized",
        "says llm_config.compression_config in its config.json",
    ),
    "as MLX does": ({"quantization": {"group_size": 64, "bits": 4}}, "4 bits", "says quantization in its config.json"),
    "as TensorRT-LLM does": ({"quantization": {"quant_algo": "FP8"}}, "FP8", "says quantization in its config.json"),
}


@pytest.mark.parametrize("case", DECLARED)
def test_what_a_config_declares_is_found_wherever_it_stands(case: str, tmp_path: Path) -> None:
    config, method, source = DECLARED[case]
    found = find(tmp_path, config, {**PLAIN, "model.q": ("I32", (8, 8))})
    assert found is not None
    assert (found.method, found.doubted) == (method, False)
    assert source in str(found)


def test_a_declaration_that_no_tensor_bears_out_is_doubted(tmp_path: Path) -> None:
    found = find(tmp_path, DECLARED["at the top"][0])
    assert found is not None
    assert "None of its tensors bears that out, though" in found.advice


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4", "MIXED_PRECISION"])
def test_modelopt_declares_in_a_file_of_its_own(algorithm: str, tmp_path: Path) -> None:
    content = {
        "producer": {"name": "modelopt"},
        "quantization": {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8"},
    }
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    found = find(tmp_path, {}, {"model.up.weight": ("F8_E4M3", (8, 8))})
    assert found is not None
    assert str(found) == f"{algorithm}, says its hf_quant_config.json"


NOTHING: list[dict[str, Any]] = [
    {},
    {"quantization_config": None, "text_config": {"quantization_config": None}},
    {"text_config": {"quantization_config": {}}},
    {"quantization": {"quant_algo": None, "kv_cache_quant_algo": None}},
    {"quantization": "none", "quantize": True},
]


@pytest.mark.parametrize("config", NOTHING)
def test_what_declares_nothing_is_no_declaration(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text(
        '{"quantization": {"quant_algo": null, "kv_cache_quant_algo": "FP8"}}'
    )
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "quant_method": "gptq"}')  # left over
    assert find(tmp_path, config) is None


# -- shown by tensors -------------------------------------------------------------------------------------------------

X = "model.layers.0.mlp.up_proj"
SHOWN: dict[str, Tensors] = {
    "FP8, a scale a row": {f"{X}.weight": ("F8_E4M3", (8, 8)), f"{X}.weight_scale": ("BF16", (8, 1))},
    "FP8, DeepSeek": {f"{X}.weight": ("F8_E4M3", (8, 8)), f"{X}.weight_scale_inv": ("F32", (1, 1))},
    "FP8, a scale": {f"{X}.weight": ("F8_E5M2", (8, 8)), f"{X}.scale_weight": ("F32", ())},
    "FP8, Mistral": {f"{X}.weight": ("F8_E4M3", (8, 8)), f"{X}.qscale_weight": ("F32", ())},
    "FP8 stacks": {
        "m.experts.gate_up_proj": ("F8_E4M3", (2, 8, 8)),
        "m.experts.gate_up_proj_scale": ("F32", (2, 8, 1)),
    },
    "at the top level": {"weight": ("F8_E4M3", (8, 8)), "weight_scale": ("F32", ())},
    "GPTQ": {
        f"{X}.qweight": ("I32", (1, 8)),
        f"{X}.qzeros": ("I32", (1, 1)),
        f"{X}.scales": ("F16", (1, 8)),
        f"{X}.g_idx": ("I32", (8,)),
    },
    "bitsandbytes of 4 bits": {f"{X}.weight": ("U8", (32, 1)), f"{X}.weight.absmax": ("F32", (1,))},
    "bitsandbytes of 8 bits": {f"{X}.weight": ("I8", (8, 8)), f"{X}.SCB": ("F32", (8,))},
    "HQQ": {f"{X}.W_q": ("U8", (4, 8)), f"{X}.scale": ("BF16", (8, 1)), f"{X}.zero": ("BF16", (8, 1))},
    "EETQ": {f"{X}.weight": ("I8", (8, 8)), f"{X}.weight_scales": ("F16", (8,))},
    "torchao": {f"{X}._weight_qdata": ("I8", (8, 8)), f"{X}._weight_scale": ("BF16", (8, 1))},
    "quanto": {f"{X}.weight._data": ("I8", (8, 8)), f"{X}.weight._scale": ("BF16", (8, 1))},
    "compressed-tensors, packed": {f"{X}.weight_packed": ("I32", (8, 1)), f"{X}.weight_scale": ("BF16", (8, 1))},
    "NVFP4": {
        f"{X}.weight": ("U8", (8, 4)),
        f"{X}.weight_scale": ("F8_E4M3", (8, 1)),
        f"{X}.weight_scale_2": ("F32", ()),
    },
    "MXFP4": {"m.experts.up_blocks": ("U8", (2, 8, 1, 16)), "m.experts.up_scales": ("U8", (2, 8, 1))},
    "MLX": {f"{X}.weight": ("U32", (8, 1)), f"{X}.scales": ("BF16", (8, 1)), f"{X}.biases": ("BF16", (8, 1))},
    "AQLM": {
        f"{X}.codes": ("I8", (8, 1, 1)),
        f"{X}.codebooks": ("F16", (1, 256, 1, 8)),
        f"{X}.scales": ("F16", (8, 1)),
    },
    "packed BitNet": {f"{X}.weight": ("U8", (2, 8)), f"{X}.weight_scale": ("BF16", (1,))},
}


@pytest.mark.parametrize("case", SHOWN)
def test_matrices_with_scales_beside_them_are_found_though_nothing_declares_them(case: str, tmp_path: Path) -> None:
    found = find(tmp_path, {}, {**PLAIN, **SHOWN[case]})
    assert found is not None
    weight = next(iter(SHOWN[case]))
    assert f"though its config.json does not say so: {weight} ({SHOWN[case][weight][0]}) beside " in str(found)


def test_what_else_lies_in_the_folder_gives_it_a_name(tmp_path: Path) -> None:
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "quant_method": "gptq"}')
    assert "gptq (quantize_config.json), though" in str(find(tmp_path, {}, SHOWN["GPTQ"]))
    codes: Tensors = {f"{X}.trellis": ("I16", (1, 1, 64)), f"{X}.suh": ("F16", (8,))}
    assert find(tmp_path, {}, codes) is not None
    (tmp_path / "quantize_config.json").unlink()
    assert find(tmp_path, {}, codes) is None


PASSED: dict[str, Tensors] = {
    "positions": {"embeddings.position_ids": ("I64", (1, 512)), "embeddings.scale": ("F32", ())},
    "GPT-J's masks": {"h.0.attn.bias": ("U8", (1, 1, 64, 64)), "h.0.attn.scale_attn": ("F32", ())},
    "masks": {"attn.causal_mask": ("BOOL", (64, 64)), "attn.weight_scale": ("F32", ())},
    "Swin's tables": {"attn.relative_position_index": ("I64", (49, 49)), "attn.logit_scale": ("F32", (4, 1, 1))},
    "tables of 32 bits": {"attn.relative_position_index": ("I32", (49, 49)), "attn.logit_scale": ("F32", (4, 1, 1))},
    "scales of layers": {"m.layer_scale1": ("BF16", (8,)), "m.scale": ("BF16", (8, 8)), "m.weight": ("BF16", (8, 8))},
    "integers alone": {"quantizer.codebook": ("I32", (8, 8)), "tokens.weight": ("U8", (8, 8))},
    "FP8 that stands for itself": {f"{X}.weight": ("F8_E4M3", (8, 8)), "norm.query_norm.scale": ("F8_E4M3", (8,))},
    "scales of a cache": {f"{X}.weight": ("BF16", (8, 8)), "attn.k_scale": ("F32", ()), "attn.v_scale": ("F32", ())},
    "BitNet in bf16": {f"{X}.weight": ("BF16", (8, 8)), f"{X}.weight_scale": ("BF16", (1,))},
    "a vector of bytes": {f"{X}.weight": ("U8", (8,)), f"{X}.weight_scale": ("BF16", (1,))},
}


@pytest.mark.parametrize("case", PASSED)
def test_what_ordinary_models_hold_is_no_evidence(case: str, tmp_path: Path) -> None:
    assert find(tmp_path, {"model_type": "llama"}, {**PLAIN, **PASSED[case]}) is None
