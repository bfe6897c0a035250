"""vLLM's engine, fed by octavo from a bf16 checkpoint, against stock vLLM on the FP8 checkpoint that octavo writes.

Every parameter and buffer of the model, the tokens, and the logprobs of prompts, bit for bit.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import octavo
from helpers.vllm_checkpoints import convert, make
from helpers.vllm_engine import Answer, Job, octavo_job, run
from octavo.demo import model as demo_model

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("vllm_engine"),
]

#: architecture -> layers of vLLM that hold FP8, counted by hand: attention has two (DeepSeek: five, four of them here
#: in each layer and one q_b), an MLP two, experts and a shared expert three
LAYERS = {
    "smollm2": 8,
    "opt": 8,
    "llama": 8,
    "qwen2_moe": 10,
    "qwen3_moe": 6,
    "mixtral": 6,
    "granitemoe": 6,
    "deepseek_v2": 13,
    "gemma3": 8,
    "phi3": 8,
}


def assert_equal(mine: Answer, stock: Answer) -> None:
    assert not mine.error, mine.output[-4000:]
    assert not stock.error, stock.output[-4000:]
    assert mine.parameters == stock.parameters
    assert any("float8_e4m3fn" in digest for rank in mine.parameters for digest in rank.values())
    assert mine.tokens == stock.tokens
    assert mine.logprobs == stock.logprobs


@pytest.mark.parametrize("name", LAYERS)
def test_octavo_in_vllm_equals_stock_vllm_on_the_converted_checkpoint(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "bf16")
    schemes = ["fp8_channel"] if name == "smollm2" else ["fp8_channel", "fp8_block"]
    jobs = [job for scheme in schemes for job in (octavo_job(source, scheme), Job(convert(source, scheme)))]
    answers = run(*jobs, timeout=800)
    for scheme, mine, stock in zip(schemes, answers[::2], answers[1::2], strict=True):
        assert_equal(mine, stock)
        assert f"{LAYERS[name]} layers" in mine.log[0]
        assert f"became {scheme}" in mine.log[0]
    # the schemes are two different models
    assert len({str(answer.logprobs) for answer in answers[::2]}) == len(schemes)


def test_the_quantization_flag_alone_does_the_same(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    reference = octavo_job(source, "fp8_block")
    flag = Job(source, {"quantization": "octavo_fp8_block"})
    both = Job(source, {"quantization": "octavo_fp8_block", "load_format": "octavo"})
    budget = Job(source, {"quantization": "octavo_fp8_block", "model_loader_extra_config": {"staging_bytes": 1 << 20}})
    first, *others = run(reference, flag, both, budget)
    for answer in others:
        assert_equal(answer, first)


def test_other_models_are_loaded_as_ever_beside_octavo(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    (answer,) = run(Job(source))
    assert not answer.error, answer.output[-4000:]
    assert answer.log == []
    assert not any("float8" in digest for digest in answer.parameters[0].values())


def test_what_the_loader_cant_take_stays_as_it_is_and_is_reported(tmp_path: Path) -> None:
    """vLLM has no FP8 layer that takes the biases of gpt-oss's experts."""
    (answer,) = run(octavo_job(make("gpt_oss", tmp_path / "gpt_oss")))
    assert not answer.error, answer.output[-4000:]
    experts = {name: digest for name, digest in answer.parameters[0].items() if ".experts." in name}
    assert experts
    assert all("bfloat16" in digest or "int" in digest for digest in experts.values()), experts
    assert "4 layers (8 tensors) became fp8_channel" in answer.log[0]
    # where a processor has no kernel for them either, that is what vLLM says first
    assert re.search("no place for|no kernel of .* takes these experts", answer.log[1])


def test_ignored_tensors_stay_and_a_fused_layer_stays_whole(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    extra = {"ignore": ["*.down_proj", "model.layers.0.self_attn"]}
    some = {"ignore": ["*.q_proj"]}
    mine, refused = run(
        Job(source, {"load_format": "octavo", "model_loader_extra_config": extra}),
        Job(source, {"load_format": "octavo", "model_loader_extra_config": some}),
    )
    assert not mine.error, mine.output[-4000:]
    kept = [name for name, digest in mine.parameters[0].items() if "bfloat16" in digest and "_proj" in name]
    assert sorted(kept) == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]
    assert "vLLM fuses q_proj, k_proj, v_proj into model.layers.0.self_attn.qkv_proj" in refused.error
    assert not refused.parameters


def test_a_real_small_model_equals_its_conversion(tmp_path: Path, users_cache: Path) -> None:
    pytest.importorskip("gguf")
    folder = demo_model.prepare(users_cache)
    octavo.convert(folder, tmp_path / "fp8", "fp8_channel")
    mine, stock = run(octavo_job(folder), Job(tmp_path / "fp8"), timeout=600)
    assert_equal(mine, stock)
    assert "120 layers (210 tensors) became fp8_channel" in mine.log[0]
