"""Stacks of experts are converted into the matrices that stock transformers reads in FP8, where it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import octavo
from helpers import random_weights, same_bytes, write_checkpoint
from helpers.folders import edit_tensors, tensors_of
from helpers.stock import different, from_stock, logits_of, scales_of, write_reference
from octavo.numerics import schemes

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")

SMALL = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "dtype": "bfloat16",
}
EXPERTS = 4


def save(config: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05)
    model.save_pretrained(folder)
    return folder


def qwen3_moe(folder: Path) -> Path:
    config = transformers.Qwen3MoeConfig(**SMALL, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=128)
    return save(config, folder)


def stack(apart: Path, folder: Path) -> Path:
    """The same checkpoint with experts as transformers has them in its modules."""
    tensors, stacked = tensors_of(apart), {}
    for layer in range(SMALL["num_hidden_layers"]):  # type: ignore[call-overload]
        base = f"model.layers.{layer}.mlp.experts"

        def all_of(leaf: str, base: str = base) -> Tensor:
            return torch.stack([tensors.pop(f"{base}.{expert}.{leaf}.weight") for expert in range(EXPERTS)])

        stacked[f"{base}.gate_up_proj"] = torch.cat([all_of("gate_proj"), all_of("up_proj")], 1)
        stacked[f"{base}.down_proj"] = all_of("down_proj")
    return write_checkpoint(folder, {**tensors, **stacked}, config=json.loads((apart / "config.json").read_text()))


@pytest.mark.parametrize(
    ("format", "scheme"), [("compressed-tensors", "fp8_channel"), ("fp8", "fp8_block")], ids=["channel", "fp8 format"]
)
def test_transformers_reads_experts_that_were_cut_out_of_stacks(format: str, scheme: str, tmp_path: Path) -> None:
    apart = qwen3_moe(tmp_path / "apart")
    source = stack(apart, tmp_path / "stacked")
    report = octavo.convert(source, tmp_path / "out", scheme, format=format)
    assert not any("expert" in reason for reason in report.kept)
    assert f"proved: transformers {transformers.__version__} reads all that it takes as it is meant" in report.notes
    octavo.convert(apart, tmp_path / "other", scheme, format=format)
    mine, theirs = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "other")
    assert mine.keys() == theirs.keys()
    assert all(same_bytes(mine[name], theirs[name]) for name in mine)
    assert octavo.verify(tmp_path / "out", source).ok
    assert octavo.verify(tmp_path / "out", reader="transformers").ok
    write_reference(apart, tmp_path / "out", tmp_path / "reference", format, scheme)
    assert different(from_stock(tmp_path / "out", dequantize=True), from_stock(tmp_path / "reference")) == []


def test_llama_4_s_transposed_stacks_become_the_layers_that_transformers_makes_of_them(tmp_path: Path) -> None:
    config = transformers.Llama4TextConfig(
        **SMALL,
        intermediate_size_mlp=256,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    )
    source = save(config, tmp_path / "source")
    report = octavo.convert(source, tmp_path / "out")
    assert not any("expert" in reason for reason in report.kept)
    assert octavo.verify(tmp_path / "out", source).ok
    assert octavo.verify(tmp_path / "out", reader="transformers").ok
    # a reference of what it stands for, in stacks
    made, tensors = tensors_of(tmp_path / "out"), tensors_of(source)
    values = {
        name: schemes.dequantize(made[name], scale, "fp8_channel", dtype=torch.bfloat16)
        for name, scale in scales_of(made, "compressed-tensors").items()
    }
    for name in tensors:
        base, _, leaf = name.rpartition(".")
        if ".experts." in name:
            halves = ["gate_proj", "up_proj"] if leaf == "gate_up_proj" else [leaf]
            experts = [[values[f"{base}.{e}.{half}.weight"] for half in halves] for e in range(EXPERTS)]
            tensors[name] = torch.stack([torch.cat(parts).T for parts in experts])
        else:
            tensors[name] = values.get(name, tensors[name])
    reference = write_checkpoint(
        tmp_path / "reference", tensors, config=json.loads((source / "config.json").read_text())
    )
    torch.testing.assert_close(
        logits_of(from_stock(tmp_path / "out", dequantize=True)), logits_of(from_stock(reference)), rtol=0.02, atol=0.02
    )


def test_what_transformers_can_t_read_apart_stays_in_stacks(tmp_path: Path) -> None:
    config = transformers.GraniteMoeConfig(**SMALL, num_local_experts=EXPERTS, num_experts_per_tok=2)
    source = save(config, tmp_path / "source")
    report = octavo.convert(source, tmp_path / "out")
    (reason,) = [reason for reason in report.kept if "expert" in reason]
    assert "3-D" in reason
    assert f"transformers {transformers.__version__} takes none of its matrices (it has no place for them)" in reason
    assert report.kept[reason][1] == 2 * EXPERTS * 3 * 128 * 256 * 2
    assert report.notes[0].startswith("stacks of experts stay unquantized, 1.50 MiB, for transformers ")
    assert octavo.verify(tmp_path / "out", reader="transformers").ok
    report = octavo.convert(source, tmp_path / "for others", prove=False)
    assert not any("expert" in reason for reason in report.kept)


def test_a_reader_that_is_named_is_asked_alone(tmp_path: Path) -> None:
    config = transformers.GraniteMoeConfig(**SMALL, num_local_experts=EXPERTS, num_experts_per_tok=2)
    source = save(config, tmp_path / "source")
    report = octavo.convert(source, tmp_path / "transformers", reader="transformers")
    assert any("expert" in reason for reason in report.kept)
    assert len(report.notes) == 2
    report = octavo.convert(source, tmp_path / "vllm", reader="vllm")
    assert not any("expert" in reason for reason in report.kept)
    assert not any("transformers" in note for note in report.notes)
    with pytest.raises(octavo.errors.RecipeError, match="unknown reader 'tgi'; known: transformers, vllm"):
        octavo.convert(source, tmp_path / "none", reader="tgi")


# -- verifying --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stacked(tmp_path: Path) -> Path:
    stacks = {
        "m.0.mlp.experts.gate_up_proj": random_weights((2, 128, 64), torch.bfloat16, 0),
        "m.0.mlp.experts.down_proj": random_weights((2, 32, 128), torch.bfloat16, 1),
    }
    return write_checkpoint(tmp_path / "source", stacks, 2)


def test_verify_tells_which_matrix_of_a_stack_differs(stacked: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    octavo.convert(stacked, out, prove=False)
    file = out / "model-00001-of-00002.safetensors"
    tensors = tensors_of(out)
    changed = {name: tensor for name, tensor in tensors.items() if "down" not in name}
    changed["m.0.mlp.experts.1.up_proj.weight"].view(torch.uint8)[3, 5] ^= 1
    save_file(changed, file, {"format": "pt"})
    report = octavo.verify(out, stacked)
    assert [(result.name, result.differing_bytes) for result in report.different] == [
        ("m.0.mlp.experts.1.up_proj.weight", 1)
    ]


def test_verify_misses_a_matrix_of_a_stack(stacked: Path, tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole", tensors_of(stacked))
    octavo.convert(whole, tmp_path / "out", prove=False)

    def remove(tensors: dict[str, Tensor]) -> None:
        del tensors["m.0.mlp.experts.1.up_proj.weight"]

    edit_tensors(tmp_path / "out", remove)
    with pytest.raises(octavo.errors.CheckpointError) as caught:
        octavo.verify(tmp_path / "out", whole)
    assert "m.0.mlp.experts.1.up_proj.weight: in " in str(caught.value)
    assert "m.0.mlp.experts.1.up_proj.weight_scale: not in " in str(caught.value)


def test_the_index_has_the_names_of_the_matrices(stacked: Path, tmp_path: Path) -> None:
    octavo.convert(stacked, tmp_path / "out", prove=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(tmp_path / "out").keys()
    assert index["weight_map"]["m.0.mlp.experts.1.down_proj.weight_scale"] == "model-00002-of-00002.safetensors"
    plan = octavo.plan(stacked, model=False)
    assert {p.name for p in plan.placements} == {name for name in index["weight_map"] if not name.endswith("_scale")}


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_a_model_that_octavo_loads_has_the_bytes_of_the_matrices(scheme: str, tmp_path: Path) -> None:
    config = transformers.GraniteMoeConfig(**SMALL, num_local_experts=EXPERTS, num_experts_per_tok=2)
    source = save(config, tmp_path / "source")
    octavo.convert(source, tmp_path / "out", scheme, prove=False)
    made, state = tensors_of(tmp_path / "out"), octavo.load(source, scheme).state_dict()
    for leaf, halves in (("gate_up_proj", ["gate_proj", "up_proj"]), ("down_proj", ["down_proj"])):
        for suffix in ("", "_scale"):
            base = "model.layers.1.block_sparse_moe.experts"
            stack = state[f"{base}.{leaf}{suffix}"]
            for expert in range(EXPERTS):
                parts = [made[f"{base}.{expert}.{half}.weight{suffix}"] for half in halves]
                assert same_bytes(torch.cat(parts), stack[expert]), (leaf, suffix, expert)
