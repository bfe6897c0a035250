"""Converting and iterating: what is written is the definition's bytes, in files that safetensors itself opens."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import octavo
from helpers import random_weights, same_bytes, threads_of_octavo, write_checkpoint
from octavo import dtypes, formats, schemes, sinks
from octavo.errors import CheckpointError, DeviceError, OctavoError, RecipeError

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "no_waiting_for_the_disk")

MIB = 1 << 20
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "torch_dtype": "bfloat16"}
CASES = [*(("compressed-tensors", scheme) for scheme in schemes.SCHEMES), ("fp8", "fp8_block")]
by_case = pytest.mark.parametrize(("format", "scheme"), CASES)
by_scheme = pytest.mark.parametrize("scheme", list(schemes.SCHEMES))


# -- sources ----------------------------------------------------------------------------------------------------------


def source_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Linear weights of even and ragged sides, one of them larger than a MiB, and everything that stays."""
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (256, 384),
        "model.layers.0.self_attn.k_proj.weight": (200, 160),  # ragged for 128, even for 32
        "model.layers.0.mlp.gate_proj.weight": (130, 257),  # ragged for all
        "model.layers.0.mlp.down_proj.weight": (1, 96),
        "model.layers.0.mlp.up_proj.weight": (77, 1),
        "model.layers.1.self_attn.o_proj.weight": (64, 128),
        "model.layers.1.mlp.gate_proj.weight": (1024, 1024),
        "model.layers.1.mlp.experts.0.up_proj.weight": (128, 256),
        "model.layers.1.mlp.experts.1.up_proj.weight": (128, 256),
    }
    tensors = {name: random_weights(shape, dtype, seed) for seed, (name, shape) in enumerate(shapes.items())}
    tensors["model.layers.0.self_attn.q_proj.weight"][3] = 0  # a group of zeros has the scale 1
    kept = {
        "model.embed_tokens.weight": (96, 256),
        "model.layers.0.input_layernorm.weight": (256,),
        "model.layers.0.self_attn.q_proj.bias": (256,),
        "model.layers.1.mlp.gate.weight": (2, 256),
        "lm_head.weight": (96, 256),
    }
    tensors |= {name: random_weights(shape, dtype, 100 + seed) for seed, (name, shape) in enumerate(kept.items())}
    return tensors


def is_quantized(name: str, tensor: Tensor, format: str, scheme: str) -> bool:
    """What octavo's documentation says of these names, in a few lines of its own."""
    if not name.endswith("_proj.weight") or tensor.ndim != 2 or not tensor.dtype.is_floating_point:
        return False
    if scheme == "mxfp8" and tensor.shape[1] % 32:
        return False
    return format != "fp8" or all(side <= 128 or side % 128 == 0 for side in tensor.shape)


def expected(tensors: dict[str, Tensor], format: str, scheme: str) -> dict[str, Tensor]:
    """What a conversion holds, by the whole-tensor definition."""
    result = {}
    for name, tensor in tensors.items():
        if not is_quantized(name, tensor, format, scheme):
            result[name] = tensor
            continue
        q, scale = schemes.quantize(tensor, scheme)
        stored = scale.view(torch.uint8) if scheme == "mxfp8" else scale
        result[name] = q
        result[name + ("_scale" if format == "compressed-tensors" else "_scale_inv")] = stored.reshape(
            (1,) if stored.ndim == 0 else stored.shape
        )
    return result


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder or file, read by safetensors itself."""
    tensors = {}
    for file in [folder] if folder.is_file() else sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if not same_bytes(found[name], wanted[name])] == []


def header_of(file: Path) -> tuple[dict[str, Any], int]:
    """The header, and where data begin."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), 8 + length


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def write_by_hand(file: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]], pad: int = 0) -> Path:
    """A safetensors file of any dtypes; ``pad`` more spaces in the header put the data on an odd address."""
    header, at = {}, 0
    for name, (dtype_name, shape, data) in tensors.items():
        header[name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + pad)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))
    return file


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def raw_tensor(file: Path, name: str) -> tuple[str, list[int], bytes]:
    header, base = header_of(file)
    begin, end = header[name]["data_offsets"]
    return header[name]["dtype"], header[name]["shape"], file.read_bytes()[base + begin : base + end]


@pytest.fixture(autouse=True)
def one_thread_of_torch() -> Iterator[None]:
    """Tests run beside each other: torch's own threads would wait for one another fifty times longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What outlasts a power cut is not asked here, and takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Layout -> path of a bf16 source: ``single`` folder, ``sharded`` folder (three files), or a lone ``file``."""
    root = tmp_path_factory.mktemp("sources")
    write_checkpoint(root / "single", source_tensors(), 1, CONFIG)
    write_checkpoint(root / "sharded", source_tensors(), 3, CONFIG)
    return lambda layout: root / ("single/model.safetensors" if layout == "file" else layout)


# -- what is written --------------------------------------------------------------------------------------------------


@by_case
@pytest.mark.parametrize("layout", ["single", "sharded", "file"])
def test_converted_checkpoint_holds_exactly_the_bytes_of_the_definition(
    sources: Callable[[str], Path], layout: str, format: str, scheme: str, tmp_path: Path
) -> None:
    source, dst = sources(layout), tmp_path / "out"
    octavo.convert(source, dst, scheme, format=format)
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
    octavo.convert(sources("sharded"), tmp_path / "out", scheme, format=format)
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
    octavo.convert(sources("sharded"), tmp_path / "out", "fp8_block")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        header, _ = header_of(file)
        held |= {name: file.name for name in header if name != "__metadata__"}
    assert index["weight_map"] == held
    tensors = read_all(tmp_path / "out").values()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors)


def test_each_shard_out_holds_the_tensors_of_one_shard_in(sources: Callable[[str], Path], tmp_path: Path) -> None:
    octavo.convert(sources("sharded"), tmp_path / "out")
    for file in sources("sharded").glob("*.safetensors"):
        before, _ = header_of(file)
        after, _ = header_of(tmp_path / "out" / file.name)
        assert {name for name in after if not name.endswith("_scale")} == set(before)


def test_shards_without_an_index_are_converted_with_one(sources: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, source_tensors(), 3, CONFIG)
    (source / "model.safetensors.index.json").unlink()
    octavo.convert(source, tmp_path / "out")
    octavo.convert(sources("sharded"), tmp_path / "indexed")
    assert digests(tmp_path / "out") == digests(tmp_path / "indexed")


@by_case
def test_config_says_how_the_weights_were_quantized(
    sources: Callable[[str], Path], format: str, scheme: str, tmp_path: Path
) -> None:
    octavo.convert(sources("single"), tmp_path / "out", scheme, format=format)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == CONFIG
    assert quantization["quant_method"] == format
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
        strategy = {"fp8_channel": "channel", "fp8_block": "block", "fp8_tensor": "tensor", "mxfp8": "group"}
        assert group["weights"]["strategy"] == strategy[scheme]


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
    octavo.convert(source / "model.safetensors" if as_file else source, tmp_path / "out")
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found == {*carried, "config.json", "model.safetensors"}
    assert all((tmp_path / "out" / name).read_bytes() == (source / name).read_bytes() for name in carried)


def test_lone_file_without_a_config_brings_no_neighbours(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", source_tensors(), 1) / "model.safetensors"
    (source.parent / "diary.txt").write_text("not of this model")
    octavo.convert(source, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert_same(read_all(tmp_path / "out"), expected(source_tensors(), "compressed-tensors", "fp8_channel"))


def test_conversion_without_a_config_can_be_verified(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", source_tensors(), 1)
    octavo.convert(source, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", source).ok


def test_source_is_left_as_it_was(sources: Callable[[str], Path], tmp_path: Path) -> None:
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in sources("sharded").iterdir()}
    octavo.convert(sources("sharded"), tmp_path / "out")
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in sources("sharded").iterdir()} == before


@by_scheme
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fp16_and_fp32_sources_are_quantized_from_their_own_values(
    dtype: torch.dtype, scheme: str, tmp_path: Path
) -> None:
    tensors = source_tensors(dtype)
    source = write_checkpoint(tmp_path / "source", tensors, 2, CONFIG)
    octavo.convert(source, tmp_path / "out", scheme)
    assert_same(read_all(tmp_path / "out"), expected(tensors, "compressed-tensors", scheme))
    assert octavo.verify(tmp_path / "out", source).ok


def test_conversion_without_a_scheme_copies_every_tensor(sources: Callable[[str], Path], tmp_path: Path) -> None:
    report = octavo.convert(sources("sharded"), tmp_path / "out", None)
    assert_same(read_all(tmp_path / "out"), source_tensors())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    assert octavo.verify(tmp_path / "out", sources("sharded")).ok
    assert not report.quantized


def test_ignored_weights_stay_and_readers_are_told(sources: Callable[[str], Path], tmp_path: Path) -> None:
    report = octavo.convert(sources("single"), tmp_path / "out", ignore=["model.layers.0"])
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
    octavo.convert(sources("sharded"), tmp_path / "out", recipe)
    tensors = source_tensors()
    experts = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
    wanted = expected(tensors, "compressed-tensors", "fp8_channel")
    assert_same(read_all(tmp_path / "out"), wanted | expected(experts, "compressed-tensors", "fp8_block"))
    assert octavo.verify(tmp_path / "out", sources("sharded")).ok
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {group["weights"]["strategy"] for group in groups.values()} == {"channel", "block"}


def test_report_counts_bytes_and_says_what_stayed(sources: Callable[[str], Path], tmp_path: Path) -> None:
    report = octavo.convert(sources("sharded"), tmp_path / "out", "mxfp8")
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
    assert any("vLLM can" in note for note in report.notes)


def test_a_conversion_that_quantizes_nothing_says_so(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "in", {"model.norm.weight": random_weights((64,), torch.bfloat16, 0)})
    note = "no weight becomes FP8: see what is kept, and why"
    assert note in octavo.convert(source, tmp_path / "a").notes
    assert note not in octavo.convert(source, tmp_path / "b", None).notes


def test_progress_rises_to_all_bytes(sources: Callable[[str], Path], tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    report = octavo.convert(sources("sharded"), tmp_path / "out", progress=lambda done, of: calls.append((done, of)))
    assert calls == sorted(calls)
    assert calls[-1] == (report.source_bytes, report.source_bytes)


# -- the same bytes however they are made -----------------------------------------------------------------------------


@by_case
def test_files_do_not_depend_on_threads_or_staging(
    sources: Callable[[str], Path], format: str, scheme: str, tmp_path: Path
) -> None:
    wanted = None
    for number, (threads, staging) in enumerate(
        [(None, 256 * MIB), (1, MIB), (2, 3 * MIB), (7, 3 * MIB), (16, 64 * MIB)]
    ):
        dst = tmp_path / str(number)
        octavo.convert(sources("sharded"), dst, scheme, format=format, threads=threads, staging_bytes=staging)
        wanted = wanted or digests(dst)
        assert digests(dst) == wanted, (threads, staging)


def test_staging_stays_within_its_budget(sources: Callable[[str], Path], tmp_path: Path) -> None:
    for staging in (MIB, 5 * MIB, 256 * MIB):
        report = octavo.convert(sources("single"), tmp_path / str(staging), staging_bytes=staging)
        assert report.staging_bytes <= staging


def test_staging_below_a_mebibyte_is_refused(sources: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="1 MiB"):
        octavo.convert(sources("single"), tmp_path / "out", staging_bytes=MIB - 1)
    assert not (tmp_path / "out").exists()


def test_more_threads_than_staging_has_room_for_are_refused(sources: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="10000 threads need staging_bytes of at least"):
        octavo.convert(sources("single"), tmp_path / "out", threads=10_000, staging_bytes=MIB)
    assert not (tmp_path / "out").exists()


def test_zero_threads_are_refused(sources: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="at least 1"):
        octavo.convert(sources("single"), tmp_path / "out", threads=0)


@pytest.mark.parametrize("pad", range(8))
def test_source_data_may_lie_at_any_address(pad: int, tmp_path: Path) -> None:
    tensors = source_tensors()
    entries = {name: (dtypes.NAMES[t.dtype], tuple(t.shape), raw_bytes(t)) for name, t in tensors.items()}
    source = write_by_hand(tmp_path / "source" / "model.safetensors", entries, pad)
    octavo.convert(source, tmp_path / "out", "mxfp8")
    assert_same(read_all(tmp_path / "out"), expected(tensors, "compressed-tensors", "mxfp8"))


@pytest.mark.parametrize("name", ["a b.weight", 'quo"te\\.weight', "größe.層.weight", "x" * 300 + ".weight", ".weight"])
def test_any_name_survives(name: str, tmp_path: Path) -> None:
    tensors = {name: random_weights((8, 32), torch.bfloat16, 0)}
    source = write_checkpoint(tmp_path / "source", tensors, 1, CONFIG)
    octavo.convert(source, tmp_path / "out")
    q, scale = schemes.quantize(tensors[name], "fp8_channel")
    assert_same(read_all(tmp_path / "out"), {name: q, f"{name}_scale": scale})
    assert octavo.verify(tmp_path / "out", source).ok


# -- what is no matrix of bf16 ----------------------------------------------------------------------------------------

_TORCH_NAMED = [name for name, dtype in dtypes.TORCH.items() if dtype is not None]
_TORCHLESS = [name for name, dtype in dtypes.TORCH.items() if dtype is None]


def _of_every_dtype(dtype_names: list[str]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """``odd.F4``: 6 x 8 elements of every bit pattern that comes, beside one weight that is quantized."""
    weight = random_weights((64, 64), torch.bfloat16, 1)
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {"a.up_proj.weight": ("BF16", (64, 64), raw_bytes(weight))}
    for number, dtype_name in enumerate(dtype_names):
        data = bytes(
            (7 * i + number) % (2 if dtype_name == "BOOL" else 256) for i in range(48 * dtypes.BITS[dtype_name] // 8)
        )
        tensors[f"odd.{dtype_name}"] = (dtype_name, (6, 8), data)
        # named and shaped like a linear layer's weight; floats among them are of course quantized
        if dtypes.TORCH[dtype_name] not in dtypes.QUANTIZABLE:
            tensors[f"b.{dtype_name}.up_proj.weight"] = (dtype_name, (6, 8), data)
    return tensors


@pytest.mark.parametrize("kind", ["torch has them", "torch lacks them"])
def test_other_dtypes_pass_through_byte_for_byte(kind: str, tmp_path: Path) -> None:
    entries = _of_every_dtype(_TORCH_NAMED if kind == "torch has them" else _TORCHLESS)
    source = write_by_hand(tmp_path / "source" / "model.safetensors", entries)
    (source.parent / "config.json").write_text(json.dumps(CONFIG))
    report = octavo.convert(source, tmp_path / "out")
    for name, (dtype_name, shape, data) in entries.items():
        if name != "a.up_proj.weight":
            assert raw_tensor(tmp_path / "out" / "model.safetensors", name) == (dtype_name, list(shape), data)
    assert report.quantized["fp8_channel"][0] == 1
    if kind == "torch lacks them":
        assert {reason.split(",")[0] for reason in report.kept} == set(_TORCHLESS)


def test_dtypes_that_torch_has_can_be_verified_and_streamed(tmp_path: Path) -> None:
    entries = _of_every_dtype(_TORCH_NAMED)
    source = write_by_hand(tmp_path / "source" / "model.safetensors", entries)
    (source.parent / "config.json").write_text(json.dumps(CONFIG))
    octavo.convert(source, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", source).ok
    for name, tensor in octavo.stream(source):
        if name in entries and name != "a.up_proj.weight":
            assert (dtypes.NAMES[tensor.dtype], tuple(tensor.shape), raw_bytes(tensor)) == entries[name]


@pytest.mark.parametrize("dtype_name", _TORCHLESS)
def test_dtypes_that_torch_lacks_can_be_verified(dtype_name: str, tmp_path: Path) -> None:
    source = write_by_hand(tmp_path / "source" / "model.safetensors", _of_every_dtype([dtype_name]))
    (source.parent / "config.json").write_text(json.dumps(CONFIG))
    octavo.convert(source, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", source).ok


@pytest.mark.parametrize("dtype_name", _TORCHLESS)
def test_dtypes_that_torch_lacks_are_streamed_as_bytes_or_refused(dtype_name: str, tmp_path: Path) -> None:
    entries = _of_every_dtype([dtype_name])
    source = write_by_hand(tmp_path / "source" / "model.safetensors", entries)
    try:
        streamed = dict(octavo.stream(source))
    except OctavoError as error:
        assert dtype_name in str(error)  # noqa: PT017
    else:
        assert raw_bytes(streamed[f"odd.{dtype_name}"]) == entries[f"odd.{dtype_name}"][2]


def test_expert_stacks_stay_and_the_report_says_why(tmp_path: Path) -> None:
    stacks = {
        "model.layers.0.mlp.experts.gate_up_proj": random_weights((4, 64, 96), torch.bfloat16, 1),
        "model.layers.0.mlp.experts.down_proj": random_weights((4, 96, 32), torch.bfloat16, 2),
        "model.layers.0.self_attn.q_proj.weight": random_weights((64, 64), torch.bfloat16, 3),
    }
    source = write_checkpoint(tmp_path / "source", stacks, 1, CONFIG)
    report = octavo.convert(source, tmp_path / "out")
    assert_same(
        {name: tensor for name, tensor in read_all(tmp_path / "out").items() if "experts" in name},
        {name: tensor for name, tensor in stacks.items() if "experts" in name},
    )
    ((reason, (count, _)),) = report.kept.items()
    assert "expert stack" in reason
    assert "3-D" in reason
    assert count == 2
    assert "expert stack" in report.table()
    assert octavo.verify(tmp_path / "out", source).ok


def test_transposed_expert_stacks_stay_too(tmp_path: Path) -> None:
    stacks = {"model.layers.0.mlp.experts.gate_up_proj": random_weights((4, 64, 96), torch.bfloat16, 1)}
    source = write_checkpoint(tmp_path / "source", stacks, 1, {"model_type": "gpt_oss"})
    report = octavo.convert(source, tmp_path / "out")
    assert_same(read_all(tmp_path / "out"), stacks)
    assert [reason for reason in report.kept if "expert stack" in reason]
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_ragged_sides_stay_in_the_fp8_format_and_the_report_says_why(
    sources: Callable[[str], Path], tmp_path: Path
) -> None:
    report = octavo.convert(sources("single"), tmp_path / "out", "fp8_block", format="fp8")
    reasons = " | ".join(report.kept)
    for sides in ("200x160", "130x257"):
        assert f"{sides}: readers of the fp8 format" in reasons
    found = read_all(tmp_path / "out")
    assert found["model.layers.0.self_attn.k_proj.weight"].dtype == torch.bfloat16
    assert "model.layers.0.self_attn.k_proj.weight_scale_inv" not in found


def test_empty_and_scalar_tensors_pass_through(tmp_path: Path) -> None:
    tensors = {
        "a.up_proj.weight": random_weights((32, 32), torch.bfloat16, 1),
        "empty.up_proj.weight": torch.zeros(0, 32, dtype=torch.bfloat16),
        "wide.up_proj.weight": torch.zeros(32, 0, dtype=torch.bfloat16),
        "none": torch.zeros(0),
        "empty.experts.gate_up_proj": torch.zeros(3, 0, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "counter": torch.tensor(7, dtype=torch.int64),
        "z.last": torch.zeros(5, 0, 2, dtype=torch.uint8),
    }
    source = write_checkpoint(tmp_path / "source", tensors, 1, CONFIG)
    octavo.convert(source, tmp_path / "out")
    q, scale = schemes.quantize(tensors["a.up_proj.weight"], "fp8_channel")
    wanted = {**tensors, "a.up_proj.weight": q, "a.up_proj.weight_scale": scale}
    assert_same(read_all(tmp_path / "out"), wanted)
    assert octavo.verify(tmp_path / "out", source).ok
    assert_same(dict(octavo.stream(source)), wanted)


def test_shard_without_tensors_passes_through(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, {"a.up_proj.weight": random_weights((32, 32), torch.bfloat16, 1)}, 1, CONFIG)
    (source / "model.safetensors").rename(source / "model-00001-of-00002.safetensors")
    write_by_hand(source / "model-00002-of-00002.safetensors", {})
    octavo.convert(source, tmp_path / "out")
    assert octavo.verify(tmp_path / "out", source).ok


def test_scale_name_that_the_source_already_uses_is_refused(tmp_path: Path) -> None:
    tensors = {
        "a.up_proj.weight": random_weights((32, 32), torch.bfloat16, 1),
        "a.up_proj.weight_scale": torch.ones(1),
    }
    source = write_checkpoint(tmp_path / "source", tensors, 1, CONFIG)
    with pytest.raises(OctavoError, match="weight_scale"):
        octavo.convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_tensor", "mxfp8"])
def test_format_that_lacks_the_scheme_says_which_has_it(
    sources: Callable[[str], Path], scheme: str, tmp_path: Path
) -> None:
    for call in (
        lambda: octavo.convert(sources("single"), tmp_path / "out", scheme, format="fp8"),
        lambda: octavo.stream(sources("single"), scheme, format="fp8"),
        lambda: octavo.plan(sources("single"), scheme, format="fp8", model=False),
    ):
        with pytest.raises(RecipeError, match=f"no {scheme}, only fp8_block.*compressed-tensors"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_unknown_format_lists_the_known_ones(sources: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown format 'gguf'; known: compressed-tensors, fp8"):
        octavo.convert(sources("single"), tmp_path / "out", format="gguf")
    assert list(tmp_path.iterdir()) == []


@by_case
def test_converted_checkpoint_is_not_quantized_twice(
    sources: Callable[[str], Path], format: str, scheme: str, tmp_path: Path
) -> None:
    octavo.convert(sources("single"), tmp_path / "once", scheme, format=format)
    with pytest.raises(RecipeError, match="already quantized"):
        octavo.convert(tmp_path / "once", tmp_path / "twice", scheme)
    assert not (tmp_path / "twice").exists()


def test_pattern_that_matches_nothing_is_refused(sources: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="matches no tensor"):
        octavo.convert(sources("single"), tmp_path / "out", ignore=["model.layers.9"])


# -- iterating --------------------------------------------------------------------------------------------------------


@by_case
@pytest.mark.parametrize("layout", ["single", "sharded", "file"])
def test_stream_yields_what_convert_writes(
    sources: Callable[[str], Path], layout: str, format: str, scheme: str, tmp_path: Path
) -> None:
    octavo.convert(sources(layout), tmp_path / "out", scheme, format=format)
    pairs = list(octavo.stream(sources(layout), scheme, format=format))
    assert len(pairs) == len(dict(pairs))
    assert_same(dict(pairs), read_all(tmp_path / "out"))


def test_stream_keeps_file_order_and_a_scale_follows_its_weight(sources: Callable[[str], Path]) -> None:
    order = []
    for file in sorted(sources("sharded").glob("*.safetensors")):
        header, _ = header_of(file)
        entries = [(entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__"]
        order += [name for _, name in sorted(entries)]
    wanted = []
    for name in order:
        wanted += [name, f"{name}_scale"] if name.endswith("_proj.weight") else [name]
    assert [name for name, _ in octavo.stream(sources("sharded"))] == wanted


@by_scheme
def test_stream_does_not_depend_on_threads_or_staging(sources: Callable[[str], Path], scheme: str) -> None:
    wanted = dict(octavo.stream(sources("sharded"), scheme))
    for threads, staging in [(1, MIB), (5, 2 * MIB)]:
        assert_same(dict(octavo.stream(sources("sharded"), scheme, threads=threads, staging_bytes=staging)), wanted)


def test_streamed_tensors_belong_to_the_caller(sources: Callable[[str], Path]) -> None:
    wanted = expected(source_tensors(), "compressed-tensors", "fp8_channel")
    kept = {}
    for name, tensor in octavo.stream(sources("single"), staging_bytes=MIB, threads=2):
        assert same_bytes(tensor, wanted[name])
        kept[name] = tensor.clone()
        tensor.view(torch.uint8).fill_(0xFF)  # does no harm to what comes
    assert_same(kept, wanted)


@pytest.mark.parametrize("threads", [1, 2])
def test_stream_runs_ahead_by_no_more_than_the_staging_budget(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"layers.{i:02d}.up_proj.weight": random_weights((512, 512), torch.bfloat16, i) for i in range(32)}
    source = write_checkpoint(tmp_path / "source", tensors, 2)
    allocated = 0
    original = sinks.Storage.allocate.__func__

    def allocate(cls: type[sinks.Storage], placement: Any) -> sinks.Storage:
        nonlocal allocated
        allocated += placement.final_bytes
        return original(cls, placement)

    monkeypatch.setattr(sinks.Storage, "allocate", classmethod(allocate))
    taken = 0
    for count, (_, tensor) in enumerate(octavo.stream(source, staging_bytes=MIB, threads=threads)):
        taken += tensor.nbytes
        if count % 16 == 0:
            _settle(lambda: allocated)
        # one pair has been handed out, and its scale may still be to come
        assert allocated - taken <= MIB + 4 * 512
    assert allocated == taken == 32 * (512 * 512 + 4 * 512)


def _settle(value: Callable[[], int]) -> None:
    """Wait until nothing happens any more: the reader has run as far ahead as it may."""
    for _ in range(50):
        before = value()
        time.sleep(0.02)
        if value() == before:
            return


def test_tensor_larger_than_the_staging_budget_is_streamed(tmp_path: Path) -> None:
    tensors = {f"layers.{i}.up_proj.weight": random_weights((1024, 2048), torch.bfloat16, i) for i in range(3)}
    source = write_checkpoint(tmp_path / "source", tensors)
    assert_same(
        dict(octavo.stream(source, "fp8_tensor", staging_bytes=MIB)),
        expected(tensors, "compressed-tensors", "fp8_tensor"),
    )


@pytest.mark.parametrize("after", [0, 1, 2, 9])
def test_stream_closed_early_ends_its_threads_and_closes_its_files(sources: Callable[[str], Path], after: int) -> None:
    iterator = octavo.stream(sources("sharded"), staging_bytes=MIB, threads=2)
    assert isinstance(iterator, Iterator)
    for _ in range(after):
        next(iterator)
    iterator.close()
    assert threads_of_octavo() == []


def test_stream_that_nobody_asks_starts_no_thread(sources: Callable[[str], Path]) -> None:
    iterator = octavo.stream(sources("sharded"))
    assert threads_of_octavo() == []
    del iterator


def test_error_in_the_consumer_ends_the_stream(sources: Callable[[str], Path]) -> None:
    def consume() -> None:
        for _ in octavo.stream(sources("sharded"), staging_bytes=MIB):
            raise KeyError("the consumer's own")

    with pytest.raises(KeyError):
        consume()
    assert threads_of_octavo() == []


def test_stream_reports_progress_to_the_end(sources: Callable[[str], Path]) -> None:
    calls: list[tuple[int, int]] = []
    list(octavo.stream(sources("single"), progress=lambda done, of: calls.append((done, of))))
    total = sum(tensor.nbytes for tensor in source_tensors().values())
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


def test_stream_finds_what_headers_tell_before_the_first_tensor(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", source_tensors(), 3, CONFIG)
    file = source / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        octavo.stream(source)


# -- the same engine as loading ---------------------------------------------------------------------------------------


@by_scheme
def test_loaded_linear_weights_are_the_converted_ones(scheme: str, tmp_path: Path) -> None:
    from _models import make_checkpoint, state_of

    source = make_checkpoint("llama", tmp_path / "source")
    octavo.convert(source, tmp_path / "out", scheme)
    written, state = read_all(tmp_path / "out"), state_of(octavo.load(source, scheme))
    compared = 0
    for name, tensor in written.items():
        if name.endswith("_scale") or f"{name}_scale" not in written:
            continue
        scale = written[f"{name}_scale"]
        assert same_bytes(state[name], tensor), name
        loaded = state[f"{name}_scale"]
        assert torch.equal(loaded.reshape(-1).view(torch.uint8), scale.reshape(-1).view(torch.uint8)), name
        compared += 1
    # of 2 x 7 layers, mxfp8 readers take none of these sides, so that nothing is left to compare
    assert compared == (0 if scheme == "mxfp8" else 14)


@by_scheme
def test_loaded_expert_stacks_are_the_converted_experts(scheme: str, tmp_path: Path) -> None:
    from _models import make_checkpoint, state_of

    source = make_checkpoint("qwen3_moe", tmp_path / "source", moe_intermediate_size=160, hidden_size=64)
    octavo.convert(source, tmp_path / "out", scheme)
    written, state = read_all(tmp_path / "out"), state_of(octavo.load(source, scheme))

    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    for layer in (0, 1):
        prefix = f"model.layers.{layer}.mlp.experts"
        for stack, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            weight, scale = state[f"{prefix}.{stack}"], state[f"{prefix}.{stack}_scale"]
            for expert in range(weight.shape[0]):
                names = [f"{prefix}.{expert}.{part}.weight" for part in parts]
                assert torch.equal(bits(weight[expert]), torch.cat([bits(written[name]) for name in names]))
                assert torch.equal(bits(scale[expert]), torch.cat([bits(written[f"{name}_scale"]) for name in names]))


# -- verifying --------------------------------------------------------------------------------------------------------


@by_case
def test_verify_reports_each_tensor_with_its_scheme_and_error(
    sources: Callable[[str], Path], format: str, scheme: str, tmp_path: Path
) -> None:
    octavo.convert(sources("sharded"), tmp_path / "out", scheme, format=format)
    report = octavo.verify(tmp_path / "out", sources("sharded"))
    tensors = source_tensors()
    assert {result.name for result in report.tensors} == set(tensors)
    for result in report.tensors:
        assert result.equal
        quantized = is_quantized(result.name, tensors[result.name], format, scheme)
        # of one row and fewer than 128 columns, a block is a row: its scale does not tell which it was
        alike = {"fp8_channel", "fp8_block"} if tensors[result.name].shape[0] == 1 else set()
        assert result.scheme == (scheme if quantized else None) or {scheme, result.scheme} <= alike
        if not quantized:
            assert result.error_db is None
            continue
        q, scale = schemes.quantize(tensors[result.name], scheme)
        wanted = schemes.error_db(tensors[result.name], schemes.dequantize(q, scale, scheme))
        assert result.error_db == pytest.approx(wanted, abs=0.01)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_verify_works_block_by_block(
    sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo import verify as function

    monkeypatch.setitem(function.__globals__, "_BLOCK_ELEMENTS", 1 << 15)
    for format, scheme in CASES:
        octavo.convert(sources("single"), tmp_path / f"{format}-{scheme}", scheme, format=format)
        assert octavo.verify(tmp_path / f"{format}-{scheme}", sources("single")).ok


def test_verify_against_another_model_names_the_tensors(sources: Callable[[str], Path], tmp_path: Path) -> None:
    octavo.convert(sources("single"), tmp_path / "out")
    tensors = source_tensors()
    tensors["model.extra.weight"] = tensors.pop("lm_head.weight")
    tensors["model.embed_tokens.weight"] = torch.zeros(5, 5, dtype=torch.bfloat16)
    other = write_checkpoint(tmp_path / "other", tensors, 1, CONFIG)
    with pytest.raises(CheckpointError) as caught:
        octavo.verify(tmp_path / "out", other)
    for part in (
        "lm_head.weight: not in",
        "model.extra.weight: in",
        "model.embed_tokens.weight: [96, 256] here, [5, 5]",
    ):
        assert part in str(caught.value)


def test_every_format_is_tried_here() -> None:
    assert {format for format, _ in CASES} == set(formats.NAMES)
    assert len(CASES) == sum(len(formats.get(name).schemes) for name in formats.NAMES)
