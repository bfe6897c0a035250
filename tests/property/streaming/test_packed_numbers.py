"""NVFP4, streamed in any way: two numbers a byte and the scales among them have the bytes of the whole tensor."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from helpers import DTYPES, headers, random_weights, same_bytes
from helpers.properties import examples
from octavo.elements.symbolic import Symbolic
from octavo.numerics import schemes
from octavo.planning import kinds
from octavo.planning.placement import Target
from octavo.planning.plan import make_plan
from octavo.planning.recipe import Recipe

from .test_numerics import WAYS, Way, streamed

SHAPES = {"a": (64, 40), "b": (40, 64)}
SIDES = st.sampled_from([16, 32, 48, 128, 160, 272])


def moved(tensor: Tensor, move: str) -> Tensor:
    """The parameter that a checkpoint tensor becomes."""
    rows, cols = tensor.shape[-2:]
    if move == "transposed":
        return tensor.mT
    if move == "columns":
        return torch.cat([tensor[..., cols // 32 * 16 :], tensor[..., : cols // 32 * 16]], -1)
    if move == "rope":
        return tensor.unflatten(-2, (rows // 2, 2)).transpose(-3, -2).reshape(tensor.shape)
    return tensor


@examples(15)
@given(
    lead=st.sampled_from([(), (1,), (3,)]),
    rows=SIDES,
    cols=SIDES,
    move=st.sampled_from(["none", "transposed", "columns", "rope"]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["normal", "bits", "sparse"]),
    seed=st.integers(0, 1 << 30),
    way=WAYS,
)
@example((), 272, 160, "transposed", torch.float32, "normal", 0, Way(700, 5, 1 << 20, 50, 4096))
@example((3,), 32, 48, "none", torch.bfloat16, "normal", 0, Way(33_000, 2, 1 << 20, 1000, 256, 1, 2))
def test_any_way_of_streaming_gives_the_bytes_of_the_whole(
    lead: tuple[int, ...], rows: int, cols: int, move: str, dtype: torch.dtype, kind: str, seed: int, way: Way
) -> None:
    weight = random_weights((*lead, rows, cols), dtype, seed, kind)
    symbolic = moved(Symbolic.source("a", weight.shape, dtype), move)
    target = Target("p", tuple(symbolic.shape), None, kinds.EXPERTS if lead else kinds.LINEAR, tuple(symbolic.pieces))
    with tempfile.TemporaryDirectory() as folder:
        placement, q, scale = streamed(Path(folder), {"a": weight}, target, "nvfp4", way)
    wanted, wanted_scale = schemes.quantize(moved(weight, move).contiguous(), "nvfp4", placement.parts)
    assert same_bytes(scale, wanted_scale)
    assert same_bytes(q, wanted)


@examples(6)
@given(rows=st.lists(SIDES, min_size=2, max_size=3), cols=SIDES, seed=st.integers(0, 1 << 30), way=WAYS)
def test_parts_have_the_bytes_of_tensors_alone(rows: list[int], cols: int, seed: int, way: Way) -> None:
    sources = {
        f"t{n}": random_weights((side, cols), torch.bfloat16, seed + n) * 20.0 ** (n - 1) for n, side in enumerate(rows)
    }
    symbolic = torch.cat([Symbolic.source(name, tensor.shape, tensor.dtype) for name, tensor in sources.items()])
    target = Target("p", tuple(symbolic.shape), None, kinds.LINEAR, tuple(symbolic.pieces))
    with tempfile.TemporaryDirectory() as folder:
        placement, q, scale = streamed(Path(folder), sources, target, "nvfp4", way)
    assert placement.parts == tuple(rows)
    alone = [schemes.quantize(tensor, "nvfp4") for tensor in sources.values()]
    assert same_bytes(q, torch.cat([codes for codes, _ in alone]))
    assert scale.flatten().tolist() == [each.item() for _, each in alone]


def test_what_has_columns_of_another_number_stays_with_the_reason() -> None:
    symbols = {name: Symbolic.source(name, shape, torch.bfloat16) for name, shape in SHAPES.items()}
    symbols["b"] = torch.cat(symbols["b"].split([40, 24], 1)[::-1], 1)
    targets = [Target(name, SHAPES[name], None, kinds.LINEAR, tuple(made.pieces)) for name, made in symbols.items()]
    plan = make_plan(headers(SHAPES), targets, Recipe("nvfp4"))
    assert {p.name: (p.scheme, p.reason) for p in plan.placements} == {
        "a": (None, "nvfp4: 40 columns, no multiple of 16"),
        "b": (None, "nvfp4: 24 columns, no multiple of 16"),
    }
