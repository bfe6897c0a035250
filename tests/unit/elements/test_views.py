"""Views as boxes: the quick way and the general way are one, and what is no box is refused."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.properties import examples
from helpers.views import view_of
from octavo.elements.boxes import Box
from octavo.elements.pieces import Piece
from octavo.elements.views import Layout, NoBoxError, trace_view


def layout_of(tensor: torch.Tensor) -> Layout:
    return Layout(tuple(tensor.shape), tensor.stride())


def place(view: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return int(view.storage_offset()), tuple(view.shape), view.stride()


@examples(500)
@given(st.data())
def test_the_quick_way_finds_what_the_general_way_finds(data):
    shape = data.draw(st.lists(st.integers(1, 6), max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    tensor = torch.empty([shape[d] for d in order], device="meta").permute([order.index(d) for d in range(len(shape))])
    layout, view = layout_of(tensor), view_of(data.draw, tensor)
    values = torch.empty(view.shape, device="meta")
    if view.ndim > 1 and data.draw(st.booleans()):
        values = values.transpose(0, 1).contiguous().transpose(0, 1)
    found = layout.pieces(*place(view), values.stride(), 7, "source")
    with mock.patch.object(Layout, "_one_box", return_value=None):
        assert layout.pieces(*place(view), values.stride(), 7, "source") == found


@given(st.data())
def test_every_slice_is_one_box_found_the_quick_way(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    start = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    box = Box(start, tuple(data.draw(st.integers(1, n - a)) for n, a in zip(shape, start, strict=True)))
    tensor = torch.empty(shape, device="meta")
    with mock.patch.object(Layout, "_decode", side_effect=AssertionError):
        assert layout_of(tensor).boxes(*place(tensor[box.slices])) == [box]


def test_axes_may_come_in_any_order_and_values_keep_theirs():
    stack = torch.empty(3, 4, 6)
    view = stack[1, 2:].t()  # [6, 2]
    (piece,) = layout_of(stack).pieces(*place(view), (2, 1), 5, "a")
    assert piece == Piece((1, 2, 0), (1, 2, 6), "a", 5, (0, 1, 2))


def test_a_run_that_begins_and_ends_within_rows_is_three_boxes():
    tensor = torch.empty(4, 6)
    view = tensor.view(-1)[4:20]
    assert layout_of(tensor).pieces(*place(view), (1,)) == [
        Piece((0, 4), (1, 2), "", 0, (0, 1)),
        Piece((1, 0), (2, 6), "", 2, (6, 1)),
        Piece((3, 0), (1, 2), "", 14, (0, 1)),
    ]


def test_every_other_row_is_a_box_of_its_own():
    tensor = torch.empty(4, 6)
    assert layout_of(tensor).boxes(*place(tensor[1::2])) == [Box((1, 0), (1, 6)), Box((3, 0), (1, 6))]


def test_a_view_of_too_many_boxes_is_given_up_before_they_are_made():
    layout, view = Layout((1 << 20, 1 << 20), (1 << 20, 1)), (0, (1 << 20, 1 << 19), (1 << 20, 2))
    with pytest.raises(NoBoxError, match="more than 256 boxes"):
        layout.boxes(*view, at_most=256)
    assert len(Layout((4, 6), (6, 1)).boxes(0, (4, 3), (6, 2), at_most=3)) == 3
    with pytest.raises(NoBoxError, match="more than 2 boxes"):
        Layout((4, 6), (6, 1)).boxes(0, (4, 3), (6, 2), at_most=2)


def test_every_other_column_is_a_box_of_all_rows():
    boxes = [Box((0, at), (4, 1)) for at in (1, 3, 5)]
    assert Layout((4, 6), (6, 1)).boxes(1, (4, 3), (6, 2)) == boxes
    assert Layout((4, 6), (6, 1)).boxes(1, (12,), (2,)) == boxes
    assert Layout((2, 2, 6), (12, 6, 1)).boxes(2, (6,), (4,)) == [
        Box((0, 0, 2), (2, 1, 1)),
        Box((0, 1, 0), (2, 1, 1)),
        Box((0, 1, 4), (2, 1, 1)),
    ]


def test_views_without_elements_have_no_boxes():
    tensor = torch.empty(4, 6)
    assert layout_of(tensor).boxes(*place(tensor[2:2])) == []
    assert layout_of(torch.empty(0, 6)).boxes(0, (0, 6), (6, 1)) == []


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_tensor_of_one_element_is_one_box(shape):
    tensor = torch.empty(shape)
    assert layout_of(tensor).boxes(*place(tensor)) == [Box((0,) * len(shape), shape)]


@pytest.mark.parametrize(
    ("offset", "sizes", "strides"),
    [
        (-1, (), ()),
        (24, (), ()),
        (-6, (2, 6), (6, 1)),
        (18, (2, 6), (6, 1)),
        (0, (25,), (1,)),
        (0, (2, 24), (24, 1)),
        (3, (8,), (3,)),
    ],
)
def test_elements_outside_of_the_tensor_are_refused(offset, sizes, strides):
    with pytest.raises(NoBoxError, match="beyond the tensor"):
        Layout((4, 6), (6, 1)).boxes(offset, sizes, strides)


@pytest.mark.parametrize("shape", [(), (1, 1), (0, 6)])
def test_elements_outside_of_a_tensor_of_one_element_or_none_are_refused(shape):
    with pytest.raises(NoBoxError):
        Layout(shape, (6, 1)[: len(shape)]).boxes(0, (2,), (1,))


def test_a_view_that_repeats_elements_is_refused():
    with pytest.raises(NoBoxError, match="repeats elements"):
        Layout((4, 6), (6, 1)).boxes(0, (3, 6), (0, 1))


def test_of_a_tensor_with_holes_views_that_keep_its_axes_are_boxes():
    tensor = torch.empty(4, 8)[:, :6]
    layout = layout_of(tensor)
    assert layout.boxes(*place(tensor)) == [Box((0, 0), (4, 6))]
    assert layout.boxes(*place(tensor[1:3, 2:].t())) == [Box((1, 2), (2, 4))]
    for view in (tensor.as_strided((2,), (1,), 5), tensor.as_strided((), (), 7), tensor[::2]):
        with pytest.raises(NoBoxError, match=r"shape \[4, 6\] with strides \[8, 1\] is not dense"):
            layout.boxes(*place(view))


@pytest.mark.parametrize("strides", [(0, 1), (1, 1), (5, 1)])
def test_a_tensor_whose_own_elements_coincide_has_no_boxes(strides):
    with pytest.raises(NoBoxError, match="not dense"):
        Layout((4, 6), strides).boxes(0, (4, 6), strides)


def test_the_layouts_of_equal_tensors_are_made_once():
    first = trace_view((5, 7), (7, 1), 0, (5, 7), (7, 1), (7, 1))
    with mock.patch.object(Layout, "__init__", side_effect=AssertionError):
        assert trace_view([5, 7], [7, 1], 0, [5, 7], [7, 1], [7, 1]) == first
