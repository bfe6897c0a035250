"""Whatever box is decoded, and wherever in its scale groups it begins, it equals that part of the whole."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import same_bytes
from helpers.quantized import SCALES, Stored, stored
from octavo.checkpoint.codings import Decoding
from octavo.numerics.decoding import decode, decode_into, scale_cells, zero_cells
from octavo.numerics.groups import count_cells

SIDES = st.integers(1, 20)
GROUPS = st.sampled_from([None, 1, 2, 3, 4, 8, 16])


@st.composite
def cases(draw: st.DrawFn) -> tuple[Decoding, Stored]:
    kind = draw(st.sampled_from(sorted(SCALES)))
    decoding = Decoding(kind, draw(GROUPS), draw(GROUPS), draw(st.booleans()))
    shape = (*draw(st.lists(st.integers(1, 2), max_size=1)), draw(SIDES), draw(SIDES))
    zeros = kind.startswith("int") and draw(st.booleans())
    return decoding, stored(shape, decoding, draw(st.sampled_from(SCALES[kind])), draw(st.integers(0, 99)), zeros=zeros)


def of_whole(decoding: Decoding, held: Stored) -> torch.Tensor:
    return decode(
        tuple(held.weight.shape),
        held.codes,
        held.scale,
        decoding,
        zero_point=held.zero_point,
        global_scale=held.global_scale,
    )


@given(cases())
def test_a_whole_tensor_is_what_its_numbers_stand_for(case: tuple[Decoding, Stored]) -> None:
    assert same_bytes(of_whole(*case), case[1].weight)


@given(cases(), st.data())
def test_any_box_is_that_part_of_the_whole(case: tuple[Decoding, Stored], data: st.DataObject) -> None:
    decoding, held = case
    *lead, rows, cols = held.weight.shape
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    height, width = data.draw(st.integers(1, rows - top)), data.draw(st.integers(1, cols - left))
    pack = decoding.pack
    words = slice(left // pack, -(-(left + width) // pack))
    cells, phase = [], []
    for first, length, group in ((top, height, decoding.group_rows), (left, width, decoding.group_cols)):
        cell, rest = divmod(first, group) if group else (0, 0)
        cells.append(slice(cell, cell + count_cells(length, group, rest)))
        phase.append(rest)
    scale = scale_cells(held.scale, decoding, held.global_scale)[..., cells[0], cells[1]]
    zero = held.zero_point
    zeros = None if zero is None else zero_cells(zero, decoding, count_cells(rows, decoding.group_rows))
    out = torch.full((*lead, height, width), 7.0)
    decode_into(
        out,
        held.codes[..., top : top + height, words],
        scale,
        decoding,
        zero_point=None if zeros is None else zeros[..., cells[0], cells[1]],
        phase=(phase[0], phase[1]),
        head=left % pack,
    )
    assert same_bytes(out, held.weight[..., top : top + height, left : left + width].contiguous())
