"""Checkpoints that compressed-tensors wrote, one thing changed: octavo decodes them as that does, or refuses them.

Nothing in between: what is changed in declarations and tensors is what goes wrong in checkpoints that people write with
scripts of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decoded import CASES, compressed, write
from torch import Tensor

import octavo
from helpers import same_bytes
from octavo.errors import OctavoError

pytestmark = pytest.mark.peers

pytest.importorskip("compressed_tensors")

State = dict[str, Tensor]
#: what is changed: the tensors, and the one group of the config
Change = Callable[[State, dict[str, Any]], object]
LAYERS = ("up", "down")


def scales_in(dtype: torch.dtype) -> Change:
    """Scales that no smaller dtype holds."""

    def change(state: State, group: dict[str, Any]) -> None:
        for name in [f"{layer}.weight_scale" for layer in LAYERS]:
            if state[name].dtype == torch.bfloat16:
                state[name] = (state[name].float() * 1.003).to(dtype)

    return change


def without(end: str) -> Change:
    def change(state: State, group: dict[str, Any]) -> None:
        for name in [name for name in state if name.endswith(end)]:
            del state[name]

    return change


def declared(**values: Any) -> Change:
    return lambda state, group: group["weights"].update(values)


def zero_points(state: State, group: dict[str, Any]) -> None:
    for layer in LAYERS:
        zeros = torch.zeros(state[f"{layer}.weight_scale"].shape, dtype=torch.int8)
        state.setdefault(f"{layer}.weight_zero_point", zeros)


def flat_scales(state: State, group: dict[str, Any]) -> None:
    for layer in LAYERS:
        state[f"{layer}.weight_scale"] = state[f"{layer}.weight_scale"].squeeze(-1)


CHANGES: dict[str, Change] = {
    "scales in float32": scales_in(torch.float32),
    "scales in bf16": scales_in(torch.bfloat16),
    **{f"no {end}": without(end) for end in ("weight_scale", "zero_point", "weight_shape", "global_scale")},
    "symmetric": declared(symmetric=True),
    "not symmetric": declared(symmetric=False),
    **{f"groups of {size}": declared(group_size=size) for size in (16, 32, 64, 256)},
    **{f"{bits} bits": declared(num_bits=bits) for bits in (3, 4, 8)},
    **{f"type {type_}": declared(type=type_) for type_ in ("int", "float")},
    **{f"strategy {name}": declared(strategy=name) for name in ("channel", "tensor", "group", "block", None)},
    **{f"actorder {name}": declared(actorder=name) for name in ("group", "weight", "static")},
    "columns in another order": lambda state, group: state.update(
        {f"{layer}.weight_g_idx": torch.arange(256).flip(0).int() // 32 for layer in LAYERS}
    ),
    "zero points": zero_points,
    "scales without an axis": flat_scales,
    "other targets": lambda state, group: group.update(targets=["re:.*other.*"]),
}


def theirs(state: State, group: dict[str, Any]) -> dict[str, Tensor] | None:
    """What the library makes of the weights by what is declared; None where it can't."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    try:
        scheme = QuantizationScheme(targets=["Linear"], weights=group["weights"])
        compressor = BaseCompressor.get_value_from_registry(group["format"])
        found = {}
        for layer in LAYERS:
            mine = {name.removeprefix(f"{layer}."): t.clone() for name, t in state.items() if name.startswith(layer)}
            found[f"{layer}.weight"] = compressor.decompress(mine, scheme)["weight"]
    except Exception:  # whatever it raises on what it does not expect
        return None
    return found


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[State, dict[str, Any]]:
    """Tensors, and the config of a checkpoint as it should be."""
    compressor, model = compressed(*CASES[request.param], torch.bfloat16, 100)
    folder = tmp_path_factory.mktemp("case")
    write(folder, model.state_dict(), {})
    compressor.update_config(str(folder))
    return model.state_dict(), json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_decoded_as_the_library_does_or_refused(
    change: str, case: tuple[State, dict[str, Any]], tmp_path: Path
) -> None:
    state, config = dict(case[0]), json.loads(json.dumps(case[1]))
    (group,) = config["quantization_config"]["config_groups"].values()
    CHANGES[change](state, group)
    write(tmp_path, state, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = theirs(state, group)
    refused = None
    try:
        found = dict(octavo.stream(tmp_path, None))
    except OctavoError as error:
        refused = str(error)
    if refused is not None:
        parts = ("up.weight", "down.weight", "compressed-tensors with", "its config.json says of its quantization")
        assert any(part in refused for part in parts), refused
        return
    assert found.keys() == {"up.weight", "down.weight", "lm_head.weight"}
    if wanted is not None and change != "columns in another order":
        assert all(same_bytes(found[name], tensor.to(found[name].dtype)) for name, tensor in wanted.items())


@pytest.mark.parametrize("change", ["actorder group", "columns in another order"])
def test_columns_in_another_order_are_refused(change: str, case: tuple[State, dict[str, Any]], tmp_path: Path) -> None:
    """Which the library of today does not know any more, so that it passes over them."""
    state, config = dict(case[0]), json.loads(json.dumps(case[1]))
    (group,) = config["quantization_config"]["config_groups"].values()
    CHANGES[change](state, group)
    write(tmp_path, state, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(OctavoError, match="in a way that octavo can't decode"):
        octavo.stream(tmp_path, None)
