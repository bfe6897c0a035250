"""Configs and names of a few bytes that would take hours and all memory are refused, and the bound is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from _inputs import edit_config, entry, fails, write_entries, write_raw

import octavo
from helpers.models import random_model
from octavo.adapters.transformers.bounds import check_layers
from octavo.adapters.transformers.model_plan import _holes
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.errors import CheckpointError, DeviceError, OctavoError
from octavo.planning import kinds


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "decoder_layers"])
@pytest.mark.parametrize("nested", [False, True])
def test_config_with_more_layers_than_the_checkpoint_has_tensors_is_refused(
    key: str, nested: bool, llama: Path
) -> None:
    tensors = len(Checkpoint.open(llama).tensors)
    edit_config(llama, **({"text_config": {"parts": [{key: 10**9}]}} if nested else {key: 10**9}))
    says = ("config.json", f"'{key}' is 1000000000", f"has {tensors} tensors", f"at most {256 + tensors:,} are taken")
    fails(CheckpointError, says, lambda: octavo.load(llama))


@pytest.mark.parametrize(
    "model_type", ["gemma3n", "gemma3n_text", "embedding_gemma2", "zamba", "gpt_neo", "qwen2_5_vl"]
)
def test_published_sizes_are_no_numbers_of_layers(model_type: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    transformers.CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    write_entries(tmp_path / "model.safetensors", {"w": entry()}, 12)
    check_layers(Checkpoint.open(tmp_path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_labels": 10**9}, "'num_labels' is 1000000000"),
        ({"text_config": {"num_labels": 10**9}}, "at most 1,000,000 are taken"),
        ({"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]}, "'attention_types' is [[['global'], 1"),
        ({"architectures": ["ConvNextModel"], "depths": [10**9], "hidden_sizes": [8]}, "many more parameters"),
    ],
    ids=["labels", "labels of a part", "kinds of attention", "a schedule"],
)
def test_config_that_makes_python_count_to_billions_is_refused(changes: dict[str, Any], says: str, llama: Path) -> None:
    kind = {"model_type": "convnext", "num_stages": 1} if "depths" in changes else {}
    edit_config(llama, **kind, **changes)
    fails(CheckpointError, ("config.json", says), lambda: octavo.load(llama))


def test_of_billions_of_missing_experts_some_are_named() -> None:
    names = [f"layers.0.experts.{number}.{kind}_proj.weight" for number in (0, 10**20) for kind in ("gate", "up")]
    found = _holes(names)
    assert found[0] == "layers.0.experts.1.gate_proj.weight"
    assert len(found) == 100
    assert _holes(["experts.²0.w", "experts.0.w"]) == []  # no number, though Python calls it a digit


@pytest.mark.parametrize(
    "part",
    ["embed", "emb", "norm", "router.", "experts.", "cls.", "a_embeddings.", "..", "gate_proj.", "9", "lm_head."],
)
def test_names_as_long_as_they_may_be_are_judged_at_once(part: str, tmp_path: Path) -> None:
    size, names = 12, [(part * 1024)[: 1010 - number] + end for number in range(60) for end in (".weight", ".x")]
    entries = {name: entry(begin=size * i, end=size * (i + 1)) for i, name in enumerate(names)}
    write_raw(tmp_path / "model.safetensors", json.dumps(entries).encode(), bytes(size * len(names)))
    assert len(octavo.plan(tmp_path, model=False).placements) == len(names)


def test_a_stack_of_more_matrices_than_experts_stays_as_it_is(tmp_path: Path) -> None:
    entries = {"experts.w": entry(shape=(1 << 30, 1, 1), end=2 << 30)}
    write_raw(tmp_path / "model.safetensors", json.dumps(entries).encode())
    with open(tmp_path / "model.safetensors", "ab") as file:
        file.truncate(file.tell() + (2 << 30))
    plan = octavo.plan(tmp_path, model=False)
    assert [p.reason for p in plan.placements] == ["1,073,741,824 matrices, no expert stack"]


def test_a_tensor_larger_than_memory_is_not_handed_out_but_said(tmp_path: Path) -> None:
    nbytes = 1 << 41
    entries = {"m.weight": entry(shape=(1 << 20, 1 << 20), end=nbytes)}
    write_raw(tmp_path / "model.safetensors", json.dumps(entries).encode())
    try:
        with open(tmp_path / "model.safetensors", "ab") as file:
            file.truncate(file.tell() + nbytes)
    except OSError:
        pytest.skip("the file system has no files of two TiB")
    says = ("m.weight: needs 1,024.", "of memory", "octavo.convert writes tensors of any")
    fails(DeviceError, says, lambda: octavo.stream(tmp_path))


def test_kinds_are_told_by_components_of_names() -> None:
    told = {
        "model.layers.0.mlp.gate": "MoE router",
        "model.layers.0.mlp.my_router.proj": "MoE router",
        "model.layers.0.mlp.gate_proj": None,
        "a.b.classifier": "output head",
        "h.0.cls.predictions": "output head",
        "blk.embedding.dense": "embedding",
        "time_emb_layers.3": "embedding",
        "wte": "embedding",
        "x.post_attention_layernorm": "norm",
        "mlp.shared_expert.gate": "shared expert's gate",
        "mlp.shared_expert.up_proj": None,
    }
    assert {name: kinds.default_keep(f"{name}.weight") for name in told} == told


def test_tables_that_a_config_makes_larger_than_its_checkpoint_are_not_computed(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4, "n_positions": 8}
    random_model("GPTJConfig", sizes).save_pretrained(tmp_path / "gptj")
    edit_config(tmp_path / "gptj", n_positions=10**9)
    says = ("config.json: the model would compute", "bytes of tables", "of such a config at most")
    fails(CheckpointError, says, lambda: octavo.load(tmp_path / "gptj"))


def refusal(folder: Path) -> str:
    """What the error of a load says; where it loads, the names that any error could say."""
    try:
        octavo.load(folder)
    except OctavoError as error:
        return str(error)
    return str(folder / "generation_config.json")


@pytest.mark.parametrize(
    "changes",
    [
        *({"architectures": 5}, {"architectures": [5]}, {"architectures": {"a": "b"}}, {"torch_dtype": "nosuch"}),
        *({"dtype": "nosuch"}, {"auto_map": 5}, {"model_type": []}, {"hidden_size": "many"}, {"vocab_size": -1}),
        *({"rope_parameters": 5}, {"num_hidden_layers": None}, {"pad_token_id": {}}, {"num_attention_heads": 0}),
    ],
    ids=str,
)
def test_config_with_values_of_other_types_is_refused_or_taken(changes: dict[str, object], llama: Path) -> None:
    edit_config(llama, **changes)
    assert str(llama) in refusal(llama)


@pytest.mark.parametrize("content", ["[]", "5", '{"temperature": "hot"}', '{"a":' * 3000, '{"eos_token_id": {}}'])
def test_generation_config_of_any_content_is_refused_or_taken(content: str, llama: Path) -> None:
    (llama / "generation_config.json").write_text(content)
    assert str(llama / "generation_config.json") in refusal(llama)


def test_names_with_digits_that_are_no_numbers_are_no_fault(llama: Path) -> None:
    header, size = {"layers.².weight": entry()}, 12
    write_raw(llama / "model.safetensors", json.dumps(header).encode(), bytes(size))
    fails(CheckpointError, (str(llama), "invalid literal for int()"), lambda: octavo.load(llama))
