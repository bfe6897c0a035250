"""`octavo.update` from a trainer that holds FP8: numbers and scales in any order have the bytes of a load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import octavo
from helpers import write_checkpoint
from helpers.coded import FINE_GRAINED, fine_grained
from helpers.folders import tensors_of
from helpers.models import differences
from octavo.errors import LoaderError, UpdateError

pytest.importorskip("transformers")

from _models import make_checkpoint

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1}
    return make_checkpoint("llama", tmp_path_factory.mktemp("plain") / "llama", **sizes)


def in_blocks(plain: Path, folder: Path, factor: float = 1.0) -> dict[str, Tensor]:
    """The checkpoint, multiplied and in FP8; returns what is stored."""
    stored = fine_grained({name: (tensor * factor).to(tensor.dtype) for name, tensor in tensors_of(plain).items()})
    config = json.loads((plain / "config.json").read_text())
    write_checkpoint(folder, stored, config={**config, "quantization_config": FINE_GRAINED})
    return stored


@pytest.mark.parametrize(
    ("scheme", "order"), [("fp8_block", "sorted"), ("fp8_block", "scales first"), ("fp8_channel", "scales last")]
)
def test_pairs_have_the_bytes_of_a_load(scheme: str, order: str, plain: Path, tmp_path: Path) -> None:
    in_blocks(plain, tmp_path / "old")
    new = in_blocks(plain, tmp_path / "new", 1.7)
    model = octavo.load(tmp_path / "old", scheme)
    ends = {"sorted": "", "scales first": "_scale_inv", "scales last": "weight"}
    pairs = sorted(new.items(), key=lambda pair: (bool(ends[order]) and not pair[0].endswith(ends[order]), pair[0]))
    octavo.update(model, iter(pairs))
    assert differences(model, octavo.load(tmp_path / "new", scheme)) == []


def test_a_model_of_bf16_takes_pairs_whose_shapes_tell_the_blocks(plain: Path, tmp_path: Path) -> None:
    new = in_blocks(plain, tmp_path / "new", 1.7)
    model = octavo.load(plain, "fp8_block")
    memory: dict[str, Tensor] = {}

    def one_buffer_for_all() -> Any:
        for name, tensor in new.items():
            held = memory.setdefault(f"{tensor.dtype}{tensor.shape}", torch.empty_like(tensor))
            held.view(torch.uint8).copy_(tensor.view(torch.uint8)) if tensor.dtype.itemsize == 1 else held.copy_(tensor)
            yield name, held

    octavo.update(model, one_buffer_for_all())
    assert differences(model, octavo.load(tmp_path / "new", "fp8_block")) == []


@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_channel"])
def test_a_folder_is_read_as_the_checkpoint_that_it_is(scheme: str, plain: Path, tmp_path: Path) -> None:
    in_blocks(plain, tmp_path / "new", 1.7)
    model = octavo.load(plain, scheme)
    octavo.update(model, tmp_path / "new")
    assert differences(model, octavo.load(tmp_path / "new", scheme)) == []
    octavo.update(model, str(plain))
    assert differences(model, octavo.load(plain, scheme)) == []


@pytest.mark.parametrize("scheme", ["fp8_channel", "int8_channel"])
def test_its_own_numbers_are_an_update_that_changes_nothing(scheme: str, plain: Path) -> None:
    model = octavo.load(plain, scheme)
    octavo.update(model, {name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert differences(model, octavo.load(plain, scheme)) == []


@pytest.mark.parametrize("dtype", [torch.int8, octavo.schemes.FP8])
def test_what_a_model_holds_in_such_numbers_has_no_scales(dtype: torch.dtype, plain: Path) -> None:
    model = octavo.load(plain)
    model.register_buffer("table", torch.zeros(4, 4).to(dtype))
    octavo.update(model, {"table": torch.eye(4).to(dtype)})
    assert torch.equal(model.table.float(), torch.eye(4))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda new: new.pop(f"{UP}_scale_inv"), f"{UP} is .*, and its scales did not come"),
        (lambda new: new.pop(UP), f"{UP}_scale_inv came without {UP} in FP8"),
        (
            lambda new: new.update({f"{UP}_scale_inv": torch.ones(7, 7)}),
            r"_scale_inv is \[7, 7\], .* what rows and columns of .* \[384, 256\] share a scale\. Let it come in bf16",
        ),
        (lambda new: new.update({f"{UP}_scale_inv": -new[f"{UP}_scale_inv"]}), "_scale_inv: a scale is -"),
        (
            lambda new: new.update({f"{UP}_scale": torch.ones(3, 2)}),
            f"{UP}_scale is a second scale of {UP}, which came with {UP}_scale_inv",
        ),
        (lambda new: new.update({UP: new[UP].bfloat16()}), f"_scale_inv is no scale of {UP}, which came as bf16"),
        (lambda new: new[f"{UP}_scale_inv"].fill_(3e38), f"{UP}.* not finite"),
    ],
)
def test_what_makes_no_weight_is_named(change: Any, told: str, plain: Path, tmp_path: Path) -> None:
    new = in_blocks(plain, tmp_path / "new")
    model = octavo.load(plain, "fp8_block")
    change(new)
    with pytest.raises(UpdateError, match=told):
        octavo.update(model, new)


def test_numbers_that_come_twice_before_their_scales_are_named(plain: Path, tmp_path: Path) -> None:
    new, model = in_blocks(plain, tmp_path / "new"), octavo.load(plain, "fp8_block")
    with pytest.raises(UpdateError, match=f"{UP} came twice before its scales"):
        octavo.update(model, [(UP, new[UP]), (UP, new[UP]), (f"{UP}_scale_inv", new[f"{UP}_scale_inv"])])


@pytest.mark.parametrize(("scheme", "saved"), [("int8_channel", False), ("nvfp4", True), ("nvfp4", False)])
def test_a_folder_in_other_numbers_is_refused_before_it_is_read(
    scheme: str, saved: bool, plain: Path, tmp_path: Path
) -> None:
    model = octavo.load(plain, scheme)
    model.save_pretrained(tmp_path) if saved else octavo.convert(plain, tmp_path / "out", scheme, prove=False)
    with pytest.raises(UpdateError, match=r"(?s)is quantized as .*octavo\.load.*0 layers have the new"):
        octavo.update(model, tmp_path if saved else tmp_path / "out")


def in_int8(plain: Path, folder: Path, group: int | None, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The checkpoint with matrices of int8, and a scale for each row, or each group of it; and no word of that."""
    generator, stored = torch.Generator().manual_seed(0), tensors_of(plain)
    for name, tensor in list(stored.items()):
        if "_proj" in name:
            stored[name] = torch.randint(-127, 128, tensor.shape, generator=generator, dtype=torch.int8)
            cells = 1 if group is None else tensor.shape[1] // group
            stored[f"{name}_scale"] = (torch.rand(tensor.shape[0], cells, generator=generator) / 100 + 0.01).to(dtype)
    write_checkpoint(folder, stored, config=json.loads((plain / "config.json").read_text()))
    return stored


@pytest.mark.parametrize(
    ("scheme", "group", "dtype"),
    [
        ("int8_channel", None, torch.float32),
        ("int8_channel", None, torch.bfloat16),
        ("int8_channel", 64, torch.float32),
        ("fp8_channel", None, torch.float32),
        ("fp8_block", 64, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("path", [True, False])
def test_int8_has_the_bytes_of_a_load(
    scheme: str, group: int | None, dtype: torch.dtype, path: bool, plain: Path, tmp_path: Path
) -> None:
    new, model = in_int8(plain, tmp_path, group, dtype), octavo.load(plain, scheme)
    octavo.update(model, tmp_path if path else iter(new.items()))
    assert differences(model, octavo.load(tmp_path, scheme)) == []


def test_a_saved_int8_model_is_an_update(plain: Path, tmp_path: Path) -> None:
    in_int8(plain, tmp_path / "new", None)
    octavo.load(tmp_path / "new", "int8_channel").save_pretrained(tmp_path / "saved")
    model = octavo.load(plain, "int8_channel")
    octavo.update(model, tmp_path / "saved")
    assert differences(model, octavo.load(tmp_path / "saved")) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda new: new.pop(f"{UP}_scale"), f"{UP} is int8, and its scales did not come; .* FP8 and int8 with scales"),
        (lambda new: new.pop(UP), f"{UP}_scale came without {UP} in FP8 or int8"),
        (
            lambda new: new.update({f"{UP}_zero_point": torch.zeros(384, 1, dtype=torch.int8)}),
            f"{UP}_zero_point: an update takes no zero points. Let {UP} come in bf16",
        ),
        (
            lambda new: new.update({f"{UP}_scale": torch.full((384, 8), 127, dtype=torch.uint8)}),
            f"{UP}_scale is uint8 .* which are no scales of {UP}",
        ),
        (lambda new: new[f"{UP}_scale"].fill_(3e38), f"{UP}.* not finite"),
    ],
)
def test_int8_that_makes_no_weight_is_named(change: Any, told: str, plain: Path, tmp_path: Path) -> None:
    new, model = in_int8(plain, tmp_path, None), octavo.load(plain, "int8_channel")
    change(new)
    with pytest.raises(UpdateError, match=told):
        octavo.update(model, new)


@pytest.mark.parametrize("pairs", [None, 3, b"folder", torch.ones(2, 2)])
def test_what_are_no_pairs_is_said(pairs: Any, plain: Path) -> None:
    with pytest.raises(LoaderError, match=f"takes pairs of names and tensors.* not {type(pairs).__name__}"):
        octavo.update(octavo.load(plain), pairs)


def test_a_tied_parameter_may_come_in_fp8_under_each_of_its_names(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "tie_word_embeddings": True}
    folder = make_checkpoint("llama", tmp_path / "tied", **sizes)
    numbers = (torch.randn(260, 128) * 100).to(octavo.schemes.FP8)
    scale = torch.tensor([[0.5], [0.25], [2.0]])
    names = ("model.embed_tokens.weight", "lm_head.weight")
    new = {name + end: t for name in names for end, t in (("", numbers), ("_scale_inv", scale))}
    model = octavo.load(folder)
    octavo.update(model, new)
    wide = (numbers.float() * scale.repeat_interleave(128, 0)[:260]).bfloat16()
    assert torch.equal(model.lm_head.weight, wide)
    with pytest.raises(UpdateError, match=r"lm_head.weight differs from what came as model.embed_tokens.weight"):
        octavo.update(model, {**new, "lm_head.weight_scale_inv": scale * 2})


@pytest.mark.parametrize("scheme", ["fp8_block", "int8_channel"])
def test_numbers_that_are_to_be_negated_are(scheme: str, plain: Path) -> None:
    new = {name: tensor * 2 for name, tensor in tensors_of(plain).items()}
    model, expected = octavo.load(plain, scheme), octavo.load(plain, scheme)
    octavo.update(expected, new)
    octavo.update(model, {name: torch._neg_view(-tensor) for name, tensor in new.items()})
    assert differences(model, expected) == []
