"""Plans: data made from headers. Nothing here has a file to read from."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import headers
from octavo.elements.pieces import Piece, whole
from octavo.elements.symbolic import Symbolic
from octavo.errors import CoverageError, RecipeError
from octavo.planning import kinds
from octavo.planning.budget import Budget
from octavo.planning.placement import Target, cut_parts
from octavo.planning.plan import make_plan, plan_checkpoint
from octavo.planning.recipe import Recipe


def source(checkpoint, name: str) -> Symbolic:
    return Symbolic.source(name, checkpoint.tensors[name].shape, torch.bfloat16)


def target(name: str, symbolic: Symbolic, kind: str = kinds.LINEAR, **options) -> Target:
    return Target(name, tuple(symbolic.shape), torch.bfloat16, kind, tuple(symbolic.pieces), **options)


def parts_of(checkpoint, symbolic: Symbolic, **options) -> tuple[int, ...]:
    kind = kinds.EXPERTS if symbolic.ndim == 3 else kinds.LINEAR
    (placement,) = make_plan(checkpoint, [target("p", symbolic, kind, **options)], Recipe()).placements
    assert sum(placement.parts) == placement.shape[-2]
    return placement.parts


# -- coverage ---------------------------------------------------------------------------------------------------------


def test_all_coverage_problems_are_named_in_one_error():
    checkpoint = headers({"a": (4, 6), "b": (4, 6), "c": (5, 6)})
    targets = [
        Target("gap", (8, 6), None, kinds.LINEAR, (whole("a", (4, 6)),)),
        Target("twice", (8, 6), None, kinds.LINEAR, (whole("a", (4, 6)), whole("b", (4, 6)))),
        Target("outside", (4, 6), None, kinds.LINEAR, (whole("c", (5, 6)),)),
        Target("fine", (4, 6), None, kinds.LINEAR, (whole("a", (4, 6)),)),
    ]
    with pytest.raises(CoverageError, match="/nowhere: 3 problems") as caught:
        make_plan(checkpoint, targets, Recipe())
    text = str(caught.value)
    assert "gap [8, 6]: 24 of 48 elements come from no checkpoint tensor" in text
    assert "twice [8, 6]: b and a both fill [0:4, 0:6]" in text
    assert "outside [4, 6]: c fills [0:5, 0:6], outside of [4, 6]" in text
    assert "fine" not in text


def test_a_checkpoint_that_is_quantized_already_is_refused():
    config = {"quantization_config": {"quant_method": "gptq"}}
    checkpoint = headers({"a.weight": (4, 6)}, config=config)
    with pytest.raises(RecipeError, match=r"already quantized \(gptq, says its config\.json\)"):
        plan_checkpoint(checkpoint, Recipe())
    assert plan_checkpoint(checkpoint, Recipe(None)).quantized == []


# -- parts: runs of rows that never share a scale group ---------------------------------------------------------------


def test_a_lone_source_is_one_part():
    checkpoint = headers({"a": (10, 6)})
    assert parts_of(checkpoint, source(checkpoint, "a")) == (10,)


def test_gate_and_up_are_two_parts():
    checkpoint = headers({"gate": (10, 6), "up": (10, 6)})
    assert parts_of(checkpoint, torch.cat([source(checkpoint, "gate"), source(checkpoint, "up")])) == (10, 10)


def test_fused_attention_has_three_parts_of_different_sizes():
    checkpoint = headers({"q": (16, 6), "k": (4, 6), "v": (4, 6)})
    assert parts_of(checkpoint, torch.cat([source(checkpoint, n) for n in "qkv"])) == (16, 4, 4)


def test_a_stack_of_fused_experts_is_cut_at_the_boundary_of_gate_and_up():
    checkpoint = headers({f"{e}.{n}": (10, 6) for e in range(3) for n in ("gate", "up")})
    gate = torch.stack([source(checkpoint, f"{e}.gate") for e in range(3)])
    up = torch.stack([source(checkpoint, f"{e}.up") for e in range(3)])
    assert parts_of(checkpoint, torch.cat([gate, up], 1)) == (10, 10)


def test_a_stack_of_whole_experts_is_one_part():
    checkpoint = headers({f"{e}": (10, 6) for e in range(3)})
    assert parts_of(checkpoint, torch.stack([source(checkpoint, f"{e}") for e in range(3)])) == (10,)


def test_rows_of_one_source_stay_one_part_wherever_they_go():
    checkpoint = headers({"a": (10, 6)})
    first, second = source(checkpoint, "a").split(5)
    assert parts_of(checkpoint, torch.cat([second, first])) == (10,)


def test_interleaved_sources_are_one_part():
    checkpoint = headers({"a": (10, 6), "b": (10, 6)})
    a, b = source(checkpoint, "a").split(5), source(checkpoint, "b").split(5)
    assert parts_of(checkpoint, torch.cat([a[0], b[0], a[1], b[1]])) == (20,)


def test_sources_side_by_side_are_one_part():
    checkpoint = headers({"a": (10, 6), "b": (10, 6)})
    assert parts_of(checkpoint, torch.cat([source(checkpoint, "a"), source(checkpoint, "b")], 1)) == (10,)


def test_a_transposed_stack_is_cut_along_its_out_axis():
    checkpoint = headers({"gate": (3, 6, 10), "up": (3, 6, 4)})  # [experts, in, out]
    fused = torch.cat([source(checkpoint, "gate"), source(checkpoint, "up")], -1)
    assert parts_of(checkpoint, fused, transposed=True) == (10, 4)


# -- placements -------------------------------------------------------------------------------------------------------


def test_a_transposed_stack_is_stored_the_other_way_round_only_when_quantized():
    checkpoint = headers({"a": (3, 6, 10)})
    wanted = [target("experts", source(checkpoint, "a"), kinds.EXPERTS, transposed=True)]
    (placement,) = make_plan(checkpoint, wanted, Recipe("fp8_channel")).placements
    assert (placement.shape, placement.scale_shape) == ((3, 10, 6), (3, 10, 1))
    assert placement.pieces == (Piece((0, 0, 0), (3, 10, 6), "a", 0, (60, 1, 10)),)
    (placement,) = make_plan(checkpoint, wanted, Recipe(None)).placements
    assert placement.shape == (3, 6, 10)


def test_plan_keeps_router_in_bf16():
    checkpoint = headers(
        {"model.layers.0.mlp.gate.weight": (8, 64), "model.layers.0.mlp.experts.0.w1.weight": (64, 64)}
    )
    found = {p.name.split(".")[-2]: (p.dtype_name, p.reason) for p in plan_checkpoint(checkpoint, Recipe()).placements}
    assert found == {"gate": ("BF16", "MoE router, kept by default"), "w1": ("F8_E4M3", "linear")}


def test_a_kept_tensor_keeps_its_own_dtype():
    names = {"a": "F32", "b": "I64", "c": "BOOL", "d": "F8_E4M3", "e": "F4"}
    checkpoint = headers(dict.fromkeys(names, (4, 6)), names)
    plan = plan_checkpoint(checkpoint, Recipe())
    assert {p.name: p.dtype_name for p in plan.placements} == names
    assert {p.name: p.nbytes for p in plan.placements} == {"a": 96, "b": 192, "c": 24, "d": 24, "e": 12}


def test_a_kept_parameter_takes_the_dtype_of_the_model():
    checkpoint = headers({"a": (4, 6)}, "F32")
    (placement,) = make_plan(
        checkpoint, [Target("a", (4, 6), torch.bfloat16, "vector", (whole("a", (4, 6)),))], Recipe()
    ).placements
    assert (placement.dtype, placement.source_bytes, placement.final_bytes) == (torch.bfloat16, 96, 48)


def test_an_empty_matrix_is_kept():
    (placement,) = plan_checkpoint(headers({"a.weight": (0, 6)}), Recipe()).placements
    assert (placement.scheme, placement.reason) == (None, "empty")


def test_a_source_of_an_odd_dtype_keeps_the_whole_parameter():
    checkpoint = headers({"a": (4, 6), "b": (4, 6)}, {"b": "I8"})
    fused = torch.cat([source(checkpoint, "a"), source(checkpoint, "b")])
    (placement,) = make_plan(checkpoint, [target("p", fused)], Recipe()).placements
    assert (placement.scheme, placement.reason) == (None, "int8, not bf16, fp16 or fp32")
    assert placement.source_dtype_names == ("BF16", "I8")


def test_what_its_readers_could_not_take_is_kept_and_says_so():
    checkpoint = headers({"model.layers.0.mlp.experts.gate_up_proj": (4, 64, 96)})

    def veto(name: str, shape: tuple[int, ...], kind: str, scheme: str) -> str:
        return f"{kind} {list(shape)} can't be {scheme} here"

    (placement,) = plan_checkpoint(checkpoint, Recipe(), veto=veto).placements
    assert placement.scheme is None
    assert placement.reason == "experts [4, 64, 96] can't be fp8_channel here"


# -- the order of reading ---------------------------------------------------------------------------------------------


def test_placements_come_in_the_order_in_which_the_files_hold_them():
    checkpoint = headers(dict.fromkeys("abcd", (4, 6)), shard_of={"a": 1, "b": 0, "c": 1, "d": 0})
    targets = [target(name, source(checkpoint, name)) for name in "abcd"]
    assert [p.name for p in make_plan(checkpoint, targets, Recipe()).placements] == ["b", "d", "a", "c"]


def test_a_fused_parameter_comes_when_its_first_source_does():
    checkpoint = headers(dict.fromkeys("abc", (4, 6)))
    fused = torch.cat([source(checkpoint, "c"), source(checkpoint, "a")])
    plan = make_plan(checkpoint, [target("b", source(checkpoint, "b")), target("ca", fused)], Recipe())
    assert [p.name for p in plan.placements] == ["ca", "b"]
    assert [piece.src_name for piece in plan.placements[0].pieces] == ["a", "c"]


def test_pieces_of_one_source_come_in_the_order_of_the_file():
    checkpoint = headers({"a": (9, 6)})
    first, second, third = source(checkpoint, "a").split(3)
    plan = make_plan(checkpoint, [target("p", torch.cat([third, first, second]))], Recipe())
    assert [piece.src_off for piece in plan.placements[0].pieces] == [0, 18, 36]


# -- forecast ---------------------------------------------------------------------------------------------------------


def small_plan(scheme: str | None = "fp8_channel", **options):
    shapes = {
        "model.embed_tokens.weight": (100, 64),
        "model.layers.0.mlp.up_proj.weight": (256, 64),
        "model.norm.weight": (64,),
    }
    return plan_checkpoint(headers(shapes), Recipe(scheme), **options)


def test_the_forecast_adds_up():
    plan = small_plan(staging_bytes=1 << 20)
    kept = (100 * 64 + 64) * 2
    assert plan.source_bytes == kept + 256 * 64 * 2
    assert plan.final_bytes() == kept + 256 * 64 + 256 * 4
    staging_bytes = plan.peak_bytes() - plan.final_bytes()
    assert Budget.fit(plan.placements, plan.staging_bytes).staging_bytes == staging_bytes <= 1 << 20
    assert plan.peak_bytes("cpu") == plan.peak_bytes()
    assert plan.read_bytes == plan.source_bytes


def test_the_forecast_is_given_for_each_device():
    checkpoint = headers({"a": (4, 6), "b": (8, 6)})
    targets = [target("a", source(checkpoint, "a")), target("b", source(checkpoint, "b"), device="cuda:0")]
    plan = make_plan(checkpoint, targets, Recipe(None), other_bytes={"cuda:1": 7})
    assert plan.devices == ("cpu", "cuda:0", "cuda:1")
    assert [plan.final_bytes(d) for d in (*plan.devices, None)] == [48, 96, 7, 151]
    card, host = (Budget.fit(part.placements, plan.staging_bytes) for part in plan.parts())
    assert (card.device, host.device) == (torch.device("cuda:0"), torch.device("cpu"))
    assert plan.peak_bytes("cpu") - 48 == max(card.host_bytes, host.host_bytes)  # one after the other
    assert plan.peak_bytes("cuda:0") - 96 == card.device_bytes
    assert "cuda:0: final 96 B, peak at most 256.00 MiB" in plan.table()


def test_what_is_read_twice_counts_twice():
    plan = plan_checkpoint(headers({"a.weight": (4096, 4096)}), Recipe("fp8_tensor"))
    assert plan.read_bytes == 2 * plan.source_bytes


# -- presentation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", "fp8_tensor", "mxfp8", None])
def test_a_plan_is_json_able(scheme):
    plan = small_plan(scheme)
    data = json.loads(json.dumps(plan.to_dict()))
    assert data == plan.to_dict()
    assert [t["name"] for t in data["tensors"]] == [p.name for p in plan.placements]
    assert data["final_bytes"] == plan.final_bytes() == sum(t["bytes"] for t in data["tensors"])
    assert data["recipe"]["scheme"] == scheme
    assert [bool(t["scheme"]) for t in data["tensors"]] == [False, bool(scheme), False]


def test_the_diff_of_a_plan_with_itself_is_empty():
    assert small_plan().diff(small_plan()) == []


def test_a_diff_shows_what_changes():
    name = "model.layers.0.mlp.up_proj.weight"
    assert small_plan().diff(small_plan("mxfp8")) == [f"~ {name}: fp8_channel [256, 64] -> mxfp8 [256, 64]"]
    assert small_plan().diff(small_plan(None)) == [f"~ {name}: fp8_channel [256, 64] -> BF16 [256, 64]"]


def test_a_diff_shows_what_comes_and_goes():
    one = plan_checkpoint(headers({"a": (4,), "b": (4,)}), Recipe())
    two = plan_checkpoint(headers({"b": (5,), "c": (4,)}), Recipe())
    assert one.diff(two) == ["- a", "~ b: BF16 [4] -> BF16 [5]", "+ c"]


def test_a_diff_shows_a_change_of_device():
    one, two = (plan_checkpoint(headers({"a": (4,)}), Recipe(), device=d) for d in ("cpu", "cuda:0"))
    assert one.diff(two) != []


def test_a_diff_shows_a_change_of_parts():
    checkpoint = headers({"a": (4, 6), "b": (4, 6), "c": (8, 6)})
    fused = make_plan(
        checkpoint, [target("p", torch.cat([source(checkpoint, "a"), source(checkpoint, "b")]))], Recipe("fp8_tensor")
    )
    alone = make_plan(checkpoint, [target("p", source(checkpoint, "c"))], Recipe("fp8_tensor"))
    assert fused.diff(alone) != []


def test_the_table_shows_what_becomes_of_each_tensor_and_why():
    text = str(small_plan())
    for words in (
        "model.layers.*.mlp.up_proj.weight",
        "256x64",
        "fp8_channel",
        "embedding, kept by default",
        "peak at most",
    ):
        assert words in text


def test_a_plan_can_not_be_changed():
    with pytest.raises(AttributeError):
        small_plan().placements = ()
    with pytest.raises(AttributeError):
        small_plan().placements[0].scheme = None


def test_parts_of_many_rows_are_found_in_one_pass() -> None:
    """A fused parameter that comes row by row: two tensors of interleaved experts, a third one below."""
    rows = 4096
    pieces = [Piece((row, 0), (1, 8), "ab"[row % 2] if row < 100 else "c", 0, (8, 1)) for row in range(rows)]
    assert cut_parts((rows, 8), pieces) == (100, rows - 100)
    assert cut_parts((rows, 8), [piece._replace(src_name=str(piece.dst_off[0])) for piece in pieces]) == (1,) * rows
