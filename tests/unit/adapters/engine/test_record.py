"""Surveys of toy models, written as JSON and read back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import random_weights, same_bytes, write_checkpoint
from helpers.vllm_toys import Stacked, Toy, stacks_of
from octavo import Recipe
from octavo.adapters.engine.experts import settle
from octavo.adapters.engine.record import Record
from octavo.adapters.engine.survey import Survey, Surveyor
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.conversion import formats
from octavo.errors import RecipeError
from octavo.planning.plan import Plan, plan_checkpoint
from octavo.planning.stacks import find_series

LAYOUT = formats.get("compressed-tensors")
SHAPES = {"gate_proj.weight": (256, 256), "up_proj.weight": (256, 256), "down_proj.weight": (256, 256)}


class Padded(Toy):
    """Has more rows of its norm than the checkpoint, which are zero."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.wide = nn.Parameter(torch.full((320,), 7.0, dtype=torch.bfloat16), requires_grad=False)

    def load_weights(self, weights: Any) -> None:
        for name, weight in weights:
            if name == "wide":
                self.wide.data[: len(weight)].copy_(weight)
                self.wide.data[len(weight) :].fill_(0)
            else:
                super().load_weights([(name, weight)])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    tensors = {name: random_weights(shape, torch.bfloat16, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    tensors |= {name: random_weights((256,), torch.float32, 9) for name in ("norm", "wide")}
    return Checkpoint.open(write_checkpoint(tmp_path / "bf16", tensors))


def record_of(checkpoint: Checkpoint, model: nn.Module, scheme: str) -> Record:
    plan = Plan(str(checkpoint.path), Recipe(scheme), (), {}, 1 << 20, {}, checkpoint.notes)
    return Record(checkpoint, model, plan, LAYOUT, "cpu")


def survey(checkpoint: Checkpoint, model: Any, scheme: str, plan: Plan | None = None) -> Survey:
    plan = plan or plan_checkpoint(checkpoint, Recipe(scheme), 1 << 20)
    return Surveyor(model, model.load_weights, plan, LAYOUT).run()


def places_of(found: Survey) -> Any:
    """What is equal for two surveys of one model."""
    assert found.places is not None
    memory = {
        name: [
            None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            for tensor in storage.tensors
        ]
        for name, storage in found.places.storages.items()
    }
    return found.plan, found.places.direct, found.places.rest, memory, found.layers, found.unread, found.fillers


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", "int8_channel", "nvfp4"])
def test_a_survey_survives_json(scheme: str, ranks: int, checkpoint: Checkpoint) -> None:
    model = Padded("int8_packed" if scheme == "int8_channel" else scheme, ranks)
    found, record = survey(checkpoint, model, scheme), record_of(checkpoint, model, scheme)
    read = record.read(json.loads(json.dumps(record.write(found))))
    assert places_of(read) == places_of(found)
    assert not read.keep


def test_constants_are_written_again(checkpoint: Checkpoint) -> None:
    model, again = Padded(), Padded()
    written = record_of(checkpoint, model, "fp8_channel").write(survey(checkpoint, model, "fp8_channel"))
    record_of(checkpoint, again, "fp8_channel").read(written)
    assert again.wide.tolist() == [7.0] * 256 + [0.0] * 64


def test_what_is_known_of_packed_weights_is_written_again(checkpoint: Checkpoint) -> None:
    model, again = Padded("int8_packed"), Padded("int8_packed")
    again.gate_up_proj.weight_shape.fill_(7)
    written = record_of(checkpoint, model, "int8_channel").write(survey(checkpoint, model, "int8_channel"))
    record_of(checkpoint, again, "int8_channel").read(json.loads(json.dumps(written)))
    assert again.gate_up_proj.weight_shape.tolist() == [256, 256]
    del written["constants"][-1]
    with pytest.raises(ValueError, match="nothing fills"):
        record_of(checkpoint, again, "int8_channel").read(written)


def test_constants_of_which_more_than_one_is_needed_are_not_written(checkpoint: Checkpoint) -> None:
    model = Padded()
    found = survey(checkpoint, model, "fp8_channel")
    model.wide.data[300] = 1.0
    with pytest.raises(ValueError, match="not as it was written"):
        record_of(checkpoint, model, "fp8_channel").write(found)


def test_what_goes_through_the_loader_goes_there_again(checkpoint: Checkpoint) -> None:
    class Halving(Padded):
        def load_weights(self, weights: Any) -> None:
            super().load_weights((name, weight / 2 if name == "norm" else weight) for name, weight in weights)

    model = Halving()
    found, record = survey(checkpoint, model, "fp8_channel"), record_of(checkpoint, model, "fp8_channel")
    assert found.places is not None
    assert [placement.name for placement in found.places.rest.placements] == ["norm"]
    assert places_of(record.read(record.write(found))) == places_of(found)


def test_matrices_of_stacks_keep_their_names(tmp_path: Path) -> None:
    matrices = {
        f"experts.{expert}.{half}_proj.weight": random_weights((256, 256), torch.bfloat16, expert)
        for expert in range(3)
        for half in ("gate", "up", "down")
    }
    (tmp_path / "config.json").write_text("{}")
    stacks = {name: stack.contiguous() for name, stack in stacks_of(matrices).items()}
    checkpoint, model = Checkpoint.open(write_checkpoint(tmp_path, stacks)), Stacked()
    series = find_series(checkpoint)
    cuts = [cut for experts in series for cut in experts.cuts()]
    plan = plan_checkpoint(checkpoint, Recipe("fp8_channel"), 1 << 20, cuts=cuts)
    assert settle(series, plan, lambda: plan, lambda some: Surveyor(model, model.load_weights, some, LAYOUT)) is plan
    found, record = survey(checkpoint, model, "fp8_channel", plan), record_of(checkpoint, model, "fp8_channel")
    assert places_of(record.read(json.loads(json.dumps(record.write(found))))) == places_of(found)


def _set(*path: Any) -> Callable[[Any], None]:
    """What changes one value of a record: all of ``path`` but the last leads to it."""

    def change(record: Any) -> None:
        *way, last, value = path
        for step in way:
            record = record[step]
        record[last] = value

    return change


#: of a record whose third placement, kind and place are those of down_proj, and whose second is what is padded
HOSTILE: dict[str, Callable[[Any], None]] = {
    "a piece beyond its tensor": _set("placements", 2, 5, 1),
    "a piece before it": _set("placements", 2, 5, -1),
    "a tensor that is none": _set("placements", 2, 4, 99),
    "a tensor of another dtype": _set("placements", 2, 4, 1),
    "a piece that is larger": _set("cuts", 1, 1, [256, 512]),
    "a piece that is smaller": _set("cuts", 1, 1, [256, 128]),
    "a piece that lies elsewhere": _set("cuts", 1, 0, [1, 0]),
    "steps that lead away": _set("cuts", 1, 2, [1 << 40, 1]),
    "steps back": _set("cuts", 1, 2, [-256, 1]),
    "another shape": _set("kinds", 2, 0, [256, 128]),
    "no dtype": _set("kinds", 2, 1, "F9"),
    "another dtype": _set("kinds", 2, 1, "BF16"),
    "no scheme": _set("kinds", 2, 3, "fp9"),
    "no text": _set("kinds", 2, 4, ["linear"]),
    "parts of fewer rows": _set("kinds", 2, 5, [128]),
    "columns beyond the row": _set("kinds", 2, 8, [0, 257]),
    "a place beyond the parameter": _set("direct", 2, 1, 1, 128),
    "a place that is larger": _set("direct", 2, 1, 2, [1024, 256]),
    "another parameter": _set("direct", 2, 1, 0, "gate_up_proj.weight_scale"),
    "a parameter that is none": _set("direct", 2, 1, 0, "nothing"),
    "a scale of another dtype": _set("direct", 2, 2, ["wide", 0, [256, 1], [1, 1]]),
    "the place of another": _set("direct", 2, 1, ["gate_up_proj.weight", 0, [256, 256], [256, 1]]),
    "a part of its rows twice": _set("direct", 2, 2, 3, [0, 1]),
    "no constants": _set("constants", []),
    "constants elsewhere": _set("constants", 0, 1, 0),
    "no scale": _set("direct", 2, 2, None),
    "a scale of what has none": _set("direct", 0, 2, ["wide", 0, [256, 1], [1, 1]]),
    "one placement twice": _set("direct", 0, ["no list"]),
    "a placement that is none": _set("rest", [7]),
    "layers in words": _set("layers", "two"),
    "a filler of no layer": _set("fillers", "layers", {"nothing": [0, 0]}),
    "a filler of no parameter": _set("fillers", "sets", 0, ["nothing"]),
    "a constant beyond the parameter": _set("constants", 0, 2, [4096]),
    "a constant that is none": _set("constants", 0, 4, [0]),
    "nothing": lambda record: record.clear(),
}


def test_pieces_that_fill_one_half_twice_and_the_other_never_are_refused(checkpoint: Checkpoint) -> None:
    model = Padded()
    record = record_of(checkpoint, model, "fp8_channel")
    written = json.loads(json.dumps(record.write(survey(checkpoint, model, "fp8_channel"))))
    row, half = written["placements"][2], len(written["cuts"])
    kind, name, coded, _, source, _ = row
    written["cuts"] += [[[0, 0], [128, 256], [256, 1]], [[128, 0], [128, 256], [256, 1]]]
    row[:] = [kind, name, coded, half, source, 0, half + 1, source, 128 * 256]
    record.read(copy.deepcopy(written))
    row[:] = [kind, name, coded, half, source, 0, half, source, 128 * 256]
    with pytest.raises(ValueError, match="both fill"):
        record.read(written)


@pytest.mark.parametrize("change", HOSTILE.values(), ids=[*HOSTILE])
def test_what_is_not_as_it_was_written_is_refused(change: Callable[[Any], None], checkpoint: Checkpoint) -> None:
    model = Padded()
    record = record_of(checkpoint, model, "fp8_channel")
    written = json.loads(json.dumps(record.write(survey(checkpoint, model, "fp8_channel"))))
    record.read(copy.deepcopy(written))
    change(written)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises((ValueError, LookupError, TypeError, AttributeError, RecipeError)):
        record.read(written)
    assert all(map(same_bytes, model.parameters(), before))
