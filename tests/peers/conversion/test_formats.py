"""Our bytes, read by others: compressed-tensors' own API, and stock transformers, for ten architectures.

Whoever reads a conversion must get the bits of `schemes.dequantize(..., dtype=torch.bfloat16)` for every weight.
transformers' two ways: ``dequantize=True`` unpacks while loading; without it, compressed-tensors unpacks at the first
use (*lazily*), and the fine-grained fp8 format is unpacked at once where there is no GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import octavo
from helpers.folders import tensors_of
from helpers.models import random_model
from helpers.stock import different, from_stock, logits_of, scales_of, unpacked, write_reference
from octavo.numerics import schemes

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = [
    pytest.mark.peers,
    # transformers says that it merges `dequantize=True` into the checkpoint's own config, which is what is asked of it
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
]

_BASE = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 256}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_BASE, **_HEADS, "head_dim": 64}),
    # SmolLM2's sides: 576 and 192 are no multiples of 128, but of 32
    "llama ragged": (
        "LlamaConfig",
        {**_BASE, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    # no multiples of 32
    "llama odd": ("LlamaConfig", {**_BASE, **_HEADS, "hidden_size": 72, "intermediate_size": 200, "head_dim": 18}),
    "llama small": ("LlamaConfig", {**_BASE, **_HEADS, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 256,
            "hidden_size": 256,
            "ffn_dim": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 128,
            "max_position_embeddings": 64,
        },
    ),
    "phi3": ("Phi3Config", {**_BASE, **_HEADS, "intermediate_size": 320, "pad_token_id": 0}),
    "gemma2": ("Gemma2Config", {**_BASE, **_HEADS, "head_dim": 64}),
    "gpt2": ("GPT2Config", {"vocab_size": 256, "n_embd": 256, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_BASE, **_HEADS, **_MOE, "num_experts": 4, "shared_expert_intermediate_size": 384},
    ),
    "mixtral": ("MixtralConfig", {**_BASE, **_HEADS, "num_local_experts": 4}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_BASE,
            **_MOE,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "q_lora_rank": 128,
            "kv_lora_rank": 128,
            "qk_rope_head_dim": 32,  # kv_a_proj_with_mqa has 160 rows: ragged
            "qk_nope_head_dim": 32,
            "v_head_dim": 64,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**_BASE, **_HEADS, "head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "granitemoe": ("GraniteMoeConfig", {**_BASE, **_HEADS, "num_local_experts": 4}),
}
#: with a tensor for each expert, of which transformers can't read all schemes in compressed-tensors
PER_EXPERT = ("qwen2_moe", "mixtral", "deepseek_v3")
W8A8 = "compressed-tensors-w8a8"
FORMATS = [
    *(("compressed-tensors", scheme) for scheme in schemes.SCHEMES),
    ("fp8", "fp8_block"),
    (W8A8, "int8_channel"),
]

#: how many weights are quantized, where it is not all of the linear layers: counted by hand
QUANTIZED = {
    ("llama", "fp8_channel"): 14,
    ("llama ragged", "mxfp8"): 14,
    ("llama odd", "mxfp8"): 0,  # 72 and 200 columns
    ("gpt2", "fp8_channel"): 0,
    ("gpt_oss", "fp8_channel"): 8,  # attention only: experts are stacks
    ("granitemoe", "fp8_channel"): 8,
    ("mixtral", "fp8_channel"): 8 + 2 * 4 * 3,
}

by_architecture = pytest.mark.parametrize("architecture", CONFIGS)
by_format = pytest.mark.parametrize(("format", "scheme"), FORMATS)


class Written(NamedTuple):
    source: Path
    folder: Path
    reference: Path  # unquantized, holding what the conversion stands for
    count: int  # quantized weights


Write = Callable[[str, str, str], Written]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    root = tmp_path_factory.mktemp("formats")
    sources: dict[str, Path] = {}
    made: dict[tuple[str, str, str], Written] = {}

    def get(architecture: str, format: str, scheme: str) -> Written:
        if architecture not in sources:
            sources[architecture] = root / architecture / "source"
            random_model(*CONFIGS[architecture]).save_pretrained(sources[architecture])
        key = (architecture, format, scheme)
        if key not in made:
            source, folder = sources[architecture], root / architecture / f"{format} {scheme}"
            octavo.convert(source, folder, scheme, format=format)
            reference = root / architecture / f"reference of {format} {scheme}"
            count = write_reference(source, folder, reference, format, scheme)
            made[key] = Written(source, folder, reference, count)
        return made[key]

    return get


def quantization_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text()).get("quantization_config", {})


# -- our own counts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "scheme"), QUANTIZED)
def test_as_many_weights_are_quantized_as_counted_by_hand(architecture: str, scheme: str, write: Write) -> None:
    assert write(architecture, "compressed-tensors", scheme).count == QUANTIZED[architecture, scheme]


@by_architecture
@by_format
def test_checkpoint_is_verified(architecture: str, format: str, scheme: str, write: Write) -> None:
    written = write(architecture, format, scheme)
    assert octavo.verify(written.folder, written.source).ok
    assert bool(quantization_of(written.folder)) == bool(written.count)


# -- compressed-tensors' own API --------------------------------------------------------------------------------------


@by_architecture
@pytest.mark.parametrize("scheme", list(schemes.SCHEMES))
@pytest.mark.parametrize("scale_dtype", [None, torch.bfloat16])
def test_compressed_tensors_compressor_unpacks_to_our_bits(
    architecture: str, scheme: str, scale_dtype: torch.dtype | None, write: Write
) -> None:
    """Also with scales cast to bf16, as stock readers do: ours survive that."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    written = write(architecture, "compressed-tensors", scheme)
    if not written.count:
        return
    config = QuantizationConfig.model_validate(quantization_of(written.folder))
    (group,) = config.config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config.format)
    made, wanted = tensors_of(written.folder), tensors_of(written.reference)
    for name, scale in scales_of(unpacked(made), "compressed-tensors").items():
        if scale_dtype is not None and scale.is_floating_point():
            scale = scale.to(scale_dtype)
        ends = ("", "_packed", "_shape", "_global_scale")
        names = {f"weight{end}": f"{name}{end}" for end in ends if f"{name}{end}" in made}
        state = {key: made[its_name] for key, its_name in names.items()}
        scale = made[f"{name}_scale"] if scheme == "nvfp4" else scale
        found = compressor.decompress({**state, "weight_scale": scale}, group)["weight"]
        assert torch.equal(found.bfloat16(), wanted[name]), name


@by_architecture
@pytest.mark.parametrize("scheme", list(schemes.SCHEMES))
def test_compressed_tensors_converter_unpacks_the_whole_checkpoint(
    architecture: str, scheme: str, write: Write, tmp_path: Path
) -> None:
    from compressed_tensors.entrypoints.convert import convert_checkpoint
    from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer

    written = write(architecture, "compressed-tensors", scheme)
    if not written.count:
        return
    dequantizer = CompressedTensorsDequantizer(written.folder)
    convert_checkpoint(written.folder, tmp_path / "out", dequantizer, max_workers=1, device="cpu")
    unpacked, wanted = tensors_of(tmp_path / "out"), tensors_of(written.reference)
    assert sorted(unpacked) == sorted(wanted)
    assert [name for name in wanted if not torch.equal(unpacked[name], wanted[name])] == []


# -- stock transformers -----------------------------------------------------------------------------------------------


def readable(architecture: str, format: str, scheme: str) -> bool:
    """Whether transformers up to 5.23 can read it; octavo's report has a note where it can't."""
    if architecture not in PER_EXPERT or format == "fp8":
        return True
    return format != W8A8 and scheme in ("fp8_channel", "fp8_tensor", "int8_channel")


COMBINATIONS = [
    (architecture, format, scheme)
    for architecture in CONFIGS
    for format, scheme in FORMATS
    if readable(architecture, format, scheme)
]


@pytest.mark.parametrize(("architecture", "format", "scheme"), COMBINATIONS)
def test_transformers_dequantizes_to_our_bits(architecture: str, format: str, scheme: str, write: Write) -> None:
    written = write(architecture, format, scheme)
    model, reference = from_stock(written.folder, dequantize=True), from_stock(written.reference)
    assert different(model, reference) == []
    assert torch.equal(logits_of(model), logits_of(reference))


@pytest.mark.parametrize(("architecture", "format", "scheme"), COMBINATIONS)
def test_transformers_loads_it_without_being_told_how(
    architecture: str, format: str, scheme: str, write: Write
) -> None:
    written = write(architecture, format, scheme)
    model, reference = from_stock(written.folder), from_stock(written.reference)
    numbers = (torch.float8_e4m3fn, torch.int8, torch.int32)
    packed = sum(tensor.dtype in numbers for tensor in model.state_dict().values())
    assert bool(packed) == (format != "fp8" and bool(written.count))
    logits_of(model)  # compressed-tensors unpacks at the first use
    assert different(model, reference) == []


@pytest.mark.parametrize(
    ("architecture", "scheme"),
    [(a, s) for a, f, s in COMBINATIONS if f == "compressed-tensors" and a in ("llama", "llama ragged", "qwen2_moe")],
)
def test_compressed_tensors_unpacks_a_loaded_model_to_our_bits(architecture: str, scheme: str, write: Write) -> None:
    written = write(architecture, "compressed-tensors", scheme)
    model = from_stock(written.folder)
    model.hf_quantizer.compressor.decompress_model(model)
    assert different(model, from_stock(written.reference)) == []


@pytest.mark.parametrize("architecture", PER_EXPERT)
@by_format
def test_what_transformers_can_t_read_is_noted_in_the_report(
    architecture: str, format: str, scheme: str, write: Write, tmp_path: Path
) -> None:
    source = write(architecture, format, scheme).source
    asked = octavo.convert(source, tmp_path / "asked", scheme, format=format)
    planned = octavo.convert(source, tmp_path / "planned", scheme, format=format, prove=False)
    said = any(note.startswith("transformers") and "can't load" in note for note in asked.notes)
    proved = any(note.startswith("proved: transformers") for note in asked.notes)
    noted = any(f"can't read {scheme} experts in {format} checkpoints" in note for note in planned.notes)
    known = readable(architecture, format, scheme)
    assert (proved, said, noted) == ((True, False, False) if known else (False, True, True))
    for folder in (tmp_path / "asked", tmp_path / "planned"):  # once transformers can, the note must go
        assert _is_read_right(folder, source, tmp_path / f"reference of {folder.name}", format, scheme) == known


def _is_read_right(folder: Path, source: Path, reference: Path, format: str, scheme: str) -> bool:
    """Whether stock transformers, of itself, makes of a conversion what it stands for."""
    write_reference(source, folder, reference, format, scheme)
    model = None
    try:
        model = from_stock(folder)
        logits_of(model)  # compressed-tensors unpacks at the first use
    except RuntimeError as error:
        if "automatic conversion of the weights" not in str(error):
            raise
    return model is not None and different(model, from_stock(reference)) == []


def test_two_schemes_in_one_checkpoint_load_in_transformers(write: Write, tmp_path: Path) -> None:
    from compressed_tensors.entrypoints.convert import convert_checkpoint
    from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer

    source = write("llama", "compressed-tensors", "fp8_channel").source
    recipe = octavo.Recipe("fp8_channel", targets={"*.mlp.*": "fp8_block"}, ignore=["model.layers.0.self_attn.q_proj"])
    octavo.convert(source, tmp_path / "out", recipe)
    tensors, made = tensors_of(source), tensors_of(tmp_path / "out")
    for name, scale in scales_of(made, "compressed-tensors").items():
        scheme = "fp8_block" if ".mlp." in name else "fp8_channel"
        tensors[name] = schemes.dequantize(made[name], scale, scheme, dtype=torch.bfloat16)
    model = from_stock(tmp_path / "out")
    logits_of(model)
    assert different(model, _model_of(tensors, source, tmp_path / "reference")) == []
    dequantizer = CompressedTensorsDequantizer(tmp_path / "out")
    convert_checkpoint(tmp_path / "out", tmp_path / "unpacked", dequantizer, max_workers=1, device="cpu")
    unpacked = tensors_of(tmp_path / "unpacked")
    assert [name for name, tensor in tensors.items() if not torch.equal(unpacked[name], tensor)] == []
    # unpacking while loading, it takes the first group's scheme for every weight (5.23); once it does not, say so here
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        from_stock(tmp_path / "out", dequantize=True)


def test_dense_layers_and_experts_of_two_schemes_load_in_transformers(write: Write, tmp_path: Path) -> None:
    source = write("qwen2_moe", "compressed-tensors", "fp8_channel").source
    octavo.convert(source, tmp_path / "out", octavo.Recipe("fp8_channel", targets={"*.experts.*": "fp8_tensor"}))
    tensors, made = tensors_of(source), tensors_of(tmp_path / "out")
    experts = [name for name in tensors if ".experts." in name]
    assert experts
    for name, scale in scales_of(made, "compressed-tensors").items():
        scheme = "fp8_tensor" if name in experts else "fp8_channel"
        tensors[name] = schemes.dequantize(made[name], scale, scheme, dtype=torch.bfloat16)
    reference = _model_of(tensors, source, tmp_path / "reference")
    assert different(from_stock(tmp_path / "out", dequantize=True), reference) == []


def _model_of(tensors: dict[str, torch.Tensor], source: Path, folder: Path) -> Any:
    from helpers import write_checkpoint

    return from_stock(write_checkpoint(folder, tensors, 1, json.loads((source / "config.json").read_text())))


@by_format
def test_sharded_checkpoint_loads_in_transformers(format: str, scheme: str, write: Write, tmp_path: Path) -> None:
    from helpers import write_checkpoint

    written = write("llama ragged", format, scheme)
    config = json.loads((written.source / "config.json").read_text())
    sharded = write_checkpoint(tmp_path / "source", tensors_of(written.source), 4, config)
    octavo.convert(sharded, tmp_path / "out", scheme, format=format)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    assert different(from_stock(tmp_path / "out", dequantize=True), from_stock(written.reference)) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_source_dtypes_load_in_transformers(dtype: torch.dtype, write: Write, tmp_path: Path) -> None:
    from helpers import write_checkpoint

    source = write("llama", "compressed-tensors", "fp8_channel").source
    config = {**json.loads((source / "config.json").read_text()), "dtype": str(dtype).removeprefix("torch.")}
    tensors = {name: tensor.to(dtype) * 1.001 for name, tensor in tensors_of(source).items()}
    own = write_checkpoint(tmp_path / "source", tensors, 1, config)
    octavo.convert(own, tmp_path / "out")
    write_reference(own, tmp_path / "out", tmp_path / "reference", "compressed-tensors", "fp8_channel")
    assert different(from_stock(tmp_path / "out", dequantize=True), from_stock(tmp_path / "reference")) == []
