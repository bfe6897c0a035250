"""Random loaders: however a weight is cut, mixed with others, viewed and written, the bytes are the definition's."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import SCHEMES, random_weights, same_bytes
from helpers.properties import examples
from octavo.numerics import schemes
from octavo.session import Session

COUNT = 3


def cuts(draw: Any, shape: tuple[int, int]) -> list[tuple[slice, slice]]:
    """A matrix, cut into boxes that tile it: bands of rows, some of them cut into columns."""
    rows, cols = shape
    edges = sorted({0, rows, *draw(st.lists(st.integers(1, rows - 1), max_size=3))} if rows > 1 else {0, rows})
    boxes = []
    for low, high in itertools.pairwise(edges):
        middle = draw(st.integers(1, cols - 1)) if cols > 1 and draw(st.booleans()) else cols
        boxes.append((slice(low, high), slice(0, middle)))
        if middle < cols:
            boxes.append((slice(low, high), slice(middle, cols)))
    return boxes


def write(draw: Any, target: Tensor, values: Tensor) -> None:
    """Some way to write values to a view."""
    way = draw(st.sampled_from(["copy", "transpose", "rows", "float", "in place", "assign"]))
    if way == "copy":
        target.copy_(values)
    elif way == "transpose":
        target.t().copy_(values.t())
    elif way == "rows":
        for row in range(target.shape[0]):
            target[row].copy_(values[row])
    elif way == "float":
        target.copy_(values.float())
    elif way == "in place":
        target.copy_(-values)
        target.neg_()
    else:
        target[:] = values


@examples(60)
@given(st.data())
def test_any_way_to_write_a_model_gives_the_bytes_of_the_whole(data: st.DataObject) -> None:
    draw = data.draw
    scheme, direct = draw(st.sampled_from([None, *SCHEMES])), draw(st.booleans())
    shapes = [(draw(st.integers(1, 300)), draw(st.integers(1, 200))) for _ in range(COUNT)]
    weights = [random_weights(shape, torch.bfloat16, seed) for seed, shape in enumerate(shapes)]
    model = nn.ModuleList(nn.Linear(cols, rows, bias=False, dtype=torch.bfloat16) for rows, cols in shapes)
    if draw(st.booleans()):
        model.to("meta")
    pieces = [(number, box) for number, shape in enumerate(shapes) for box in cuts(draw, shape)]
    # pieces of one weight come under its name, one after another, or all in one pair
    whole = draw(st.booleans())
    with Session(model, scheme, "cpu", direct=direct and whole) as session:
        if whole:
            order = draw(st.permutations(range(COUNT)))
            for name, weight in session.pairs((str(number), weights[number]) for number in order):
                for number, box in draw(st.permutations([p for p in pieces if p[0] == int(name)])):
                    write(draw, model[number].weight.data[box], weight[box])
        else:
            for number, box in draw(st.permutations(pieces)):
                model[number].weight.data[box].copy_(weights[number][box])
    assert sorted(event.layer for event in session.events if event.kind == "finish") == ["0", "1", "2"]
    for layer, weight in zip(model, weights, strict=True):
        if scheme is None:
            assert same_bytes(layer.weight.data, weight)
            continue
        q, scale = schemes.quantize(weight, scheme)
        assert same_bytes(layer.weight.data, q)
        assert same_bytes(layer.weight_scale.data, scale)


@examples(40)
@given(st.data())
def test_one_box_less_or_one_box_twice_is_never_a_success(data: st.DataObject) -> None:
    draw = data.draw
    shape = (draw(st.integers(2, 200)), draw(st.integers(2, 200)))
    weight = random_weights(shape, torch.bfloat16, 0)
    model = nn.ModuleList([nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)])
    boxes = cuts(draw, shape)
    chosen = draw(st.integers(0, len(boxes) - 1))
    boxes = boxes[:chosen] + boxes[chosen + 1 :] if draw(st.booleans()) else [*boxes, boxes[chosen]]
    failed = False
    try:
        with Session(model, "fp8_channel", direct=draw(st.booleans())):
            for box in draw(st.permutations(boxes)):
                model[0].weight.data[box].copy_(weight[box])
    except Exception as error:
        failed = type(error).__name__ in ("CoverageError", "LoaderError")
    assert failed
    assert model[0].weight.is_meta
