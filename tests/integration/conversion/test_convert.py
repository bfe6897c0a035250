"""Converting: what is written is the definition's bytes, in files that safetensors itself opens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _sources import (
    CASES,
    CONFIG,
    assert_same,
    by_case,
    by_scheme,
    convert,
    digests,
    expected,
    header_of,
    is_quantized,
    read_all,
    source_tensors,
)
from safetensors.torch import load_file

import octavo
from helpers import random_weights, same_bytes, write_checkpoint
from octavo.checkpoint import dtypes
from octavo.conversion import formats
from octavo.errors import RecipeError

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "no_waiting_for_the_disk")


# -- what is written --------------------------------------------------------------------------------------------------


@by_case
@pytest.mark.parametrize("layout", ["single", "sharded", "file"])
def test_converted_checkpoint_holds_exactly_the_bytes_of_the_definition(
    sources: Callable[[str], Path], layout: str, format: str, scheme: str, tmp_path: Path
) -> None:
    source, dst = sources(layout), tmp_path / "out"
    octavo.convert(source, dst, scheme, format=format, prove=layout == "sharded")
    assert_same(read_all(dst), expected(source_tensors(), format, scheme))
    shards = ["model.safetensors"]
    if layout == "sharded":
        shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)] + ["model.safetensors.index.json"]
    assert sorted(file.name for file in dst.iterdir()) == ["config.json", *shards]
    assert octavo.verify(dst, source).ok
    assert list(tmp_path.iterdir()) == [dst]  # nothing is left beside it


@by_case
def test_header_is_first_and_every_tensor_aligned(
    sources: Callable[[str], Path], format: str, scheme: str, tmp_path: Path
) -> None:
    convert(sources("sharded"), tmp_path / "out", scheme, format=format)
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        header, base = header_of(file)
        assert header.pop("__metadata__") == {"format": "pt"}
        assert base % 8 == 0
        end = 0
        for entry in header.values():
            begin, stop = entry["data_offsets"]
            bits = dtypes.BITS[entry["dtype"]]
            assert begin == end
            assert stop - begin == math.prod(entry["shape"]) * bits // 8
            assert (base + begin) % (bits // 8) == 0
            end = stop
        assert base + end == file.stat().st_size


def test_index_names_every_tensor_in_the_file_that_holds_it(sources: Callable[[str], Path], tmp_path: Path) -> None:
    convert(sources("sharded"), tmp_path / "out", "fp8_block")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        header, _ = header_of(file)
        held |= {name: file.name for name in header if name != "__metadata__"}
    assert index["weight_map"] == held
    tensors = read_all(tmp_path / "out").values()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors)


def test_each_shard_out_holds_the_tensors_of_one_shard_in(sources: Callable[[str], Path], tmp_path: Path) -> None:
    convert(sources("sharded"), tmp_path / "out")
    for file in sources("sharded").glob("*.safetensors"):
        before, _ = header_of(file)
        after, _ = header_of(tmp_path / "out" / file.name)
        assert {name for name in after if not name.endswith("_scale")} == set(before)


def test_shards_without_an_index_are_converted_with_one(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, source_tensors(), 3, CONFIG)
    (source / "model.safetensors.index.json").unlink()
    convert(source, tmp_path / "out")
    convert(sources("sharded"), tmp_path / "indexed")
    assert digests(tmp_path / "out") == digests(tmp_path / "indexed")


@by_case
def test_config_says_how_the_weights_were_quantized(
    sources: Callable[[str], Path], format: str, scheme: str, tmp_path: Path
) -> None:
    convert(sources("single"), tmp_path / "out", scheme, format=format)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == CONFIG
    assert quantization["quant_method"] == format.removesuffix("-w8a8")
    kept = {"lm_head", "model.embed_tokens", "model.layers.1.mlp.gate"}
    kept |= {
        name.removesuffix(".weight")
        for name, tensor in source_tensors().items()
        if name.endswith("_proj.weight") and not is_quantized(name, tensor, format, scheme)
    }
    if format == "fp8":
        assert quantization["weight_block_size"] == [128, 128]
        assert kept <= set(quantization["modules_to_not_convert"])
    else:
        assert kept <= set(quantization["ignore"])
        (group,) = quantization["config_groups"].values()
        strategy = {"fp8_block": "block", "fp8_tensor": "tensor", "mxfp8": "group", "nvfp4": "tensor_group"}.get(
            scheme, "channel"
        )
        assert group["weights"]["strategy"] == strategy


@pytest.mark.parametrize("as_file", [False, True])
def test_tokenizer_and_other_small_files_come_along(as_file: bool, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", source_tensors(), 1, CONFIG)
    carried = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "vocab.txt",
               "merges.txt", "tokenizer.model", "README.md", "LICENSE", "modeling_own.py")  # fmt: skip
    left = ("pytorch_model.bin", "model.gguf", "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin.index.json",
            "optimizer.pt", ".gitattributes")  # fmt: skip
    for name in (*carried, *left):
        (source / name).write_bytes(f"this is {name}\n".encode() * 3)
    (source / "original").mkdir()
    convert(source / "model.safetensors" if as_file else source, tmp_path / "out")
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found == {*carried, "config.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in carried)


def test_lone_file_without_a_config_brings_no_neighbours(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", source_tensors(), 1) / "model.safetensors"
    (source.parent / "diary.txt").write_text("not of this model")
    convert(source, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert_same(read_all(tmp_path / "out"), expected(source_tensors(), "compressed-tensors", "fp8_channel"))


def test_conversion_without_a_config_can_be_verified(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", source_tensors(), 1)
    convert(source, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", source).ok


def test_source_is_left_as_it_was(sources: Callable[[str], Path], tmp_path: Path) -> None:
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in sources("sharded").iterdir()}
    convert(sources("sharded"), tmp_path / "out")
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in sources("sharded").iterdir()} == before


@by_scheme
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fp16_and_fp32_sources_are_quantized_from_their_own_values(
    dtype: torch.dtype, scheme: str, tmp_path: Path
) -> None:
    tensors = source_tensors(dtype)
    source = write_checkpoint(tmp_path / "source", tensors, 2, CONFIG)
    convert(source, tmp_path / "out", scheme)
    assert_same(read_all(tmp_path / "out"), expected(tensors, "compressed-tensors", scheme))
    assert octavo.verify(tmp_path / "out", source).ok


def test_conversion_without_a_scheme_copies_every_tensor(sources: Callable[[str], Path], tmp_path: Path) -> None:
    report = convert(sources("sharded"), tmp_path / "out", None)
    assert_same(read_all(tmp_path / "out"), source_tensors())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    assert octavo.verify(tmp_path / "out", sources("sharded")).ok
    assert not report.quantized


def test_ignored_weights_stay_and_readers_are_told(sources: Callable[[str], Path], tmp_path: Path) -> None:
    report = convert(sources("single"), tmp_path / "out", ignore=["model.layers.0"])
    found = read_all(tmp_path / "out")
    assert {name for name in found if name.endswith("_scale")} == {
        f"{name}_scale"
        for name in source_tensors()
        if name.startswith("model.layers.1") and name.endswith("_proj.weight")
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "model.layers.0.self_attn.q_proj" in config["quantization_config"]["ignore"]
    assert report.kept["ignored by 'model.layers.0'"][0] == 5


def test_two_schemes_in_one_checkpoint_have_a_group_each(sources: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = octavo.Recipe("fp8_channel", targets={"*.experts.*": "fp8_block"})
    convert(sources("sharded"), tmp_path / "out", recipe)
    tensors = source_tensors()
    experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    wanted = expected(tensors, "compressed-tensors", "fp8_channel")
    assert_same(read_all(tmp_path / "out"), wanted | expected(experts, "compressed-tensors", "fp8_block"))
    assert octavo.verify(tmp_path / "out", sources("sharded")).ok
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {group["weights"]["strategy"] for group in groups.values()} == {"channel", "block"}


def test_report_counts_bytes_and_says_what_stayed(sources: Callable[[str], Path], tmp_path: Path) -> None:
    report = convert(sources("sharded"), tmp_path / "out", "mxfp8")
    tensors = source_tensors()
    assert report.source_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    found = read_all(tmp_path / "out")
    assert report.final_bytes == sum(t.numel() * t.element_size() for t in found.values())
    assert report.quantized["mxfp8"][0] == 7
    assert {reason: count for reason, (count, _) in report.kept.items()} == {
        "257 columns: readers of mxfp8 want a multiple of 32": 1,
        "1 columns: readers of mxfp8 want a multiple of 32": 1,
        "embedding, kept by default": 1,
        "norm": 1,
        "bias": 1,
        "MoE router, kept by default": 1,
        "output head, kept by default": 1,
    }
    assert json.loads(json.dumps(report.to_dict()))["final_bytes"] == report.final_bytes
    assert "readers of mxfp8" in report.table()
    assert any("vLLM can" in note or "says so" in note for note in report.notes)


def test_a_conversion_that_quantizes_nothing_says_so(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", {"model.norm.weight": random_weights((64,), torch.bfloat16, 0)})
    note = "nothing is quantized: see what is kept, and why"
    assert note in convert(source, tmp_path / "a").notes
    assert note not in convert(source, tmp_path / "b", None).notes


def test_progress_rises_to_all_bytes(sources: Callable[[str], Path], tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = convert(sources("sharded"), tmp_path / "out", progress=lambda done, of: calls.append((done, of)))
    assert calls == sorted(calls)
    assert calls[-1] == (report.source_bytes, report.source_bytes)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_tensor", "mxfp8"])
def test_format_that_lacks_the_scheme_says_which_has_it(
    sources: Callable[[str], Path], scheme: str, tmp_path: Path
) -> None:
    for call in (
        lambda: convert(sources("single"), tmp_path / "out", scheme, format="fp8"),
        lambda: octavo.stream(sources("single"), scheme, format="fp8"),
        lambda: octavo.plan(sources("single"), scheme, format="fp8", model=False),
    ):
        with pytest.raises(RecipeError, match=f"no {scheme}, only fp8_block.*compressed-tensors"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_unknown_format_lists_the_known_ones(sources: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="unknown format 'gguf'; known: compressed-tensors, compressed-tensors-w8a8, fp8"
    ):
        convert(sources("single"), tmp_path / "out", format="gguf")
    assert list(tmp_path.iterdir()) == []


@by_case
def test_converted_checkpoint_is_not_quantized_twice(
    sources: Callable[[str], Path], format: str, scheme: str, tmp_path: Path
) -> None:
    convert(sources("single"), tmp_path / "once", scheme, format=format)
    report = convert(tmp_path / "once", tmp_path / "twice", scheme, format=format)
    if format == "compressed-tensors" and scheme == "int8_channel":
        return  # packed numbers are decoded, and scaled anew
    if scheme == "nvfp4":  # decoded, and found again, but for the signs of zeros
        assert octavo.verify(tmp_path / "twice", against=tmp_path / "once").ok
        return
    if scheme == "int8_channel":  # with scales in float32, it is rounded anew
        assert octavo.verify(tmp_path / "twice", against=tmp_path / "once").ok
        return
    assert report.passed_through == report.quantized
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert once.keys() == twice.keys()
    assert all(same_bytes(tensor, twice[name]) for name, tensor in once.items())


def test_pattern_that_matches_nothing_is_refused(sources: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="matches no tensor"):
        convert(sources("single"), tmp_path / "out", ignore=["model.layers.9"])


def test_every_format_is_tried_here() -> None:
    assert {format for format, _ in CASES} == set(formats.NAMES)
    assert len(CASES) == sum(len(formats.get(name).schemes) for name in formats.NAMES)
