"""Conversions that vLLM's own code has proved: stock vLLM starts, and reads what was meant."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo
from helpers.folders import tensors_of
from helpers.vllm_checkpoints import make, with_mtp
from helpers.vllm_engine import Job, octavo_job
from helpers.vllm_loading import load
from helpers.vllm_reading import convert_for
from octavo.adapters.vllm.reader import VllmReader
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.conversion.proof import judge_written

pytestmark = [pytest.mark.peers, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("vllm_loads")]
FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def reader() -> VllmReader:
    return VllmReader()


def proved(report: Any) -> bool:
    return any(note.startswith("proved: vLLM") for note in report.notes)


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", "fp8_tensor"])
@pytest.mark.parametrize("name", ["llama", "opt", "phi3", "gemma3"])
def test_what_vllm_reads_right_is_converted_as_planned(
    name: str, scheme: str, reader: VllmReader, tmp_path: Path
) -> None:
    source = make(name, tmp_path / "bf16")
    out, report = convert_for(reader, source, scheme)
    assert proved(report), report.notes
    octavo.convert(source, tmp_path / "unasked", scheme, prove=False)
    mine, unasked = tensors_of(out), tensors_of(tmp_path / "unasked")
    assert {n: t.dtype for n, t in mine.items()} == {n: t.dtype for n, t in unasked.items()}


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "deepseek_v2"])
def test_experts_are_proved(name: str, reader: VllmReader, tmp_path: Path) -> None:
    _, report = convert_for(reader, make(name, tmp_path / "bf16"))
    assert proved(report), report.notes
    assert not any("kept for vLLM" in note for note in report.notes)


def test_stacks_of_experts_are_cut_into_what_vllm_reads(reader: VllmReader, tmp_path: Path) -> None:
    out, report = convert_for(reader, make("granitemoe", tmp_path / "bf16"))
    assert proved(report), report.notes
    (stock,) = load(Job(out))
    assert not stock.error, stock.output[-4000:]
    experts = [digest for name, digest in stock.parameters[0].items() if ".experts." in name and "weight" in name]
    assert experts
    assert all("float8" in digest or "float32" in digest for digest in experts), experts


def test_stacks_that_stay_are_unquantized_for_vllm_too(reader: VllmReader, tmp_path: Path) -> None:
    """By the names of its modules, without which it does not start, and by no others."""
    source = make("gpt_oss", tmp_path / "bf16")
    out, report = convert_for(reader, source)
    assert proved(report), report.notes
    stock, mine = load(Job(out), octavo_job(source))
    assert not stock.error, stock.output[-4000:]
    assert stock.parameters == mine.parameters
    experts = [digest for name, digest in stock.parameters[0].items() if ".experts." in name]
    assert experts
    assert not any("float8" in digest for digest in experts)


def test_layers_that_only_a_draft_model_reads_are_proved_with_it(reader: VllmReader, tmp_path: Path) -> None:
    """Its `eh_proj` is a plain linear layer, which would take the codes for weights."""
    source = with_mtp(make("glm4_moe", tmp_path / "bf16"))
    out, report = convert_for(reader, source)
    assert proved(report), report.notes
    tensors = tensors_of(out)
    assert tensors["model.layers.2.eh_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.2.self_attn.q_proj.weight"].dtype == FP8
    assert any("kept for vLLM" in note and "takes the codes for weights" in note for note in report.notes)


def test_a_vision_tower_that_vllm_builds_unquantized_stays_so(reader: VllmReader, tmp_path: Path) -> None:
    pytest.importorskip("torchvision")  # without which vLLM has no vision-language models
    source = gemma3(tmp_path / "bf16", inner=112)
    out, report = convert_for(reader, source)
    assert proved(report), report.notes
    tensors = tensors_of(out)
    assert {t.dtype for n, t in tensors.items() if re.search(r"vision.*\.fc[12]\.weight$", n)} == {torch.bfloat16}
    assert {t.dtype for n, t in tensors.items() if re.search(r"vision.*\.q_proj\.weight$", n)} == {FP8}
    stock, mine = load(Job(out), octavo_job(source))
    assert not stock.error, stock.output[-4000:]
    assert stock.parameters == mine.parameters


def gemma3(folder: Path, inner: int) -> Path:
    import transformers

    text = {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": inner}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 7}
    config = transformers.Gemma3Config(
        text_config={**text, "sliding_window": 16},
        vision_config={**vision, "vision_use_head": False},
        image_token_index=250,
        mm_tokens_per_image=4,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    transformers.Gemma3ForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    hub, tensors = "vision_tower.vision_model.", load_file(folder / "model.safetensors")
    named = {n if hub in n else n.replace("vision_tower.", hub): tensor for n, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_fused_layer_of_which_a_part_is_ignored_stays_whole(reader: VllmReader, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    out, report = convert_for(reader, source, ignore=["*.q_proj"])
    assert proved(report), report.notes
    kinds = {n: t.dtype for n, t in tensors_of(out).items() if ".self_attn." in n and n.endswith("proj.weight")}
    assert {n for n, dtype in kinds.items() if dtype == FP8} == {n for n in kinds if "o_proj" in n}
    (stock,) = load(Job(out))
    assert not stock.error, stock.output[-4000:]


def test_what_vllm_refuses_to_build_stays_as_planned_and_is_said(reader: VllmReader, tmp_path: Path) -> None:
    """Other readers take blocks that reach over the edge."""
    out, report = convert_for(reader, make("smollm2", tmp_path / "bf16"), "fp8_block")
    assert any("vLLM" in note and "says so: it can't build the layer" in note for note in report.notes), report.notes
    assert any(t.dtype == FP8 for t in tensors_of(out).values())


def test_what_vllm_does_not_know_is_not_called_proved(reader: VllmReader, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "architectures": ["NobodysModel"], "model_type": "none"}))
    _, report = convert_for(reader, source)
    assert any(note.startswith("not proved for vLLM") for note in report.notes), report.notes
    assert not proved(report)


def test_an_fp8_checkpoint_of_anybody_can_be_asked_about(reader: VllmReader, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    out, _ = convert_for(reader, source)
    assert judge_written(Checkpoint.open(out), reader).ok
    # its config promises FP8 where there is none
    config = json.loads((out / "config.json").read_text())
    tensors = tensors_of(out)
    name = "model.layers.0.mlp.down_proj.weight"
    scale = tensors.pop(f"{name}_scale")
    tensors[name] = (tensors[name].float() * scale).bfloat16()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert judge_written(Checkpoint.open(out), reader).waiting == ("model.layers.0.mlp.down_proj",)
    # and names a layer that is FP8 as one that is not
    config["quantization_config"]["ignore"] += ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    (out / "config.json").write_text(json.dumps(config))
    misread = judge_written(Checkpoint.open(out), reader).misread
    assert list(misread) == ["model.layers.1.mlp.down_proj.weight"]
