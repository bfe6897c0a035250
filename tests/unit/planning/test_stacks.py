"""Stacks of experts: which axis is which, and the matrices that they are cut into."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from helpers import assemble, headers
from octavo.planning import kinds
from octavo.planning.plan import Plan, plan_checkpoint
from octavo.planning.recipe import Recipe
from octavo.planning.stacks import NAMINGS, Experts, find_experts

PROJ, FUSED, LETTERS = NAMINGS
#: E = 3 experts, hidden size k = 64, n = 32 rows of gate
FUSED_STACKS = {"m.0.mlp.experts.gate_up_proj": (3, 64, 64), "m.0.mlp.experts.down_proj": (3, 64, 32)}


def find(shapes: dict[str, Sequence[int]], **options) -> list[Experts]:
    return list(find_experts(headers(shapes, **options)))


def shapes_of(gate_up: Sequence[int], down: Sequence[int]) -> dict[str, Sequence[int]]:
    return {"m.0.mlp.experts.gate_up_proj": gate_up, "m.0.mlp.experts.down_proj": down}


@pytest.mark.parametrize(
    ("gate_up", "down", "transposed"),
    [
        ((3, 64, 40), (3, 40, 32), False),
        ((3, 40, 64), (3, 32, 40), True),
        ((3, 64, 64), (3, 64, 32), False),  # gate_up is square: down tells
        ((3, 64, 64), (3, 32, 64), True),
        ((3, 64, 128), (3, 64, 64), True),  # down is square: gate_up tells
        ((3, 128, 64), (3, 64, 64), False),
        ((3, 64, 40), (3, 32, 40), None),
        ((3, 64, 40), (3, 40, 33), None),
        ((2, 64, 40), (3, 40, 32), None),
        ((3, 0, 40), (3, 40, 0), None),
        ((5000, 4, 3), (5000, 3, 2), None),  # more than any model has
    ],
)
def test_the_shapes_of_both_stacks_tell_which_axis_is_which(
    gate_up: Sequence[int], down: Sequence[int], transposed: bool | None
) -> None:
    found = find(shapes_of(gate_up, down))
    assert [experts.transposed for experts in found] == ([] if transposed is None else [transposed])


@pytest.mark.parametrize(("sides", "transposed"), [((32, 64), False), ((64, 32), True), ((32, 32), None)])
def test_of_gate_and_up_apart_the_model_s_size_tells(sides: tuple[int, int], transposed: bool | None) -> None:
    shapes = {f"m.experts.{leaf}": (3, *sides) for leaf in ("gate_proj", "up_proj")}
    shapes["m.experts.down_proj"] = (3, *sides[::-1])
    for config in ({"hidden_size": 64}, {"text_config": {"hidden_size": 64}, "vision_config": {"hidden_size": 16}}):
        found = find(shapes, config=config)
        assert [experts.transposed for experts in found] == ([] if transposed is None else [transposed])
    assert find(shapes) == []
    assert find(shapes, config={"hidden_size": 64, "vision_config": {"hidden_size": 32}}) == []


def test_stacks_that_interleave_or_lack_a_part_are_not_cut() -> None:
    assert len(find(FUSED_STACKS)) == 1
    assert find({**FUSED_STACKS, "m.0.mlp.experts.gate_up_proj_bias": (3, 64)}) == []
    assert find({**FUSED_STACKS, "m.0.mlp.experts.0.up_proj.weight": (32, 64)}) == []  # a name that is taken
    assert find({"m.0.mlp.experts.down_proj": (3, 64, 32)}) == []
    assert find(FUSED_STACKS, dtype="F8_E4M3") == []
    assert find(FUSED_STACKS, dtype={"m.0.mlp.experts.down_proj": "F32"}) == []


def test_names_are_below_the_experts_whatever_the_stacks_are_called() -> None:
    for stack, down, base in (
        ("m.experts.gate_up_proj", "m.experts.down_proj", "m.experts"),
        (
            "m.block_sparse_moe.input_linear.weight",
            "m.block_sparse_moe.output_linear.weight",
            "m.block_sparse_moe.experts",
        ),
        ("m.mlp.experts.fc1.weight", "m.mlp.experts.fc2.weight", "m.mlp.experts"),
    ):
        (experts,) = find({stack: (2, 64, 40), down: (2, 40, 32)})
        cut = experts.cut(PROJ)
        assert [matrix.name for matrix in cut[stack]] == [
            f"{base}.{expert}.{leaf}.weight" for expert in range(2) for leaf in ("gate_proj", "up_proj")
        ]
        assert [matrix.name for matrix in cut[down]] == [f"{base}.{expert}.down_proj.weight" for expert in range(2)]
        assert {matrix.name.split(".")[-2] for found in experts.cut(LETTERS).values() for matrix in found} == {
            *("w1", "w2", "w3")
        }
        assert [matrix.name.split(".")[-2] for matrix in experts.cut(FUSED)[stack]] == ["gate_up_proj"] * 2


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_out_by_in_whatever_the_stack_is(transposed: bool) -> None:
    gate_up, down = torch.arange(3 * 8 * 5.0).view(3, 8, 5), torch.arange(3 * 5 * 4.0).view(3, 5, 4)
    names = ("m.experts.gate_up_proj", "m.experts.down_proj")
    stored = [stack.transpose(1, 2).contiguous() if transposed else stack for stack in (gate_up, down)]
    sources = dict(zip(names, stored, strict=True))
    (experts,) = find({name: tuple(stack.shape) for name, stack in sources.items()})
    assert experts.transposed is transposed
    made = {
        matrix.name: assemble(matrix.shape, matrix.pieces, sources)
        for naming in (PROJ, FUSED)
        for found in experts.cut(naming).values()
        for matrix in found
    }
    for expert in range(3):
        base = f"m.experts.{expert}"
        assert made[f"{base}.gate_proj.weight"].equal(gate_up[expert, :4])
        assert made[f"{base}.up_proj.weight"].equal(gate_up[expert, 4:])
        assert made[f"{base}.gate_up_proj.weight"].equal(gate_up[expert])
        assert made[f"{base}.down_proj.weight"].equal(down[expert])


def test_fused_names_need_fused_stacks() -> None:
    shapes = {f"m.experts.{leaf}": (3, 32, 64) for leaf in ("gate_proj", "up_proj")}
    (experts,) = find({**shapes, "m.experts.down_proj": (3, 64, 32)}, config={"hidden_size": 64})
    assert experts.cut(FUSED) == {}
    assert len(experts.cut(PROJ)) == 3


def test_layers_that_are_alike_have_one_key() -> None:
    keys = [
        experts.key
        for layer in range(2)
        for experts in find({name.replace("0", str(layer)): shape for name, shape in FUSED_STACKS.items()})
    ]
    assert keys[0] == keys[1]
    (other,) = find(shapes_of((3, 32, 64), (3, 64, 16)))
    assert other.key != keys[0]


# -- plans ------------------------------------------------------------------------------------------------------------


def plan_of(recipe: Recipe, veto=None, device: str = "cpu") -> Plan:
    checkpoint = headers({**FUSED_STACKS, "m.0.q_proj.weight": (64, 64)})
    cuts = [experts.cut(PROJ) for experts in find_experts(checkpoint)]
    return plan_checkpoint(checkpoint, recipe, device=device, veto=veto, cuts=cuts)


def test_a_plan_has_matrices_in_the_place_of_stacks() -> None:
    plan = plan_of(Recipe())
    assert len(plan.placements) == 1 + 3 * 3
    assert all(placement.scheme == "fp8_channel" for placement in plan.placements)
    assert plan.source_bytes == plan_of(Recipe(None)).source_bytes
    (up,) = [placement for placement in plan.placements if placement.name == "m.0.mlp.experts.1.up_proj.weight"]
    assert up.shape == (32, 64)
    assert up.scale_shape == (32, 1)
    assert plan.to_dict()["tensors"]


def test_matrices_go_where_their_stack_would() -> None:
    assert plan_of(Recipe(), device="meta").devices == ("meta",)


@pytest.mark.parametrize(
    "recipe",
    [Recipe(None), Recipe(ignore=["*.experts.*"]), Recipe(ignore=["*.down_proj"]), Recipe(None, {"*.q_proj": "mxfp8"})],
)
def test_stacks_are_cut_only_where_all_of_a_layer_s_are_quantized(recipe: Recipe) -> None:
    names = {placement.name for placement in plan_of(recipe).placements}
    assert names == {*FUSED_STACKS, "m.0.q_proj.weight"}


def test_different_schemes_keep_stacks_whole() -> None:
    plan = plan_of(Recipe("fp8_channel", {"*.down_proj": "fp8_block"}))
    assert {placement.name for placement in plan.placements} >= FUSED_STACKS.keys()


def test_what_no_reader_takes_of_one_matrix_keeps_all_stacks_of_its_layer() -> None:
    def veto(name: str, shape: tuple[int, ...], kind: str, scheme: str) -> str | None:
        return "32 columns" if shape[-1] == 32 or kind == kinds.EXPERTS else None

    kept = {placement.name: placement.reason for placement in plan_of(Recipe(), veto).kept}
    assert kept == dict.fromkeys(FUSED_STACKS, "expert stack: 32 columns")
