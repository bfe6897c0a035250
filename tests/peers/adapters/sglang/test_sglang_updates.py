"""New weights for a model of SGLang: requantized in place, equal to a fresh load, nothing moved; parts refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.folders import edit_tensors, tensors_of
from helpers.sglang_checkpoints import convert, make
from helpers.sglang_loading import Answer, load, load_ranks, octavo_job
from helpers.vllm_checkpoints import make as make_for_vllm
from helpers.vllm_checkpoints import with_mtp

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("sglang_loads"),
]
WHOLE: list[list[str]] = [[]]
WAYS = ["disk", "tensors", "disk auto", "bucket", "distributed", "last"]


def pair(name: str, folder: Path) -> tuple[Path, Path]:
    return make(name, folder / "old"), make(name, folder / "new", seed=1)


def run(name: str, scheme: str, folder: Path, *steps: list[Any]) -> tuple[Answer, Answer]:
    """A model that takes the steps, and one that is loaded from the other checkpoint."""
    old, new = pair(name, folder)
    mine, fresh = load(octavo_job(old, scheme, steps), octavo_job(new, scheme), timeout=500)
    assert not mine.error, mine.output[-4000:]
    assert not fresh.error, fresh.output[-4000:]
    assert mine.served != fresh.served
    return mine, fresh


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
@pytest.mark.parametrize("name", ["llama", "qwen2_moe", "deepseek_v2", "deepseek_v3"])
def test_every_way_of_updating_equals_a_fresh_load_in_the_same_memory(name: str, scheme: str, tmp_path: Path) -> None:
    old, new = str(tmp_path / "old"), str(tmp_path / "new")
    steps = [["update", way, (new, old)[number % 2], WHOLE] for number, way in enumerate(WAYS)]
    mine, fresh = run(name, scheme, tmp_path, *steps, ["do", "process"], ["update", "tensors", old, WHOLE])
    states = [fresh.served, mine.served] * 3
    results = [*mine.results[:6], mine.results[7]]
    for (answers, now, in_place), expected in zip(results, [*states, mine.served], strict=True):
        assert [done for done, _ in answers] == [True], answers
        assert {key for key in expected if now[key] != expected[key]} == set()
        assert in_place


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_fifty_updates_leave_nothing_behind(name: str, scheme: str, tmp_path: Path) -> None:
    steps = ["often", [str(tmp_path / "new"), str(tmp_path / "old")], 50]
    mine, fresh = run(name, scheme, tmp_path, steps)
    ((states, resident, in_place),) = mine.results
    assert len(states) == 50
    assert in_place
    for number, state in enumerate(states):
        assert state == (fresh, mine)[number % 2].served
    # what the first few leave in allocators is no growth
    assert max(resident[-10:]) - max(resident[5:15]) < 2 << 20


UP, GATE = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "gate"))
FUSED = "model.layers.1.mlp.gate_up_proj.weight"
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.mark.parametrize(
    ("name", "scheme", "lacking", "stays"),
    [
        ("llama", "fp8_channel", UP, "model.layers.1.mlp.gate_up_proj"),
        ("llama", "fp8_block", UP, "model.layers.1.mlp.gate_up_proj"),
        ("qwen2_moe", "fp8_channel", EXPERT, "model.layers.1.mlp.experts"),
        ("qwen2_moe", "fp8_block", EXPERT, "model.layers.1.mlp.experts"),
    ],
)
def test_a_layer_of_which_a_part_came_stays_as_it_was_and_is_named(
    name: str, scheme: str, lacking: str, stays: str, tmp_path: Path
) -> None:
    old, new = pair(name, tmp_path)
    names = [name for name in tensors_of(new) if name != lacking]
    some = ["update", "more to come", str(new), [names[::3], names[1::3]]]
    mine, fresh = run(
        name,
        scheme,
        tmp_path,
        some,
        ["update", "last", str(new), [names[2::3]]],
        ["update", "last", str(new), [[lacking]]],  # what came of its layer before is forgotten
        ["update", "tensors", str(new), WHOLE],
        ["update", "tensors", str(old), [names]],
        ["update", "tensors", str(old), [[lacking]]],  # its layer waits for it
    )
    begun, ended, alone, whole, most, rest = mine.results
    assert [done for done, _ in begun[0]] == [True, True]
    ((refused, message),) = ended[0]
    assert not refused
    assert f"{stays}: " in message
    assert f"{lacking} did not" in message
    mixed = {key: (mine if key.startswith(f"{stays}.") else fresh).served[key] for key in fresh.served}
    assert ended[1] == mixed
    ((refused, message),) = alone[0]
    assert not refused
    assert f"{stays}: {lacking} came" in message
    assert alone[1] == mixed
    assert whole[1] == fresh.served
    assert most[1] == {key: (fresh if key.startswith(f"{stays}.") else mine).served[key] for key in fresh.served}
    assert rest[1] == mine.served
    assert all(in_place for _, _, in_place in mine.results)


def test_what_would_go_wrong_is_refused_and_the_model_stays(tmp_path: Path) -> None:
    _, new = pair("llama", tmp_path)
    bad, lacking, integers = (make("llama", tmp_path / name, seed=1) for name in ("bad", "lacking", "integers"))
    edit_tensors(bad, lambda tensors: tensors[GATE].view(-1)[:1].fill_(float("nan")))
    edit_tensors(lacking, lambda tensors: tensors.pop(UP))
    edit_tensors(integers, lambda tensors: tensors.update({UP: tensors[UP].int()}))
    steps = [
        ["update", "disk", str(lacking), WHOLE],
        ["update", "disk dummy", str(new), WHOLE],
        ["update", "tensors direct", str(new), WHOLE],
        ["update", "tensors", str(bad), [[UP, GATE]]],
        ["update", "tensors", str(integers), [[UP, GATE]]],
        ["update", "disk", str(tmp_path / "nowhere"), WHOLE],
        ["update", "tensors", str(new), WHOLE],
    ]
    mine, fresh = run("llama", "fp8_block", tmp_path, *steps)
    *refusals, after = mine.results
    said = [answers[0][1] for answers, _, _ in refusals]
    for text, words in zip(said, (f"has no {UP}", "'dummy'", "'direct'", GATE, "torch.int32", "nowhere"), strict=True):
        assert words in text
    assert "not finite" in said[3]
    for answers, now, in_place in refusals:
        assert not answers[0][0]
        assert now == mine.served
        assert in_place
    assert after[1] == fresh.served


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_what_is_no_number_is_not_written_where_nothing_waits(name: str, tmp_path: Path) -> None:
    pair("llama", tmp_path)
    bad = make("llama", tmp_path / "bad", seed=1)
    edit_tensors(bad, lambda tensors: tensors[name].view(-1)[5:6].fill_(float("nan")))
    ways = ["tensors", "disk", "bucket", "last"]
    steps = [["update", way, str(bad), [[name]]] for way in ways]
    mine, fresh = run("llama", "fp8_block", tmp_path, *steps, ["update", "disk", str(tmp_path / "new"), WHOLE])
    *refusals, after = mine.results
    for answers, now, in_place in refusals:
        ((done, message),) = answers
        assert not done
        assert f"{name}: holds a number that is not finite. Its layer is as it was; send" in message
        assert now[name] == mine.served[name]
        assert in_place
    assert after[1] == fresh.served


def test_stages_of_a_pipeline_refuse_updates_since_they_are_not_asked_what_failed(tmp_path: Path) -> None:
    new = str(tmp_path / "new")
    steps = [["do", "be a stage"], *(["update", way, new, WHOLE] for way in WAYS), ["do", "be all"]]
    mine, _ = run("llama", "fp8_block", tmp_path, *steps)
    for answers, now, _ in mine.results[1:-1]:
        ((done, message),) = answers
        assert not done
        assert "LlamaForCausalLM: is a stage of a pipeline" in message
        assert now == mine.served


DOWN = "model.layers.0.mlp.down_proj.weight"
SCALE = f"{DOWN}_scale"


def _bits(value: int) -> Any:
    return lambda tensors: tensors[DOWN].view(torch.uint8).view(-1)[:1].fill_(value)


def _scale(change: Any) -> Any:
    return lambda tensors: tensors.update({SCALE: change(tensors[SCALE])})


#: what is wrong -> how, and what is said of it for scales of blocks
UNSOUND: dict[str, tuple[Any, str]] = {
    "nan": (_bits(0x7F), f"{DOWN}: holds a number that is not finite. Its layer is as it was"),
    "negative nan": (_bits(0xFF), f"{DOWN}: holds a number that is not finite. Its layer is as it was"),
    "a number below 0": (_scale(lambda scale: -scale), f"{SCALE}: holds a number that is not finite, or is negative"),
    "infinity": (_scale(lambda scale: scale / 0), f"{SCALE}: holds a number that is not finite, or is negative"),
    "integers": (_scale(lambda scale: scale.int()), f"{SCALE}: is torch.int32 [1, 2], and the scale of {DOWN} in "),
    "a cell more": (_scale(lambda scale: scale.repeat(1, 2)[:, :3].clone()), f"{SCALE} is [1, 3], by which nobody can"),
    "a vector": (_scale(lambda scale: scale.flatten()), f"{SCALE} is fp32 [2], which are no scales of {DOWN} "),
}


def test_fp8_of_a_trainer_is_taken_and_refused_where_it_is_no_number_or_misshapen(tmp_path: Path) -> None:
    _, new = pair("llama", tmp_path)
    good = convert(new, "fp8_block")
    steps = []
    for name, (change, _) in UNSOUND.items():
        shutil.copytree(good, tmp_path / name)
        edit_tensors(tmp_path / name, change)
        steps.append(["update", "last", str(tmp_path / name), [[DOWN, SCALE]]])
    mine, fresh = run("llama", "fp8_block", tmp_path, *steps, ["update", "last", str(good), WHOLE])
    *refusals, after = mine.results
    for (answers, now, _), (_, words) in zip(refusals, UNSOUND.values(), strict=True):
        assert words in answers[0][1]
        assert not answers[0][0]
        assert now == mine.served
    assert after[0] == [[True, "Success"]]
    assert after[1] == fresh.served


def test_names_that_all_miss_are_told_with_those_that_are_known(tmp_path: Path) -> None:
    _, new = pair("llama", tmp_path)
    wrapped, bare = (shutil.copytree(new, tmp_path / name) for name in ("wrapped", "bare"))
    edit_tensors(
        wrapped, lambda tensors: tensors.update({f"policy.{name}.base": tensors.pop(name) for name in [*tensors]})
    )
    edit_tensors(bare, lambda tensors: tensors.update({n.removeprefix("model."): tensors.pop(n) for n in [*tensors]}))
    steps = [["update", "last", str(path), WHOLE] for path in (wrapped, bare, new)]
    mine, fresh = run("llama", "fp8_block", tmp_path, *steps)
    (unknown, stays, _), (misses, _, _), (done, now, _) = mine.results
    assert not unknown[0][0]
    assert "SGLang's loader knows nothing of what came: policy.lm_head.weight.base, policy.model." in unknown[0][1]
    assert "it knows lm_head.weight, model.embed_tokens.weight, model.layers.0.input_layernorm" in unknown[0][1]
    assert stays == mine.served
    assert not misses[0][0]
    assert "embed_tokens.weight: SGLang's loader knows no such tensor, and model.embed_tokens.weight" in misses[0][1]
    assert done == [[True, "Success"]]
    assert now == fresh.served


def fuse(tensors: dict[str, Any]) -> None:
    tensors[FUSED] = torch.cat([tensors.pop(GATE), tensors.pop(UP)])


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_a_fused_tensor_is_taken_for_those_that_it_holds(scheme: str, tmp_path: Path) -> None:
    fused, half = (make("llama", tmp_path / name, seed=1) for name in ("fused", "half"))
    edit_tensors(fused, fuse)
    edit_tensors(half, lambda tensors: tensors.update({FUSED: tensors[GATE].clone()}))
    steps = [["update", "tensors", str(half), [[FUSED]]], ["update", "last", str(fused), WHOLE]]
    mine, fresh = run("llama", scheme, tmp_path, *steps)
    (refused, left, _), (taken, now, in_place) = mine.results
    ((done, message),) = refused
    assert not done
    assert f"{FUSED}: " in message  # SGLang's loader would pad it, and write bf16 over FP8
    assert left == mine.served
    assert taken == [[True, "Success"]]
    assert now == fresh.served
    assert in_place


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_bare_tensors_are_quantized_and_not_put_into_what_kernels_read(scheme: str, tmp_path: Path) -> None:
    """SGLang alone puts bf16 into blocks of FP8, without a word, and refuses it for channels."""
    mine, fresh = run("llama", scheme, tmp_path, ["update", "bare", str(tmp_path / "new"), WHOLE])
    ((answers, now, in_place),) = mine.results
    assert answers == [[True, ""]]
    assert now == fresh.served
    assert in_place


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_memory_that_was_given_back_is_filled_by_an_update_or_its_loss_is_told(scheme: str, tmp_path: Path) -> None:
    old, new = pair("deepseek_v2", tmp_path)
    names = list(tensors_of(new))
    mine, fresh = run(
        "deepseek_v2",
        scheme,
        tmp_path,
        ["do", "sleep"],
        ["update", "last", str(new), [names[5:]]],
        ["update", "last", str(new), WHOLE],
        ["do", "sleep"],
        ["update", "disk", str(old), WHOLE],
        ["update", "last", str(new), [names[5:]]],
    )
    _, part, whole, _, disk, _ = mine.results
    ((told, message),) = part[0]
    assert not told
    assert "is lost since release_memory_occupation" in message or "did not" in message
    for (answers, now, in_place), expected in ((whole, fresh.served), (disk, mine.served)):
        assert answers[0][0], answers
        assert {key for key in expected if now[key] != expected[key]} == set()
        assert in_place


def test_a_layer_is_not_completed_by_another_update_as_far_as_that_can_be_known(tmp_path: Path) -> None:
    new = tmp_path / "new"
    bad = make("llama", tmp_path / "bad", seed=2)
    edit_tensors(bad, lambda tensors: tensors.pop(UP))
    down = UP.replace("up_proj", "down_proj")
    broken_off, rest = ["update", "more to come", str(bad), [[GATE, down]]], ["update", "last", str(new), [[UP]]]
    steps = [
        [broken_off, ["update", "last", str(new), [[down, UP]]]],  # a tensor comes again, elsewhere in the model
        [broken_off, ["update", "disk", str(bad), WHOLE], rest],
        [broken_off, ["update", "tensors direct", str(bad), WHOLE], rest],
        [["update", "more of a version", str(bad), [[GATE]]], ["update", "last of a version", str(new), [[UP]]]],
        [["update", "more of a version", str(new), [[GATE]]], ["update", "last of a version", str(new), [[UP]]]],
    ]
    mine, fresh = run("llama", "fp8_block", tmp_path, *(step for some in steps for step in some))
    layer = "model.layers.1.mlp.gate_up_proj"
    for result in (mine.results[1], mine.results[4], mine.results[7], mine.results[9]):
        ((done, message),) = result[0]
        assert not done
        assert f"{layer}: {UP} came, {GATE} did not" in message
        assert {k: v for k, v in result[1].items() if layer in k} == {
            k: v for k, v in mine.served.items() if layer in k
        }
    assert f"{down} came twice" in mine.results[1][0][0][1]
    answers, now, _ = mine.results[-1]  # of one version
    assert answers == [[True, "Success"]]
    assert {k: v for k, v in now.items() if layer in k} == {k: v for k, v in fresh.served.items() if layer in k}


def test_a_folder_with_an_error_in_the_middle_is_named_and_layers_before_it_are_said_to_be_new(tmp_path: Path) -> None:
    old, _ = pair("llama", tmp_path)
    bad = make("llama", tmp_path / "bad", seed=1)
    edit_tensors(bad, lambda tensors: tensors[GATE].view(-1)[:1].fill_(float("nan")))
    mine, _ = run(
        "llama", "fp8_block", tmp_path, ["update", "disk", str(bad), WHOLE], ["update", "disk", str(old), WHOLE]
    )
    ((done, message),), now, _ = mine.results[0]
    assert not done
    assert str(bad) in message
    assert GATE in message
    assert "Layers that had come whole are new" in message
    assert now != mine.served
    assert mine.results[1][1] == mine.served


@pytest.mark.parametrize("way", ["last", "disk last"])
def test_what_fails_in_one_rank_is_the_answer_of_all(way: str, tmp_path: Path) -> None:
    """SGLang passes on the answer of its first rank. With experts of their own, only the other one sees a NaN."""
    expert = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    old, bad, new = (
        make("mixtral wide", tmp_path / name, seed=seed) for seed, name in enumerate(("old", "bad", "new"))
    )
    edit_tensors(bad, lambda tensors: tensors[expert].view(-1)[:1].fill_(float("nan")))
    lacking = expert.replace("w1", "w2")
    names = [name for name in tensors_of(new) if name != lacking]
    steps = [
        ["update", way, str(bad), WHOLE],
        ["update", "last", str(new), [names]],
        ["update", "last", str(new), [[lacking]]],
        ["update", way, str(new), WHOLE],
    ]
    ((first, second),) = load_ranks(2, octavo_job(old, "fp8_channel", steps, ep_size=2), timeout=500)
    for rank in (first, second):
        assert not rank.error, rank.output[-4000:]
        nan, part, alone, whole = (answers[0] for answers, _, _ in rank.results)
        assert not nan[0]
        assert nan[1].startswith("rank 1 of 2: ")
        assert expert in nan[1]
        assert not part[0]
        assert f"{lacking} did not" in part[1]
        assert not alone[0]
        assert whole[0], whole
    assert "octavo: new weights, rank 1 of 2: " in second.output
    assert "octavo: new weights, rank" not in first.output


def test_a_draft_whose_memory_was_given_back_is_known_to_hold_nothing(tmp_path: Path) -> None:
    source = with_mtp(make_for_vllm("glm4_moe", tmp_path / "bf16"), copies=False)
    flag = {"enable_draft_weights_cpu_backup": True}
    jobs = [octavo_job(source, "fp8_channel", [["draft that sleeps"]], **flags) for flags in ({}, flag)]
    lost, kept = load(*jobs, timeout=500)
    assert not lost.error, lost.output[-4000:]
    assert not kept.error, kept.output[-4000:]
    ((done, message),) = lost.results
    assert not done
    assert "model.layers.2." in message or "is lost since release_memory_occupation" in message
    assert kept.results == [[True, "Success"]]
