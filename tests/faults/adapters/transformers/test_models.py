"""Checkpoints that don't fit their model, or hold what can't be quantized: `octavo.load` names the tensors.

Whatever headers tell is found before a weight byte is read, all at once, on both routes (`octavo.load` and
``from_pretrained`` with an `octavo.OctavoConfig`).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _inputs import MODEL, edit_config, entry, fails, split_in_two, write_raw
from torch import Tensor

import octavo
from helpers.folders import edit_tensors
from octavo.errors import CheckpointError, CoverageError, RecipeError

pytest.importorskip("transformers")

Tensors = dict[str, Tensor]
Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"
EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"
STACK = "model.layers.1.mlp.experts.gate_up_proj"
DOWN = "model.layers.1.mlp.experts.down_proj"


def _pop(*names: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return edit


def _set(**changes: Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update(changes)


def _transpose(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[name].T})


def _drop_expert(number: int) -> Callable[[Tensors], None]:
    return _pop(*(EXPERT.format(number, part) for part in ("gate", "up", "down")))


def _add_expert(tensors: Tensors) -> None:
    for part in ("gate", "up", "down"):
        tensors[EXPERT.format(3, part)] = tensors[EXPERT.format(2, part)].clone()


def _both_prefixes(tensors: Tensors) -> None:
    tensors[Q.removeprefix("model.")] = tensors[Q].clone()


ONES = torch.ones

#: case -> (model, edit, what the error says)
MISFITS: dict[str, tuple[str, Callable[[Tensors], Any], tuple[str, ...]]] = {
    "a weight is missing": ("llama", _pop(Q), (f"missing: no checkpoint tensor makes {Q} [32, 32]",)),
    "a norm is missing": ("llama", _pop("model.norm.weight"), ("makes model.norm.weight [32]",)),
    "the embedding is missing": ("llama", _pop("model.embed_tokens.weight"), ("model.embed_tokens.weight [96, 32]",)),
    "the untied head is missing": ("llama", _pop("lm_head.weight"), ("lm_head.weight [96, 32]",)),
    "a tensor is unexpected": ("llama", _set(extra=ONES(3)), ("unexpected: the model has no place for extra [3]",)),
    "a tensor lies below the model's": (
        "llama",
        _set(**{f"{Q}.more": ONES(3)}),
        (f"unexpected: the model has no place for {Q}.more [3]",),
    ),
    "a scale without a config that tells of one": (
        "llama",
        _set(**{f"{Q}_scale": ONES(32, 1)}),
        (f"unexpected: the model has no place for {Q}_scale [32, 1]",),
    ),
    "a weight is transposed": (
        "llama",
        _transpose(UP),
        (f"misshapen: {UP} is [48, 32] in the model", "make it [32, 48] (transposed?)"),
    ),
    "a weight has a row too few": ("llama", _set(**{UP: ONES(47, 32)}), (f"misshapen: {UP} is [48, 32]", "[47, 32]")),
    "a weight has a dimension too many": ("llama", _set(**{UP: ONES(1, 48, 32)}), (f"{UP} is [48, 32]", "[1, 48, 32]")),
    "a weight is flat": ("llama", _set(**{UP: ONES(48 * 32)}), (f"misshapen: {UP} is [48, 32]", "[1536]")),
    "a weight is empty": ("llama", _set(**{UP: ONES(0, 32)}), (f"misshapen: {UP} is [48, 32]", "[0, 32]")),
    "a norm is a scalar": ("llama", _set(**{"model.norm.weight": ONES(())}), ("model.norm.weight is [32]", "[]")),
    "two tensors make one parameter": (
        "llama",
        _both_prefixes,
        (f"duplicate: {Q.removeprefix('model.')} and {Q} both make {Q}",),
    ),
    "an expert is missing at the end": ("moe", _drop_expert(2), (STACK, DOWN, "[3, 48, 32]", "[2, 48, 32]")),
    "an expert is missing in the middle": (
        "moe",
        _drop_expert(1),
        ("3 problems", EXPERT.format(1, "up"), EXPERT.format(1, "down")),
    ),
    "one half of an expert is missing": (
        "moe",
        _pop(EXPERT.format(1, "up")),
        (STACK, f"missing: {EXPERT.format(1, 'up')}"),
    ),
    "one expert's down is missing": (
        "moe",
        _pop(EXPERT.format(0, "down")),
        (DOWN, f"missing: {EXPERT.format(0, 'down')}"),
    ),
    "all downs of a layer are missing": (
        "moe",
        _pop(*(EXPERT.format(i, "down") for i in range(3))),
        (f"missing: no checkpoint tensor makes {DOWN} [3, 32, 24]",),
    ),
    "there is an expert too many": ("moe", _add_expert, (STACK, DOWN, "[3, 48, 32]", "[4, 48, 32]")),
    "an expert has a row too many": ("moe", _set(**{EXPERT.format(1, "up"): ONES(25, 32)}), (EXPERT.format(1, "up"),)),
    "an expert is transposed": ("moe", _transpose(EXPERT.format(1, "up")), (EXPERT.format(1, "up"),)),
    "a router is missing": ("moe", _pop("model.layers.0.mlp.gate.weight"), ("model.layers.0.mlp.gate.weight [3, 32]",)),
    "a stack is transposed": (
        "gpt_oss",
        lambda tensors: tensors.update({DOWN: ONES(3, 48, 33)}),
        (f"misshapen: {DOWN} is [3, 48, 32] in the model", "[3, 48, 33]"),
    ),
}


@pytest.mark.usefixtures("no_weight_is_read")
@pytest.mark.parametrize("case", MISFITS)
def test_misfit_is_named_before_a_weight_is_read(case: str, request: pytest.FixtureRequest) -> None:
    model, edit, says = MISFITS[case]
    folder = edit_tensors(request.getfixturevalue(model), edit)
    fails(CoverageError, (str(folder), *says), lambda: octavo.load(folder))


@pytest.mark.usefixtures("no_weight_is_read")
def test_all_misfits_come_in_one_message(llama: Path) -> None:
    def edit(tensors: Tensors) -> None:
        del tensors[Q], tensors["model.norm.weight"]
        tensors["extra"] = ONES(3)
        tensors[UP] = tensors[UP].T
        tensors["layers.0.self_attn.k_proj.weight"] = ONES(16, 32)

    says = (
        str(llama),
        "LlamaForCausalLM: 5 problems",
        f"missing: no checkpoint tensor makes {Q}",
        "missing: no checkpoint tensor makes model.norm.weight",
        "unexpected: the model has no place for extra",
        f"misshapen: {UP}",
        "duplicate: layers.0.self_attn.k_proj.weight",
        "strict=False) passes over unexpected tensors; missing ones never",
    )
    fails(CoverageError, says, lambda: octavo.load(edit_tensors(llama, edit)))
    fails(CoverageError, says[2:7], lambda: octavo.plan(llama))


@pytest.mark.usefixtures("no_weight_is_read")
def test_holes_in_stacks_come_in_the_same_message(moe: Path) -> None:
    edit_tensors(moe, _pop(EXPERT.format(1, "up"), "model.norm.weight"))
    fails(CoverageError, ("model.norm.weight", STACK), lambda: octavo.load(moe))


@pytest.mark.usefixtures("no_weight_is_read")
def test_missing_half_of_an_expert_is_named(moe: Path) -> None:
    edit_tensors(moe, _pop(EXPERT.format(1, "up")))
    fails(CoverageError, "experts.1.", lambda: octavo.load(moe))


@pytest.mark.usefixtures("no_weight_is_read")
def test_misfits_are_named_on_the_route_through_from_pretrained(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    edit_tensors(llama, _pop(Q, "model.norm.weight"))
    says = ("2 problems", Q, "model.norm.weight")
    config = octavo.OctavoConfig()
    load = AutoModelForCausalLM.from_pretrained
    fails(CoverageError, says, lambda: load(llama, quantization_config=config))


@pytest.mark.usefixtures("no_weight_is_read")
@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (3, "missing: no checkpoint tensor makes model.layers.2.self_attn.q_proj.weight"),
        (1, "unexpected: the model has no place for model.layers.1.self_attn.q_proj.weight"),
    ],
)
def test_config_of_another_depth_is_told_by_every_tensor(layers: int, says: str, llama: Path) -> None:
    edit_config(llama, num_hidden_layers=layers)
    text = fails(CoverageError, ("9 problems", says), lambda: octavo.load(llama))
    assert ("9 of these differ from others in a number alone: config.json may have fewer layers" in text) == (
        layers == 1
    )


@pytest.mark.parametrize("pretrained", [True, False])
def test_layers_that_a_config_cuts_off_are_told_where_they_are_passed_over(pretrained: bool, llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    edit_config(llama, num_hidden_layers=1)
    load = AutoModelForCausalLM.from_pretrained
    config = octavo.OctavoConfig()
    model = load(llama, quantization_config=config) if pretrained else octavo.load(llama, strict=False)
    report = model.load_report
    assert len(report.unused) == 9
    (note,) = report.notes
    assert "no place for them: 9 tensors" in note
    assert "9 of these differ from others in a number alone: config.json may have fewer layers than the files" in note
    edit_tensors(llama, _pop(*report.unused))
    assert not octavo.load(llama).load_report.notes


def test_layers_of_a_saved_model_that_a_config_cuts_off_are_told(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    octavo.load(llama).save_pretrained(tmp_path / "saved")
    edit_config(tmp_path / "saved", num_hidden_layers=1)
    says = r"config.json: quantization_config does not fit the model: it lists model.layers.1."
    for load in (octavo.load, AutoModelForCausalLM.from_pretrained):
        text = fails(CheckpointError, says, lambda load=load: load(tmp_path / "saved"))
        assert "which the model lacks. Was config.json edited, to fewer layers say?" in text


def test_strict_false_passes_over_unexpected_tensors_only(llama: Path) -> None:
    edit_tensors(llama, _set(extra=ONES(3)))
    assert list(octavo.load(llama, strict=False).load_report.unused) == ["extra"]
    edit_tensors(llama, _pop(Q))
    text = fails(CoverageError, f"missing: no checkpoint tensor makes {Q}", lambda: octavo.load(llama, strict=False))
    assert "unexpected:" not in text


@pytest.mark.usefixtures("no_weight_is_read")
def test_misfit_of_a_tebibyte_is_found_without_reading_it(llama: Path) -> None:
    file, tib = llama / MODEL, 1 << 40
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    end = len(raw) - 8 - length
    header["huge"] = entry("U8", (1 << 20, 1 << 20), end, end + tib)
    write_raw(file, json.dumps(header).encode(), raw[8 + length :])
    try:
        os.truncate(file, file.stat().st_size + tib)
    except OSError:
        pytest.skip("the file system has no files of a TiB")
    fails(CoverageError, "no place for huge [1048576, 1048576]", lambda: octavo.load(llama))


@pytest.mark.usefixtures("no_weight_is_read")
def test_truncated_shard_is_named_before_a_weight_is_read(llama: Path) -> None:
    split_in_two(llama)
    shard = llama / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    says = (shard.name, "the download is incomplete")
    text = fails(CheckpointError, says, lambda: octavo.load(llama))
    assert "model-00001-of-00002" not in text


def test_table_that_the_model_computes_is_passed_over_and_reported(llama: Path) -> None:
    """Older versions of models saved buffers (position_ids, inv_freq) that newer ones compute."""
    edit_tensors(llama, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(8)}))
    report = octavo.load(llama).load_report
    assert report.unused == {"model.rotary_emb.inv_freq": "the model computes this buffer"}


# -- configs ----------------------------------------------------------------------------------------------------------


def _config(text: str | None) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "config.json").unlink()
        if text is not None:
            (folder / "config.json").write_text(text)

    return edit


#: case -> (edit, what the error says)
CONFIGS: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "absent": (_config(None), ("no config.json (or an empty one), which would say what model this is",)),
    "no JSON": (_config("{'model_type': 'llama'}"), ("config.json", "not valid JSON")),
    "a list": (_config("[]"), ("config.json", "not a JSON object")),
    "null": (_config("null"), ("config.json", "not a JSON object")),
    "empty": (_config("{}"), ("config.json",)),
    "without a model_type": (_config('{"hidden_size": 32}'), ("config.json", "transformers can't read it")),
    "of an unknown model_type": (lambda f: edit_config(f, model_type="nosuch"), ("config.json", "nosuch")),
    "with text for a number": (lambda f: edit_config(f, hidden_size="x"), ("config.json", "hidden_size")),
    "with heads that don't divide": (lambda f: edit_config(f, num_attention_heads=5), ("config.json", "can't read it")),
    "with an unknown dtype": (lambda f: edit_config(f, dtype="bfloat17"), ("config.json", "bfloat17")),
}


@pytest.mark.usefixtures("no_weight_is_read")
@pytest.mark.parametrize("case", CONFIGS)
def test_config_that_is_unusable_is_named(case: str, llama: Path) -> None:
    edit, says = CONFIGS[case]
    edit(llama)
    fails(CheckpointError, (str(llama), *says), lambda: octavo.load(llama))


@pytest.mark.usefixtures("no_weight_is_read")
@pytest.mark.parametrize("scheme", ["fp8_channel", "mxfp8"])
def test_quantized_checkpoint_is_not_quantized_again(scheme: str, llama: Path) -> None:
    edit_config(llama, quantization_config={"quant_method": "gptq"})
    says = (str(llama), "already quantized (gptq, says its config.json)", "Start from the bf16")
    fails(RecipeError, says, lambda: octavo.load(llama, scheme))
    fails(RecipeError, says, lambda: octavo.plan(llama, scheme))


@pytest.mark.parametrize(
    "weights",
    [
        None,
        {"model.nosuch.weight": ["fp8_channel", [32]]},
        {Q: "fp8_channel"},
        {Q: ["fp8_channel", [-32]]},
        {Q: ["fp8_block", [16]]},
    ],
    ids=["absent", "of another model", "without parts", "of negative parts", "of too few rows"],
)
def test_saved_config_that_does_not_fit_its_model_is_named(weights: Any, llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    octavo.load(llama).save_pretrained(tmp_path / "saved")
    config = {"quant_method": "octavo"} | ({} if weights is None else {"weights": weights})
    edit_config(tmp_path / "saved", quantization_config=config)
    says = (str(tmp_path / "saved"), "config.json: quantization_config does not fit the model")
    for load in (octavo.load, AutoModelForCausalLM.from_pretrained):
        fails(CheckpointError, says, lambda load=load: load(tmp_path / "saved"))


def test_saved_model_is_not_loaded_by_another_recipe(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    octavo.load(llama, "fp8_block").save_pretrained(tmp_path / "saved")
    says = ("saved quantized by another recipe", "fp8_block", "Name no scheme")
    for recipe in (octavo.Recipe("fp8_channel"), octavo.Recipe("fp8_block", ignore=["*.self_attn.*"])):
        config = octavo.OctavoConfig(**recipe.to_dict())
        fails(RecipeError, says, lambda recipe=recipe: octavo.load(tmp_path / "saved", recipe))
        fails(
            RecipeError,
            says,
            lambda config=config: AutoModelForCausalLM.from_pretrained(tmp_path / "saved", quantization_config=config),
        )
    for same in (octavo.OctavoConfig(), octavo.OctavoConfig("fp8_block")):
        with pytest.warns(UserWarning, match="from the model will be used"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "saved", quantization_config=same)


@pytest.mark.usefixtures("no_weight_is_read")
def test_architecture_that_does_not_fit_the_config_is_named(llama: Path) -> None:
    edit_config(llama, architectures=["BertModel"])
    fails(CheckpointError, ("config.json", "BertModel"), lambda: octavo.load(llama))
