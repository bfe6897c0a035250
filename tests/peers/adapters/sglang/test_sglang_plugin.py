"""octavo as SGLang finds it: what is loaded, and what is refused, from the arguments of a server on."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import octavo
from helpers.sglang_hooks import WAYS, without_hooks
from helpers.sglang_loading import ENVIRONMENT, Job, load, octavo_job
from helpers.vllm_checkpoints import convert, make
from octavo.adapters.engine.names import PREFIX
from octavo.adapters.sglang.options import Options

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("sglang_loads"),
]


def test_the_command_line_takes_what_is_offered_and_nothing_that_is_refused() -> None:
    code = """
        from helpers import sglang_stand_ins
        sglang_stand_ins.install()
        from sglang.srt import server_args
        from octavo.adapters.sglang.plugin import register
        register()
        print(*(name for name in server_args.QUANTIZATION_CHOICES if name.startswith("octavo_")))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, **ENVIRONMENT}
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment).stdout
    assert told.splitlines()[-1].split() == [PREFIX + scheme for scheme in Options.offered()]


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_all_tensors_equal_those_of_the_converted_checkpoint(scheme: str, tmp_path: Path) -> None:
    sources = [make(name, tmp_path / name) for name in ("llama", "qwen3_moe")]
    steps = [["methods"]]
    jobs = [(octavo_job(source, scheme, steps), Job(convert(source, scheme), steps=steps)) for source in sources]
    flag = Job(sources[0], {"quantization": f"octavo_{scheme}"})
    mine, stock, mine_moe, stock_moe, flagged = load(*jobs[0], *jobs[1], flag)
    for answer in (mine, stock, mine_moe, stock_moe, flagged):
        assert not answer.error, answer.error
        assert answer.quantization == "compressed-tensors"
    assert any("float8_e4m3fn" in digest for digest in stock.loaded.values())
    assert mine.loaded == flagged.loaded == stock.loaded
    assert mine.served == flagged.served == stock.served
    assert any("FusedMoE" in classes for classes in mine_moe.results[0].values())
    assert mine.results + mine_moe.results == stock.results + stock_moe.results  # LoRA and kernels find the same layers
    assert mine_moe.loaded == stock_moe.loaded
    assert mine_moe.served == stock_moe.served


def test_the_format_fp8_is_taken_where_loaders_know_its_scales(tmp_path: Path) -> None:
    """On a CPU without AMX, SGLang makes no kernels' form of it."""
    source, llama = make("qwen3_moe", tmp_path / "bf16"), make("llama", tmp_path / "llama")
    converted = tmp_path / "converted"
    octavo.convert(source, converted, "fp8_block", format="fp8", prove=False)
    extra = {"format": "fp8"}
    jobs = (octavo_job(path, "fp8_block", extra=extra) for path in (source, llama))
    mine, refused, stock = load(*jobs, Job(converted))
    for answer in (mine, stock):
        assert "requires that CPU has AMX support" in answer.error
    assert sum(name.endswith("weight_scale_inv") for name in mine.loaded) == 8
    assert mine.loaded == stock.loaded
    assert "LlamaForCausalLM in SGLang has no place for the scales of the format 'fp8'" in refused.error
    assert "use the format 'compressed-tensors'" in refused.error


def test_what_is_ignored_stays_whether_it_is_a_tensor_or_a_layer(tmp_path: Path) -> None:
    source, experts = make("llama", tmp_path / "llama"), make("qwen3_moe", tmp_path / "moe")

    def ignoring(checkpoint: Path, *patterns: str, scheme: str = "fp8_channel", **extra: object) -> Job:
        return octavo_job(checkpoint, scheme, extra={"ignore": patterns, **extra})

    mine, of_experts, part, unknown, strict, all_of_it = load(
        ignoring(source, "*.0.self_attn.qkv_proj", "*.down_proj", "*.1.mlp.*_proj.weight"),
        ignoring(experts, "*.0.mlp.experts", "*.1.mlp.experts.*"),
        ignoring(source, "*.q_proj"),
        ignoring(source, "*.qkv_porj"),
        ignoring(make("smollm2", tmp_path / "smollm2"), scheme="fp8_block", strict=True),
        octavo_job(source),
    )
    for answer in (mine, of_experts, all_of_it):
        assert not answer.error, answer.error
    in_fp8 = {name.removesuffix(".weight") for name, digest in mine.loaded.items() if "float8" in digest}
    first, second = "model.layers.0", "model.layers.1"
    attention = {f"{first}.self_attn.o_proj", f"{second}.self_attn.qkv_proj", f"{second}.self_attn.o_proj"}
    assert in_fp8 == {*attention, f"{first}.mlp.gate_up_proj"}
    assert all(mine.served[f"{name}.weight"] == all_of_it.served[f"{name}.weight"] for name in in_fp8)
    assert not any("experts" in name for name, digest in of_experts.loaded.items() if "float8" in digest)
    assert sum("float8" in digest for digest in of_experts.loaded.values()) == 4
    assert "but SGLang fuses it into model.layers.0.self_attn.qkv_proj with" in part.error
    assert "and no layer of SGLang's" in unknown.error
    assert "can't become FP8 in LlamaForCausalLM: SGLang can't make this layer in fp8_block" in strict.error


def test_hooks_that_sglang_has_not_set_end_the_start_by_name_and_other_versions_are_told(tmp_path: Path) -> None:
    found = without_hooks(make("llama", tmp_path / "bf16"))
    said = {version: remark for what, version, remark in found if what == "version"}
    assert said["0.5.15"] is said["0.5.23.post1"] is None
    assert "needs SGLang 0.5.15 or later, and this is 0.5.9: --load-format octavo is unknown" in said.pop("0.5.9")
    for version in ("0.5.24", "0.6.0rc1", "0.0.0.dev0", "unknown"):
        assert f"octavo was tried with SGLang 0.5.15 to 0.5.23, and this is {version}. Should it" in said[version]
    starts = [(hook, way, error or "") for hook, way, error in found if hook != "version"]
    assert len(starts) == len(WAYS) * 5
    for hook, way, error in starts:
        if not hook:
            assert not error, (way, error)
        elif ".ServerArgs." in hook and way == "quantization":
            assert "octavo_fp8_block" in error  # SGLang's own words: nobody has told it what that is
        else:
            assert error.startswith(f"RecipeError: SGLang has not set octavo's hook on {hook}; "), (way, error)


def test_what_contradicts_itself_or_cant_be_meant_is_refused(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    draft = {"speculative_draft_model_quantization": "octavo_fp8_block"}
    cases = [
        (octavo_job(source, quantization="fp8"), "leave --quantization fp8 out"),
        (octavo_job(source, "fp8_block", quantization="octavo_fp8_channel"), "contradict each other"),
        (octavo_job(source, "mxfp8"), "the scheme mxfp8 is not offered in SGLang"),
        (octavo_job(source, extra={"ignore": ["*.no_proj"]}), "matches no tensor"),
        (
            Job(source, {"quantization": "octavo_fp8_block", "load_format": "dummy"}),
            "--load-format dummy reads weights",
        ),
        (Job(source, draft), "a draft only beside a target"),
        (octavo_job(tmp_path), "no .safetensors file here"),
    ]
    answers = load(*(job for job, _ in cases))
    assert [
        answer.error for answer, (_, problem) in zip(answers, cases, strict=True) if problem not in answer.error
    ] == []
