"""Conversions that transformers' own code has proved: it reads what was meant, whatever its modules are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo
from helpers.folders import tensors_of
from helpers.stock import different, scales_of, write_reference
from octavo.checkpoint.checkpoint import Checkpoint

pytest.importorskip("compressed_tensors")
transformers: Any = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
MIXED = {"scheme": "fp8_channel", "targets": {"*self_attn*": "fp8_tensor"}}


def roberta() -> Any:
    """The head is `lm_head.decoder`, tied, and in no file."""
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL, max_position_embeddings=64))


def modern_bert() -> Any:
    """The head is `decoder`."""
    return transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**SMALL, cls_token_id=1, sep_token_id=2))


def ctrl() -> Any:
    """The embedding is `transformer.w`, and no embedding by its name."""
    sizes = {"n_positions": 32, "n_embd": 64, "dff": 128, "n_layer": 2, "n_head": 4, "vocab_size": 256}
    return transformers.CTRLLMHeadModel(transformers.CTRLConfig(**sizes, dtype="bfloat16"))


def gemma3() -> Any:
    """A vision tower of 112 columns, which mxfp8 can't take, under other names than in published files."""
    text = {k: v for k, v in SMALL.items() if not k.endswith("_id")}
    text |= {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16}
    vision = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 7, "vision_use_head": False}
    config = transformers.Gemma3Config(
        text_config={"model_type": "gemma3_text", **text},
        vision_config={"model_type": "siglip_vision_model", **vision},
        image_token_index=250,
        mm_tokens_per_image=4,
        dtype="bfloat16",
    )
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.fixture
def source(tmp_path: Path) -> Callable[[Any], Path]:
    def save(model: Any) -> Path:
        torch.manual_seed(0)
        model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
        return tmp_path / "source"

    return save


@pytest.mark.parametrize(
    ("make", "options"),
    [
        pytest.param(roberta, {}, id="a tied head of another name"),
        pytest.param(modern_bert, {}, id="another"),
        pytest.param(ctrl, {}, id="an embedding of another name"),
        pytest.param(gemma3, {"ignore": ["*vision_tower*"]}, id="an ignored tower"),
        pytest.param(gemma3, {"scheme": "mxfp8"}, id="columns that the scheme can't take"),
        pytest.param(gemma3, {"scheme": MIXED}, id="two schemes"),
    ],
)
def test_stock_transformers_reads_what_was_meant(
    make: Callable[[], Any], options: Any, source: Callable[[Any], Path], tmp_path: Path
) -> None:
    model = make()
    cls, folder = type(model), source(model)
    report = octavo.convert(folder, tmp_path / "out", **options)
    assert any(note.startswith("proved: transformers") for note in report.notes)
    made, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    # all that is FP8 has its scale, and unpacks to what it stands for
    assert (
        len(scales_of(tensors_of(tmp_path / "out"), "compressed-tensors"))
        == sum(n for n, _ in report.quantized.values())
        > 0
    )
    if options.get("scheme") is not MIXED:
        scheme = options.get("scheme", "fp8_channel")
        write_reference(folder, tmp_path / "out", tmp_path / "meant", "compressed-tensors", scheme)
        unpacked = cls.from_pretrained(
            tmp_path / "out", quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
        )
        assert different(unpacked, cls.from_pretrained(tmp_path / "meant"), rounded=True) == []
    assert not any(parameter.isnan().any() for parameter in made.parameters() if parameter.dtype == torch.bfloat16)


def test_a_matrix_that_the_model_splits_is_followed_and_one_that_is_no_layer_stays(
    source: Callable[[Any], Path], tmp_path: Path
) -> None:
    folder = source(ctrl())
    report = octavo.convert(folder, tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made["transformer.w.weight"].dtype == torch.bfloat16
    assert any("takes the codes for weights: its Embedding holds bf16" in note for note in report.notes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("scheme", "target", "why"),
    [
        ("int8_channel", "int8_channel", "has no place for packed weights"),
        (None, "int8_channel", "has no place for packed weights"),
        ("int8_channel", "fp8_channel", "is in an Embedding, which can't look up codes"),
        ("fp8_channel", "int8_channel", "is in an Embedding, which can't look up codes"),
    ],
)
def test_an_embedding_that_is_targeted_stays(
    scheme: str | None, target: str, why: str, tied: bool, source: Callable[[Any], Path], tmp_path: Path
) -> None:
    config = transformers.Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=tied)
    folder = source(transformers.Qwen2ForCausalLM(config))
    recipe = octavo.Recipe(scheme, targets={"model.embed_tokens.weight": target})
    report = octavo.convert(folder, tmp_path / "out", recipe)
    made, meant = tensors_of(tmp_path / "out"), tensors_of(folder)
    assert torch.equal(made["model.embed_tokens.weight"], meant["model.embed_tokens.weight"])
    assert scheme is None or any(why in reason for reason in report.kept), report.kept
    assert scheme is None or any(note.startswith("proved: transformers") for note in report.notes)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(read.get_input_embeddings().weight, meant["model.embed_tokens.weight"])
    read(torch.arange(12)[None])


@pytest.mark.parametrize(
    ("width", "ignore"),
    [(192, []), (128, ["*experts.*.up_proj*", "*experts.*.gate_proj*"]), (128, ["*experts*"])],
    ids=["no multiple of blocks", "a part", "all of them"],
)
def test_experts_that_stay_unquantized_are_named_by_their_module(
    width: int, ignore: list[str], source: Callable[[Any], Path], tmp_path: Path
) -> None:
    sizes = SMALL | {"hidden_size": 128, "moe_intermediate_size": width, "num_experts": 4, "num_experts_per_tok": 2}
    folder = source(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, head_dim=64)))
    report = octavo.convert(folder, tmp_path / "out", "fp8_block", format="fp8", ignore=ignore)
    assert any(note.startswith("proved: transformers") for note in report.notes)
    assert list(octavo.verify(tmp_path / "out", reader="transformers").lines())[:-1] == []


def test_what_the_source_lacks_is_said(source: Callable[[Any], Path], tmp_path: Path) -> None:
    folder = source(roberta())
    tensors = load_file(folder / "model.safetensors")
    key = "roberta.encoder.layer.0.attention.self.query.weight"
    tensors[key.replace("query", "query.base_layer")] = tensors.pop(key)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    report = octavo.convert(folder, tmp_path / "out")
    assert not any(note.startswith("proved: transformers") for note in report.notes)
    assert any("finds no place for" in note and "base_layer" in note for note in report.notes), report.notes


def test_unproved_conversions_are_as_planned(source: Callable[[Any], Path], tmp_path: Path) -> None:
    folder = source(ctrl())
    octavo.convert(folder, tmp_path / "out", prove=False)
    assert load_file(tmp_path / "out" / "model.safetensors")["transformer.w.weight"].dtype == torch.float8_e4m3fn


def test_experts_that_transformers_refuses_stay_fp8_and_are_noted(
    source: Callable[[Any], Path], tmp_path: Path
) -> None:
    sizes = SMALL | {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2}
    folder = source(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, head_dim=64)))
    report = octavo.convert(folder, tmp_path / "out", "fp8_block")
    assert any("can't load 24 quantized tensors" in note and "says so" in note for note in report.notes)
    with pytest.raises(RuntimeError):  # as it was said
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    made = Checkpoint.open(tmp_path / "out").tensors
    assert made["model.layers.0.mlp.experts.0.up_proj.weight"].dtype_name == "F8_E4M3"


def test_an_expert_that_stays_keeps_those_beside_it(source: Callable[[Any], Path], tmp_path: Path) -> None:
    sizes = SMALL | {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
    folder = source(transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes)))
    octavo.convert(folder, tmp_path / "out", ignore=["model.layers.0.mlp.experts.3.down_proj"])
    made = Checkpoint.open(tmp_path / "out").tensors
    of_layer = lambda layer, what: {  # noqa: E731
        made[f"model.layers.{layer}.mlp.experts.{number}.{what}.weight"].dtype_name for number in range(4)
    }
    assert of_layer(0, "down_proj") == {"BF16"}
    assert of_layer(0, "up_proj") == of_layer(1, "down_proj") == {"F8_E4M3"}


def test_a_checkpoint_of_another_model_is_not_called_proved(source: Callable[[Any], Path], tmp_path: Path) -> None:
    folder = source(roberta())
    save_file({"other.weight": torch.randn(8, 64).bfloat16()}, folder / "model.safetensors", {"format": "pt"})
    report = octavo.convert(folder, tmp_path / "out")
    assert any("not proved" in note and "has no place for other.weight" in note for note in report.notes)


def test_samples_are_of_the_same_experts_in_whatever_order_names_come() -> None:
    from octavo.adapters.transformers.reader import _first_of_each

    names = [f"m.{expert}.{leaf}" for leaf in ("up", "gate") for expert in (11, 2, 10, 0, 1)]
    assert _first_of_each(names) == _first_of_each(names[::-1]) == ["m.0.gate", "m.1.gate", "m.0.up", "m.1.up"]
