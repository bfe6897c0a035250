"""Random views of a parameter: the boxes must cover what a write through the view changes, element by element."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.properties import examples
from helpers.views import view_of
from octavo.elements.boxes import Box, Gaps
from octavo.elements.views import trace_view


@examples(300)
@given(st.data())
def test_boxes_of_a_view_take_exactly_what_a_copy_to_it_writes(data):
    shape = data.draw(st.lists(st.integers(1, 6), max_size=4))
    order = data.draw(st.permutations(range(len(shape))))
    stored = torch.zeros([shape[d] for d in order], dtype=torch.int64).permute(
        [order.index(d) for d in range(len(shape))]
    )
    view = view_of(data.draw, stored)
    values = torch.arange(1, view.numel() + 1).view(view.shape)
    view.copy_(values)
    written = stored.clone()
    pieces = trace_view(
        stored.shape, stored.stride(), view.storage_offset(), view.shape, view.stride(), values.stride()
    )
    stored.zero_()
    gaps = Gaps(stored.shape)
    for piece in pieces:
        box = piece.box
        assert gaps.written(box) is None
        gaps.fill(box)
        piece.region(stored).copy_(values.reshape(-1).as_strided(piece.size, piece.src_strides, piece.src_off))
    assert torch.equal(stored, written)
    assert sum(gap.numel for gap in gaps.boxes) == int((written == 0).sum())
    assert bool(gaps) == bool((written == 0).any())


@given(st.data())
def test_gaps_are_what_no_box_has_covered(data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    seen, gaps = torch.zeros(shape, dtype=torch.bool), Gaps(shape)
    for _ in range(data.draw(st.integers(0, 8))):
        off = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        box = Box(off, tuple(data.draw(st.integers(1, n - a)) for a, n in zip(off, shape, strict=True)))
        again = gaps.written(box)
        assert (again is not None) == bool(seen[box.slices].any())
        if again is not None:
            assert bool(seen[again.slices].all())
        gaps.fill(box)
        seen[box.slices] = True
    left = torch.ones(shape, dtype=torch.int64)
    for gap in gaps.boxes:
        left[gap.slices] -= 1
    assert torch.equal(left == 0, ~seen)
    assert int(left.min()) >= 0
