"""Pieces: symbolic execution against the same operations on real tensors, and coverage by boxes."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers import assemble, realize
from octavo.elements.boxes import coverage_problem
from octavo.elements.pieces import Piece, contiguous_strides, whole
from octavo.elements.symbolic import NotMovementError, Symbolic

A, B, C = (4, 6), (4, 6), (2, 3, 4)

MOVEMENTS = {
    "as it is": lambda a, b, c: a,
    "cat of rows": lambda a, b, c: torch.cat([a, b]),
    "cat of columns": lambda a, b, c: torch.cat([a, b], -1),
    "cat of slices": lambda a, b, c: torch.cat([b[1:3], a, b[3:]]),
    "stack": lambda a, b, c: torch.stack([a, b]),
    "stack at the end": lambda a, b, c: torch.stack([b, a], -1),
    "stack in between, transposed": lambda a, b, c: torch.stack([a, b], 1).transpose(0, 2),
    "chunk": lambda a, b, c: a.chunk(2)[1],
    "chunk, ragged": lambda a, b, c: b.chunk(4, 1)[2],
    "chunk, negative axis": lambda a, b, c: a.chunk(3, dim=-1)[0],
    "split": lambda a, b, c: a.split(3)[1],
    "split by sizes": lambda a, b, c: torch.cat(a.split([1, 2, 3], dim=1)[::-1], 1),
    "tensor_split": lambda a, b, c: a.tensor_split(4, 1)[1],
    "narrow": lambda a, b, c: a.narrow(1, 2, 3),
    "slice from the end": lambda a, b, c: a[:, -2:],
    "slice of nothing": lambda a, b, c: a[2:2],
    "slice beyond": lambda a, b, c: a[2:100],
    "select": lambda a, b, c: c[1],
    "select, negative": lambda a, b, c: c.select(-1, -1),
    "index": lambda a, b, c: c[0, 1:, 2],
    "unbind": lambda a, b, c: torch.stack(c.unbind(1)[::-1]),
    "unbind of rows": lambda a, b, c: torch.cat([row[None] for row in a.unbind()]),
    "squeeze": lambda a, b, c: a[1:2].squeeze(),
    "squeeze of an axis": lambda a, b, c: a[1:2, 1:2].squeeze(1),
    "squeeze of several axes": lambda a, b, c: a[1:2, None, :].squeeze((0, 1)),
    "squeeze of a wide axis does nothing": lambda a, b, c: a.squeeze(0),
    "unsqueeze": lambda a, b, c: a.unsqueeze(0).unsqueeze(-1),
    "transpose": lambda a, b, c: a.transpose(0, 1),
    "t": lambda a, b, c: a.t(),
    "T of a cat": lambda a, b, c: torch.cat([a, b], 1).T,
    "mT": lambda a, b, c: c.mT,
    "permute": lambda a, b, c: c.permute(2, 0, 1),
    "permute, negative": lambda a, b, c: c.permute(-1, 0, 1),
    "movedim": lambda a, b, c: c.movedim(0, -1),
    "view": lambda a, b, c: a.view(2, 2, 6),
    "view with -1": lambda a, b, c: a.view(2, -1, 3),
    "view across rows": lambda a, b, c: a.view(3, 8),
    "view that merges": lambda a, b, c: c.view(6, 4),
    "flatten": lambda a, b, c: c.flatten(),
    "flatten of some": lambda a, b, c: c.flatten(1),
    "unflatten": lambda a, b, c: a.unflatten(1, (2, 3)),
    "view of ones": lambda a, b, c: a.view(1, 4, 1, 6, 1),
    "reshape of a slice": lambda a, b, c: a[1:3].reshape(12),
    "reshape of a column slice": lambda a, b, c: a[:, 1:4].reshape(2, 6),
    "reshape after a transpose": lambda a, b, c: a.t().reshape(3, 8),
    "reshape after a cat": lambda a, b, c: torch.cat([a, b], 1).reshape(6, 8),
    "reshape across a ragged cat": lambda a, b, c: torch.cat([a[:1], b[:2]]).reshape(2, 9),
    "rope's permutation": lambda a, b, c: a.view(2, 2, 1, 6).transpose(1, 2).reshape(4, 6),
    "interleave": lambda a, b, c: torch.stack([a, b], 1).flatten(0, 1),
    "interleave of columns": lambda a, b, c: torch.stack([a, b], -1).reshape(4, 12),
    "deinterleave": lambda a, b, c: a.view(2, 2, 6).transpose(0, 1).reshape(4, 6).chunk(2)[1],
    "gate and up of stacked experts": lambda a, b, c: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1),
    "contiguous and clone": lambda a, b, c: a.t().contiguous().clone(),
    "detach": lambda a, b, c: a.detach(),
    "cast": lambda a, b, c: a.to(torch.float64),
    "a lone element": lambda a, b, c: a[1, 2],
    "a view of a lone element": lambda a, b, c: a[1, 2].view(1, 1),
}


def sources() -> dict[str, torch.Tensor]:
    numbers = itertools.count()
    return {
        name: torch.tensor([next(numbers) for _ in range(torch.Size(shape).numel())], dtype=torch.float32).view(shape)
        for name, shape in (("a", A), ("b", B), ("c", C))
    }


def symbols() -> list[Symbolic]:
    return [Symbolic.source(name, tensor.shape, tensor.dtype) for name, tensor in sources().items()]


@pytest.mark.parametrize("name", MOVEMENTS)
def test_symbolic_execution_says_where_every_element_comes_from(name):
    real = sources()
    expected = MOVEMENTS[name](*real.values())
    symbolic = MOVEMENTS[name](*symbols())
    assert symbolic.shape == expected.shape
    assert symbolic.dtype == expected.dtype
    assert coverage_problem(symbolic.shape, symbolic.pieces) is None
    assert torch.equal(assemble(symbolic.shape, symbolic.pieces, real), expected.float())


@pytest.mark.parametrize(
    "compute",
    [
        lambda a: a + 1,
        lambda a: a * 2,
        lambda a: a.flip(0),
        lambda a: a[::2],
        lambda a: a.expand(2, 4, 6),
        lambda a: a.repeat(2, 1),
        lambda a: a.roll(1),
        lambda a: a[[1, 0]],
        lambda a: a.sum(),
        lambda a: torch.where(a > 0, a, a),
    ],
)
def test_an_operation_that_computes_is_refused(compute):
    with pytest.raises(NotMovementError):
        compute(symbols()[0])


def test_movement_keeps_few_pieces():
    a, b, _ = symbols()
    assert len(torch.cat([a, b]).pieces) == 2
    assert len(a.view(2, 2, 6).transpose(0, 1).reshape(4, 6).pieces) <= 2
    assert len(torch.stack([a, b]).transpose(1, 2).pieces) == 2


def test_symbols_print_their_shape():
    assert repr(symbols()[2]) == "Symbolic([2, 3, 4], 1 pieces)"


# -- one piece --------------------------------------------------------------------------------------------------------


def test_narrowing_and_permuting_a_piece_is_narrowing_and_permuting_its_values():
    real = sources()
    piece = whole("c", C)
    assert torch.equal(realize(piece.narrow(1, 1, 2), real), real["c"][:, 1:3])
    assert piece.narrow(1, 1, 2).dst_off == (0, 1, 0)
    assert torch.equal(realize(piece.permute((2, 0, 1)), real), real["c"].permute(2, 0, 1))
    assert piece.narrow(0, 1, 1).dst_end == (2, 3, 4)


def test_the_region_of_a_piece_is_a_view():
    parameter = torch.zeros(4, 6)
    Piece((1, 2), (2, 3), "a", 0, (3, 1)).region(parameter).fill_(1)
    assert int(parameter.sum()) == 6
    assert bool((parameter[1:3, 2:5] == 1).all())


@pytest.mark.parametrize(
    "piece",
    [
        whole("c", C),
        whole("c", C).narrow(2, 1, 2),
        whole("c", C).narrow(1, 1, 2),
        whole("c", C).permute((2, 1, 0)),
        whole("c", C).permute((1, 0, 2)).narrow(0, 1, 1),
        whole("c", C).narrow(0, 1, 1).narrow(1, 2, 1).narrow(2, 3, 1),
        Piece((0, 0, 0), (4, 1, 3), "c", 1, (4, 0, 1)),
    ],
    ids=str,
)
def test_runs_read_in_file_order_hold_the_piece(piece):
    real = sources()
    flat = real["c"].flatten()
    length, offsets = piece.runs()
    offsets = list(offsets)
    assert offsets == sorted(offsets)
    assert length * len(offsets) == piece.numel
    read = torch.cat([flat[offset : offset + length] for offset in offsets])
    order = piece.file_order()
    in_file = read.view([piece.size[d] for d in order])
    assert torch.equal(in_file.permute([order.index(d) for d in range(len(order))]), realize(piece, real))


def test_runs_are_as_long_as_possible():
    assert whole("c", C).runs()[0] == 24
    assert whole("c", C).narrow(1, 0, 2).runs()[0] == 8
    assert whole("c", C).permute((2, 0, 1)).runs()[0] == 24
    assert whole("", ()).runs()[0] == 1


def test_contiguous_strides_are_those_of_torch():
    for shape in ((), (5,), (2, 3), (2, 1, 3)):
        assert contiguous_strides(shape) == torch.empty(shape).stride()


# -- coverage ---------------------------------------------------------------------------------------------------------


def box(name: str, *spans: tuple[int, int]) -> Piece:
    size = tuple(stop - start for start, stop in spans)
    return Piece(tuple(start for start, _ in spans), size, name, 0, contiguous_strides(size))


def test_boxes_that_tile_are_no_problem():
    assert (
        coverage_problem((4, 6), [box("a", (0, 4), (0, 3)), box("b", (0, 1), (3, 6)), box("c", (1, 4), (3, 6))]) is None
    )
    assert coverage_problem((), [whole("a", ())]) is None
    assert coverage_problem((0, 6), [whole("a", (0, 6))]) is None
    assert coverage_problem((0, 6), []) is None


def test_a_gap_is_found_counted_and_named():
    problem = coverage_problem((4, 6), [box("a", (0, 4), (0, 5))])
    assert problem == "4 of 24 elements come from no checkpoint tensor: [0:4, 5:6]"
    assert coverage_problem((1000, 6), []) == "6,000 of 6,000 elements come from no checkpoint tensor"
    assert coverage_problem((), []) == "1 of 1 elements come from no checkpoint tensor"


def test_the_gaps_of_a_stack_are_named():
    """Up of every expert is missing, as if the checkpoint called it otherwise."""
    stack = [box(f"gate{e}", (e, e + 1), (0, 4), (0, 6)) for e in (5, 3, 0, 1, 4, 2)]
    problem = coverage_problem((6, 8, 6), stack)
    assert problem == (
        "144 of 288 elements come from no checkpoint tensor: [0:1, 4:8, 0:6], [1:2, 4:8, 0:6], [2:3, 4:8, 0:6], "
        "[3:4, 4:8, 0:6] and 2 more"
    )


def test_an_overlap_is_found_though_the_count_is_right():
    """One half loaded twice and the other never: as many elements as there should be."""
    problem = coverage_problem((4, 6), [box("a", (0, 2), (0, 6)), box("b", (0, 2), (0, 6))])
    assert problem == "b and a both fill [0:2, 0:6]"


def test_a_partial_overlap_with_the_right_count_is_found():
    problem = coverage_problem((4, 4), [box("a", (0, 3), (0, 3)), box("b", (2, 4), (2, 4)), box("c", (3, 4), (0, 3))])
    assert problem == "b and a both fill [2:3, 2:3]"


def test_two_tensors_for_one_scalar_are_an_overlap():
    assert coverage_problem((), [whole("a", ()), whole("b", ())]) == "b and a both fill []"


@pytest.mark.parametrize(
    "piece", [box("a", (0, 5), (0, 6)), box("a", (1, 5), (0, 6)), whole("a", (24,)), whole("a", (4, 6, 1))]
)
def test_a_box_outside_of_the_parameter_is_found(piece):
    problem = coverage_problem((4, 6), [piece])
    assert problem is not None
    assert "outside of [4, 6]" in problem


def test_a_box_before_the_beginning_is_found_though_the_count_is_right():
    piece = Piece((-1,), (4,), "a", 0, (1,))
    problem = coverage_problem((4,), [piece])
    assert problem is not None
    assert "outside" in problem
