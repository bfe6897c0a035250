"""What a session is given: arguments, transforms, functions that finish layers; and what it reports and holds."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octavo
from helpers import random_weights, same_bytes
from helpers.engine import Model, Rank, Shape, checkpoint
from helpers.layerwise import WIDE, assert_finished_at_once, one_linear
from octavo.numerics import schemes
from octavo.session import Session


def test_a_session_says_what_is_wrong_with_its_arguments() -> None:
    model = one_linear(8)
    for options, text in (
        ({"finish": 3}, "finish is 3"),
        ({"finish": "fp9"}, "unknown scheme 'fp9'"),
        ({"finish": octavo.Recipe(ignore=["b"])}, "the pattern 'b' matches no tensor"),
        ({"duplicates": "maybe"}, "duplicates is 'maybe'"),
        ({"transform": 5}, "transform is 5, not a function"),
        ({"optional": "b"}, "optional is 'b', not a list of patterns"),
        ({"optional": [5]}, r"optional is \[5\], not a list of patterns"),
        ({"staging_bytes": 5}, "staging_bytes is 5"),
        ({"device": "nowhere"}, "device 'nowhere' can't be used"),
    ):
        with pytest.raises(octavo.OctavoError, match=text):
            Session(model, **options)
    with pytest.raises(octavo.OctavoError, match="model is 'path', not a torch"):
        Session("path")  # type: ignore[arg-type]
    with pytest.raises(octavo.OctavoError, match="optional pattern 'z' matches no parameter"):
        Session(model, optional=["z"]).__enter__()


def test_defaults_of_torch_do_not_matter() -> None:
    """Engines load under a default dtype of their own, and under a default device."""
    pairs, before = checkpoint(WIDE, moe=True), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = Model(WIDE, moe=True)
            with Session(model, "fp8_channel", "cpu") as session:
                model.load_weights(pairs.items())
            with session:
                session.dummy()
    finally:
        torch.set_default_dtype(before)
    again = Model(WIDE, moe=True)
    with Session(again, "fp8_channel", "cpu") as session:
        session.dummy()
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert same_bytes(a.data, b.data), name


def test_a_transform_renames_casts_and_drops() -> None:
    def transform(name: str, tensor: Tensor) -> Any:
        if name == "extra":
            return None
        if name == "both":
            return [("a.weight", tensor[0]), ("a.bias", tensor[1, :, 0])]
        return name.removeprefix("model."), tensor.bfloat16()

    model = nn.ModuleDict({"a": nn.Linear(64, 8, dtype=torch.bfloat16), "b": nn.LayerNorm(8, dtype=torch.bfloat16)})
    weight = random_weights((8, 64), torch.bfloat16, 1)
    both = torch.stack([weight, weight])
    pairs = [
        ("extra", torch.ones(3)),
        ("both", both),
        ("model.b.weight", torch.ones(8)),
        ("model.b.bias", torch.ones(8)),
    ]
    with Session(model, "fp8_channel", transform=transform) as session:
        session.load(pairs)
    assert same_bytes(model["a"].weight.data, schemes.quantize(weight, "fp8_channel")[0])
    assert torch.equal(model["a"].bias, weight[:, 0])


def test_load_weights_goes_through_the_session_only_while_it_lasts() -> None:
    model = Model(WIDE)
    seen = []

    def transform(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        seen.append(name)
        return name, tensor

    with Session(model, "fp8_channel", transform=transform):
        model.load_weights(checkpoint(WIDE).items())
    assert seen == list(checkpoint(WIDE))
    assert "load_weights" not in model.__dict__


def test_dummy_weights_fill_every_layer_the_same_each_time() -> None:
    made = []
    for _ in range(2):
        model = Model(WIDE, Rank(1, 2), moe=True)
        with Session(model, "fp8_block") as session:
            session.dummy(seed=3)
        assert_finished_at_once(session.events)
        assert not any(event.kind == "materialize" and "experts" in event.layer for event in session.events)
        made.append(dict(model.named_parameters()))
    assert made[0].keys() == made[1].keys()
    assert all(same_bytes(tensor.data, made[1][name].data) for name, tensor in made[0].items())
    stack, scale = made[0]["layers.1.mlp.experts.w2_weight"], made[0]["layers.1.mlp.experts.w2_weight_scale"]
    spread = schemes.dequantize(stack.data, scale.data, "fp8_block").std()
    assert 0.019 < float(spread) < 0.021


def test_a_function_finishes_each_layer_once_and_may_replace_it() -> None:
    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    seen = []

    def finish(layer: nn.Module) -> nn.Module | None:
        assert not any(parameter.is_meta for parameter in layer.parameters())
        seen.append(type(layer).__name__)
        return Wrapped(layer) if isinstance(layer, nn.Linear) else None

    model = nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8)).to("meta")
    with Session(model, finish, "cpu") as session:
        session.load((name, torch.ones(p.shape)) for name, p in model.named_parameters())
    assert seen == ["Linear", "LayerNorm", "Linear"]
    assert isinstance(model[0], Wrapped)
    assert torch.equal(model[0].inner.weight, torch.ones(8, 64))
    assert [layer.name for layer in session.report.layers] == ["0", "1", "3"]
    assert all(layer.finish_s >= 0 for layer in session.report.layers)


# -- report and memory ------------------------------------------------------------------------------------------------


def test_the_report_says_what_each_layer_took() -> None:
    model = Model(WIDE, moe=True)
    pairs = checkpoint(WIDE, moe=True)
    with Session(model, "fp8_channel") as session:
        model.load_weights(pairs.items())
    report = session.report
    assert report.final_bytes == sum(p.nbytes for p in model.parameters())
    by_name = {layer.name: layer for layer in report.layers}
    experts = by_name["layers.0.mlp.experts"]
    assert experts.way == "direct"
    assert by_name["norm"].way == "kept"
    assert experts.loaded_bytes > experts.final_bytes
    assert report.kept["layers.0.mlp.gate.weight"] == "MoE router, kept by default"
    assert report.to_dict()["layers"]
    assert "layers.*.mlp.experts (2)" in str(report)


def test_memory_never_exceeds_the_fp8_model_and_one_layer() -> None:
    pairs = checkpoint(WIDE, moe=True)
    for direct in (True, False):
        model = Model(WIDE, moe=True)
        with Session(model, "fp8_channel", direct=direct) as session:
            model.load_weights(pairs.items())
        final, report = sum(p.nbytes for p in model.parameters()), session.report
        largest = max(layer.loaded_bytes for layer in report.layers)
        kept = max(layer.loaded_bytes for layer in report.layers if layer.loaded_bytes == layer.final_bytes)
        assert report.peak_bytes <= final + (kept if direct else largest)


def live_bytes() -> int:
    """Of all storages that Python holds tensors of, but for those that were there before ``gc.freeze``."""
    found = {}
    for tensor in gc.get_objects():
        if issubclass(type(tensor), Tensor) and not tensor.is_meta:
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "layer"])
def test_no_more_is_alive_than_what_is_promised(direct: bool) -> None:
    """Counted from outside: every tensor that exists whenever the loader asks for another."""
    shape = Shape(hidden=512, inner=512, experts=8, layers=4)
    pairs = checkpoint(shape, moe=True)
    with torch.device("meta"):
        model = Model(shape, moe=True)
    alive: list[int] = []
    seen: list[str] = []

    def transform(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        if len(seen) % 5 == 0:
            alive.append(live_bytes())
        seen.append(name)
        return name, tensor

    gc.freeze()  # half a million objects of libraries, and what other tests have left
    try:
        with Session(model, "fp8_channel", "cpu", transform=transform, direct=direct) as session:
            model.load_weights(pairs.items())
    finally:
        gc.unfreeze()
    final = sum(parameter.nbytes for parameter in model.parameters())
    scratch = 4 << 20  # of a tile: its bits and its float32 values
    layer = 0 if direct else max(layer.loaded_bytes for layer in session.report.layers)
    assert alive[0] == 0
    assert max(alive) <= final + scratch + layer < sum(tensor.nbytes for tensor in pairs.values())
