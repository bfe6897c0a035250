"""Checkpoints in FP8 blocks, as DeepSeek's are, read as if they were bf16; and passed through where they may be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import octavo
from helpers import random_weights, same_bytes, write_checkpoint
from helpers.coded import FINE_GRAINED, coding_of, decoded, encoded, fine_grained, write_coded
from octavo.checkpoint.codings import Decoding
from octavo.errors import CheckpointError, OutputError, WeightError
from octavo.numerics import schemes
from octavo.planning.budget import Budget
from octavo.planning.chunks import cut_placement
from octavo.planning.coded import requantized
from octavo.planning.plan import plan_checkpoint
from octavo.planning.recipe import Recipe

SHAPES = {
    "model.embed_tokens.weight": (64, 260),
    "model.layers.0.self_attn.q_proj.weight": (300, 260),
    "model.layers.0.mlp.up_proj.weight": (128, 260),
    "model.layers.0.mlp.down_proj.weight": (260, 128),
    "model.norm.weight": (260,),
}
UP = "model.layers.0.mlp.up_proj.weight"


def write(
    folder: Path, hidden: int = 260, change: Callable[[dict[str, Tensor]], object] = lambda stored: None
) -> dict[str, Tensor]:
    """A checkpoint whose last shard has scales of all others; returns what is stored."""
    sizes = {name: [hidden if side == 260 else side for side in shape] for name, shape in SHAPES.items()}
    if hidden % 128 == 0:
        sizes["model.layers.0.self_attn.q_proj.weight"][0] = 384
    weights = {name: random_weights(shape, torch.bfloat16, n) for n, (name, shape) in enumerate(sizes.items())}
    stored = fine_grained(weights)
    change(stored)
    ordered = dict(sorted(stored.items(), key=lambda item: item[0].endswith("_scale_inv")))
    config = {"hidden_size": 260, "quantization_config": FINE_GRAINED, "text_config": {"quantization_config": {}}}
    write_checkpoint(folder, ordered, shards=2, config=config)
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8_PB_WO"}}')
    return stored


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_tensor", None])
def test_bytes_are_those_of_what_the_source_stands_for(scheme: str | None, tmp_path: Path) -> None:
    weights = decoded(write(tmp_path / "source"))
    octavo.convert(tmp_path / "source", tmp_path / "out", scheme)
    made = tensors_of(tmp_path / "out")
    for name, weight in weights.items():
        if scheme is None or f"{name}_scale" not in made:
            assert same_bytes(made[name], weight.bfloat16()), name
            continue
        q, scale = schemes.quantize(weight, scheme)
        assert same_bytes(made[name], q), name
        assert same_bytes(made[f"{name}_scale"], scale.reshape(made[f"{name}_scale"].shape)), name
    assert not any(name.endswith("_scale_inv") for name in made)
    streamed = dict(octavo.stream(tmp_path / "source", scheme, staging_bytes=1 << 20))
    assert streamed.keys() == made.keys()
    assert all(same_bytes(tensor, made[name]) for name, tensor in streamed.items())
    assert octavo.verify(tmp_path / "out", against=tmp_path / "source").ok


@pytest.mark.parametrize(("format", "hidden"), [("fp8", 256), ("compressed-tensors", 260)])
def test_blocks_pass_through_as_blocks(format: str, hidden: int, tmp_path: Path) -> None:
    stored = write(tmp_path / "source", hidden)
    report = octavo.convert(tmp_path / "source", tmp_path / "out", "fp8_block", format=format)
    assert report.passed_through == report.quantized
    assert report.quantized["fp8_block"][0] == 3
    made = tensors_of(tmp_path / "out")
    end = "_scale_inv" if format == "fp8" else "_scale"
    assert all(same_bytes(tensor, made[name.replace("_scale_inv", end)]) for name, tensor in stored.items())
    verified = octavo.verify(tmp_path / "out", against=tmp_path / "source")
    assert verified.ok
    assert sum("passed through" in line for line in verified.lines()) == 3
    made[UP].view(torch.uint8)[3, 7] ^= 1
    write_checkpoint(tmp_path / "spoiled", made, config=json.loads((tmp_path / "out/config.json").read_text()))
    assert [one.name for one in octavo.verify(tmp_path / "spoiled", against=tmp_path / "source").different] == [UP]
    assert "linear, passed through" in str(octavo.plan(tmp_path / "source", "fp8_block", model=False))


@pytest.mark.parametrize("hidden", [32, 132])
def test_packed_int8_passes_through_as_int8(hidden: int, tmp_path: Path) -> None:
    """What octavo writes as int8, it reads again as what it was."""
    weights = {
        f"model.layers.{n}.mlp.up_proj.weight": random_weights((300, hidden), torch.bfloat16, n) for n in range(3)
    }
    write_checkpoint(tmp_path / "source", weights, 2, {"model_type": "any"})
    octavo.convert(tmp_path / "source", tmp_path / "packed", "int8_channel", prove=False)
    for format in ("compressed-tensors", "compressed-tensors-w8a8"):
        again = tmp_path / format
        how = {"format": format, "prove": False, "staging_bytes": 1 << 20}
        report = octavo.convert(tmp_path / "packed", again, "int8_channel", **how)
        assert report.passed_through == report.quantized
        assert report.quantized["int8_channel"][0] == 3
        assert octavo.verify(again, against=tmp_path / "packed").ok
        assert octavo.verify(again, against=tmp_path / "source").ok
    made = tensors_of(tmp_path / "packed")
    assert all(same_bytes(tensor, made[name]) for name, tensor in tensors_of(tmp_path / "compressed-tensors").items())


def test_a_plan_tells_where_another_scheme_would_keep_bytes(tmp_path: Path) -> None:
    write(tmp_path / "source")
    notes = octavo.plan(tmp_path / "source", "fp8_channel", model=False).notes
    said = "3 tensors are FP8 in blocks of 128x128 already, and fp8_channel rounds them a second time, where fp8_block "
    assert [note for note in notes if note.startswith(said)]
    assert not octavo.plan(tmp_path / "source", "fp8_block", model=False).notes


@pytest.mark.parametrize(
    ("parts", "declared", "said"),
    [
        ({"weight_scale": torch.ones(1)}, {"strategy": "tensor"}, "int8 with a scale for each matrix"),
        (
            {"weight_scale": torch.ones(32, 1), "weight_zero_point": torch.ones(32, 1, dtype=torch.int8)},
            {"strategy": "channel", "symmetric": False},
            "int8 with a scale for each row and zero points",
        ),
    ],
)
def test_a_plan_tells_what_is_rounded_a_second_time_whatever_the_scheme(
    parts: dict[str, Tensor], declared: dict[str, object], said: str, tmp_path: Path
) -> None:
    module = UP.removesuffix("weight")
    stored = {UP: torch.full((32, 64), 7, dtype=torch.int8), **{module + name: part for name, part in parts.items()}}
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", **declared}}
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"a": group}}
    write_checkpoint(tmp_path / "source", stored, config={"quantization_config": config})
    for scheme, end in (("auto", "; int8_channel is nearer to them"), ("int8_channel", "")):
        plan = octavo.plan(tmp_path / "source", scheme, model=False)
        (placement,) = plan.quantized
        note = f"1 tensors are {said} already, and {placement.scheme} rounds them a second time, as any would{end}"
        assert list(plan.notes) == [note]
    assert not octavo.plan(tmp_path / "source", None, model=False).notes


@pytest.mark.parametrize(
    ("decoding", "seed", "exact"),
    [
        (Decoding("float8", 1, 32), 2, ("fp8_channel", "fp8_block")),  # MXFP8
        (Decoding("e2m1", 1, 32), 0, ("fp8_channel", "fp8_block", "mxfp8")),  # MXFP4
        (Decoding("e2m1", 1, 16), 1, ()),  # NVFP4
        (Decoding("float8", 128, 128), 2, ("fp8_channel", "mxfp8")),  # blocks, with powers of two
        (Decoding("float8", 128, 128), 0, ()),
    ],
    ids=str,
)
def test_a_plan_has_a_note_just_where_numbers_may_change(
    decoding: Decoding, seed: int, exact: tuple[str, ...], tmp_path: Path
) -> None:
    coding = coding_of("a.weight", (256, 256), decoding)
    checkpoint, _ = write_coded(tmp_path, {"a.weight": (coding, encoded(coding, seed))})
    for scheme in ("fp8_channel", "fp8_block", "mxfp8", "int8_channel"):
        plan = plan_checkpoint(checkpoint, Recipe(scheme))
        (placement,) = plan.placements
        told = any(f"{scheme} rounds them a second time" in note for note in plan.notes)
        assert told == (scheme not in exact and not placement.passed), scheme


@pytest.mark.parametrize(
    ("decoding", "offered", "end"),
    [
        (Decoding("float8", None, None), ("fp8_channel", "fp8_tensor"), ", where fp8_tensor would keep their bytes"),
        (Decoding("float8", None, None), ("fp8_channel",), ", as any would"),
        (Decoding("int8", 1, 32), ("fp8_channel", "int8_channel"), ", as any would; int8_channel is nearer to them"),
        (Decoding("int8", 1, 32), ("fp8_channel",), ", as any would"),
    ],
)
def test_a_note_names_no_scheme_that_is_not_offered(
    decoding: Decoding, offered: tuple[str, ...], end: str, tmp_path: Path
) -> None:
    coding = coding_of("a.weight", (256, 256), decoding)
    checkpoint, _ = write_coded(tmp_path, {"a.weight": (coding, encoded(coding, 0))})
    (note,) = requantized(plan_checkpoint(checkpoint, Recipe("fp8_channel")).placements, offered)
    assert note.endswith(f"fp8_channel rounds them a second time{end}")


def interrupt(source: Path, dst: Path) -> None:
    """Convert, and stop when all has been read."""

    def stop(done: int, total: int) -> None:
        if done == total:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        octavo.convert(source, dst, "fp8_channel", progress=stop)


def test_a_conversion_goes_on_where_it_was(tmp_path: Path) -> None:
    write(tmp_path / "source")
    interrupt(tmp_path / "source", tmp_path / "out")
    assert (tmp_path / "out.partial").exists()
    octavo.convert(tmp_path / "source", tmp_path / "out", "fp8_channel")
    octavo.convert(tmp_path / "source", tmp_path / "again", "fp8_channel", staging_bytes=1 << 20, threads=1)
    again = tensors_of(tmp_path / "again")
    assert all(same_bytes(tensor, again[name]) for name, tensor in tensors_of(tmp_path / "out").items())


def test_a_source_that_is_declared_otherwise_meanwhile_is_another(tmp_path: Path) -> None:
    """The same number of blocks may be of 128 rows and of 129."""
    write(tmp_path / "source")
    interrupt(tmp_path / "source", tmp_path / "out")
    (tmp_path / "source/hf_quant_config.json").unlink()
    declared = {**FINE_GRAINED, "weight_block_size": [129, 128]}
    (tmp_path / "source/config.json").write_text(json.dumps({"quantization_config": declared}))
    with pytest.raises(OutputError, match="with another layout"):
        octavo.convert(tmp_path / "source", tmp_path / "out", "fp8_channel")


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", None])
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (UP, float("nan"), f"tensor '{UP}' holds nan (at [2, 3])"),
        (f"{UP}_scale_inv", float("nan"), f"tensor '{UP}_scale_inv': a scale is nan, at [0, 1]"),
        (f"{UP}_scale_inv", -1.0, f"tensor '{UP}_scale_inv': a scale is -1, at [0, 1]"),
        (f"{UP}_scale_inv", float("inf"), f"tensor '{UP}_scale_inv': a scale is inf, at [0, 1]"),
    ],
)
def test_what_is_no_weight_is_named(scheme: str | None, name: str, value: float, says: str, tmp_path: Path) -> None:
    def spoil(stored: dict[str, Tensor]) -> None:
        stored[name][(2, 3) if name == UP else (0, 1)] = value

    write(tmp_path / "source", change=spoil)
    if scheme is None and name == UP:  # what is not quantized may be anything
        octavo.convert(tmp_path / "source", tmp_path / "out", scheme)
        return
    with pytest.raises(WeightError) as error:
        octavo.convert(tmp_path / "source", tmp_path / "out", scheme)
    assert says in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["fp8_channel", None])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-42])
def test_a_global_scale_that_is_none_is_named(scheme: str | None, value: float, tmp_path: Path) -> None:
    module = UP.removesuffix(".weight")
    stored = {
        UP: torch.randint(0, 256, (16, 32), dtype=torch.uint8),
        f"{module}.weight_scale": torch.ones(16, 4).to(torch.float8_e4m3fn),
        f"{module}.weight_scale_2": torch.tensor(value),
    }
    declared = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    write_checkpoint(tmp_path / "source", stored, config={"quantization_config": declared})
    if value == 1e-42:  # small, and a number
        octavo.convert(tmp_path / "source", tmp_path / "out", scheme)
        return
    with pytest.raises(WeightError, match=rf"tensor '{module}.weight_scale_2': a scale is "):
        octavo.convert(tmp_path / "source", tmp_path / "out", scheme)


def test_a_scale_that_makes_weights_without_bounds_is_named(tmp_path: Path) -> None:
    write(tmp_path / "source", change=lambda stored: stored[f"{UP}_scale_inv"].fill_(3e38))
    with pytest.raises(WeightError, match=rf"tensor '{UP}_scale_inv': weights have a scale of 3e\+38 by it"):
        octavo.convert(tmp_path / "source", tmp_path / "out", None)


@pytest.mark.parametrize("format", ["compressed-tensors", "compressed-tensors-w8a8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_passes_through_whatever_its_scales_are(dtype: torch.dtype, format: str, tmp_path: Path) -> None:
    """They are written in a dtype that holds them."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, (32, 64), generator=generator, dtype=torch.int8)
    scale = (torch.rand(32, 1, generator=generator) + 0.1).to(dtype)
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights}
    declared = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"a": group}}
    stored = {UP: codes, f"{UP}_scale": scale}
    write_checkpoint(tmp_path / "source", stored, config={"quantization_config": declared})
    plan = octavo.plan(tmp_path / "source", model=False)  # where no scheme is named
    assert [p.scheme for p in plan.quantized] == ["int8_channel"]
    assert "it stays so (int8_channel), since any other scheme would round a second time" in str(plan)
    assert "linear, passed through" in str(plan)
    report = octavo.convert(tmp_path / "source", tmp_path / "out", format=format)
    assert report.passed_through == report.quantized
    assert report.quantized["int8_channel"][0] == 1
    made, packed = tensors_of(tmp_path / "out"), format == "compressed-tensors"
    assert same_bytes(made[f"{UP}_scale"], scale if packed and dtype == torch.bfloat16 else scale.float())
    if not packed:
        assert same_bytes(made[UP], codes)
    streamed = dict(octavo.stream(tmp_path / "source", format=format))
    assert streamed.keys() == made.keys()
    assert all(same_bytes(tensor, made[name]) for name, tensor in streamed.items())
    assert octavo.verify(tmp_path / "out", against=tmp_path / "source").ok
    octavo.convert(tmp_path / "out", tmp_path / "bf16", None)
    assert same_bytes(tensors_of(tmp_path / "bf16")[UP], (codes.float() * scale.float()).bfloat16())
    spoiled = dict(made)
    spoiled[f"{UP}_scale"] = made[f"{UP}_scale"] * 1.125
    write_checkpoint(tmp_path / "spoiled", spoiled, config=json.loads((tmp_path / "out/config.json").read_text()))
    assert not octavo.verify(tmp_path / "spoiled", against=tmp_path / "source").ok


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    name = f"{UP.removesuffix('.weight')}.input_scale"
    write(tmp_path / "source", change=lambda stored: stored.update({name: torch.ones(())}))
    report = octavo.convert(tmp_path / "source", tmp_path / "out", None)
    assert [*report.unused] == [name]
    assert "scale of activations" in report.unused[name]
    assert f"not used: {name}" in str(octavo.plan(tmp_path / "source", model=False))


def test_a_weight_that_is_there_twice_is_named(tmp_path: Path) -> None:
    stack = "model.layers.0.mlp.experts.down_proj"
    stored = {
        stack: torch.ones(2, 64, 32, dtype=torch.bfloat16),
        f"{stack}_blocks": torch.zeros(2, 32, 2, 16, dtype=torch.uint8),
        f"{stack}_scales": torch.full((2, 32, 2), 120, dtype=torch.uint8),
    }
    write_checkpoint(tmp_path / "source", stored, config={"quantization_config": {"quant_method": "mxfp4"}})
    with pytest.raises(CheckpointError, match=rf"{stack} is there twice: as it is, and as {stack}_blocks"):
        octavo.plan(tmp_path / "source", None, model=False)


def test_weights_are_decoded_to_the_dtype_that_the_config_names(tmp_path: Path) -> None:
    weights = decoded(write(tmp_path / "source"))
    file = tmp_path / "source/config.json"
    config = {**json.loads(file.read_text()), "dtype": "float16", "parts": [{"quantization_config": FINE_GRAINED}]}
    file.write_text(json.dumps(config))
    octavo.convert(tmp_path / "source", tmp_path / "out", None)
    assert same_bytes(tensors_of(tmp_path / "out")[UP], weights[UP].half())
    assert octavo.verify(tmp_path / "out", against=tmp_path / "source").ok
    assert json.loads((tmp_path / "out/config.json").read_text())["parts"] == [{}]


def test_fine_scales_are_within_the_budget(tmp_path: Path) -> None:
    coding = coding_of("a.weight", (4096, 1024), Decoding("float8", 1, 2))
    checkpoint, _ = write_coded(tmp_path, {"a.weight": (coding, encoded(coding, 0))})
    (placement,) = plan_checkpoint(checkpoint, Recipe("fp8_channel")).placements
    for chunk in cut_placement(placement, 1 << 16):
        cells = chunk.piece.numel // 2  # as stored, widened, and for each row
        assert chunk.piece.numel + cells * 12 <= 1 << 16


@pytest.mark.parametrize(("bits", "cols"), [(4, 128), (8, 64), (4, 100), (8, 61)])
def test_packed_numbers_are_decoded_where_no_config_is_but_a_shape(bits: int, cols: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(1 << bits - 1), 1 << bits - 1, (8, cols), generator=generator)
    scale = (torch.rand(8, 1, generator=generator) + 0.1).bfloat16()
    each = 32 // bits
    words = torch.zeros(8, -(-cols // each), dtype=torch.int64)
    for col in range(cols):
        words[:, col // each] |= (numbers[:, col] + (1 << bits - 1)) << bits * (col % each)
    stored = {
        "a.weight_packed": torch.where(words >= 1 << 31, words - (1 << 32), words).int(),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([8, cols]),
    }
    write_checkpoint(tmp_path / "source", stored)
    ((name, weight),) = octavo.stream(tmp_path / "source", None)
    assert name == "a.weight"
    assert same_bytes(weight, (numbers.float() * scale.float()).bfloat16())


def test_a_scale_that_is_missing_is_named_before_a_weight_is_read(tmp_path: Path) -> None:
    write(tmp_path / "source", change=lambda stored: stored.pop(f"{UP}_scale_inv"))
    for way in (octavo.convert, lambda source, _: octavo.plan(source), lambda source, _: list(octavo.stream(source))):
        with pytest.raises(CheckpointError, match=rf"{UP} is F8_E4M3, and has no scale beside it"):
            way(tmp_path / "source", tmp_path / "out")


def test_what_goes_to_an_accelerator_is_decoded_there(tmp_path: Path) -> None:
    write(tmp_path / "source")
    plan = octavo.plan(tmp_path / "source", device="cuda", model=False)
    (on_device,) = plan.parts()
    assert on_device.quantized
    assert all(placement.codings for placement in on_device.quantized)
    assert Budget.fit(on_device.placements, plan.staging_bytes).lanes


def test_nothing_of_the_declaration_remains(tmp_path: Path) -> None:
    write(tmp_path / "source")
    report = octavo.convert(tmp_path / "source", tmp_path / "out", None)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"hidden_size": 260, "text_config": {}}
    assert not (tmp_path / "out/hf_quant_config.json").exists()
    assert any("hf_quant_config.json is not copied" in note for note in report.notes)


def test_a_source_in_blocks_stays_so_where_no_scheme_is_named(tmp_path: Path) -> None:
    stored = write(tmp_path / "source")
    plan = octavo.plan(tmp_path / "source", model=False)
    assert any("it stays so (fp8_block)" in note for note in plan.notes)
    report = octavo.convert(tmp_path / "source", tmp_path / "out", prove=False)
    assert "it stays so (fp8_block)" in str(report)
    assert same_bytes(tensors_of(tmp_path / "out")[UP], stored[UP])
    named = octavo.plan(tmp_path / "source", "fp8_channel", model=False)
    assert {p.scheme for p in named.quantized} == {"fp8_channel"}
    kept = octavo.plan(tmp_path / "source", octavo.Recipe(ignore=["*up_proj*"]), model=False)
    assert [p.scheme for p in kept.quantized] == ["fp8_block"] * (len(plan.quantized) - 1)
