"""Blocks of what a rank reads of a file: their runs, bundles and reads."""

from __future__ import annotations

import pytest

from helpers import headers
from octavo.elements.pieces import Piece
from octavo.planning.blocks import Block, Run, cut_blocks, cut_reads
from octavo.planning.placement import Placement

EXPERTS, ROWS, COLS = 4, 64, 128
NAMES = [f"{expert}.{part}" for expert in range(EXPERTS) for part in ("down", "gate", "up")]


def placements(rank, ranks):
    """Rows of gate and up, columns of down, of all experts."""
    half, width = ROWS // ranks, ROWS // ranks
    w13 = [
        Piece((e, half * part, 0), (1, half, COLS), f"{e}.{name}", rank * half * COLS, (ROWS * COLS, COLS, 1))
        for e in range(EXPERTS)
        for part, name in enumerate(("gate", "up"))
    ]
    w2 = [Piece((e, 0, 0), (1, COLS, ROWS), f"{e}.down", 0, (ROWS * COLS, ROWS, 1)) for e in range(EXPERTS)]
    columns = None if ranks == 1 else (rank * width, (rank + 1) * width)
    common = ("F8_E4M3", ("BF16",), "fp8_channel", "")
    return [
        Placement("w2", (EXPERTS, COLS, ROWS), *common, tuple(w2), (COLS,), "cpu", 0, (), columns),
        Placement("w13", (EXPERTS, 2 * half, COLS), *common, tuple(w13), (half, half), "cpu", 0),
    ]


@pytest.fixture
def checkpoint():
    return headers({name: (COLS, ROWS) if name.endswith("down") else (ROWS, COLS) for name in NAMES})


@pytest.mark.parametrize("rank", [0, 1])
def test_other_ranks_rows_neither_end_a_block_nor_keep_experts_apart(rank, checkpoint):
    (block,) = cut_blocks(placements(rank, 2), checkpoint.tensors, 1 << 20)
    matrix = ROWS * COLS * 2
    assert block.nbytes == EXPERTS * 2 * matrix
    # of gate and up a half, which no other rank reads; of down all of it
    half = matrix // 2
    assert [(run.nbytes, run.shared) for run in block.runs] == [(matrix, True), (half, False), (half, False)] * EXPERTS
    assert [(bundle.placement.name, len(bundle.chunks), bundle.piece.size) for bundle in block.bundles] == [
        ("w2", EXPERTS, (EXPERTS, COLS, ROWS)),
        ("w13", 2 * EXPERTS, (EXPERTS, ROWS, COLS)),
    ]


def test_a_block_goes_forward_in_its_file_and_is_no_larger_than_allowed(checkpoint):
    matrix = ROWS * COLS * 2
    blocks = list(cut_blocks(placements(1, 2), checkpoint.tensors, 3 * matrix))
    assert [block.nbytes for block in blocks] == [3 * matrix, 3 * matrix, 2 * matrix]
    for block in blocks:
        ends = [run.offset + run.nbytes for run in block.runs]
        assert all(end <= run.offset for end, run in zip(ends, block.runs[1:], strict=False))


def reads_of(*lengths, slot_bytes=100):
    offsets = [1000 * number for number in range(len(lengths))]
    runs = tuple(Run(0, offset, length) for offset, length in zip(offsets, lengths, strict=True))
    block = Block(runs, sum(lengths), (), False)
    reads = cut_reads([block], slot_bytes)
    return [(read.start, tuple(run[1:3] for run in read.runs), read.nbytes, read.last) for read in reads]


def test_short_runs_share_a_slot_and_a_long_one_has_its_own():
    assert reads_of(30, 40, 250, 60, 70) == [
        (0, ((0, 30), (1000, 40)), 70, False),
        (70, ((2000, 100),), 100, False),
        (170, ((2100, 100),), 100, False),
        (270, ((2200, 50),), 50, False),
        (320, ((3000, 60), (4000, 40)), 100, False),
        (420, ((4040, 30),), 30, True),
    ]


def test_a_block_without_bytes_is_read_all_the_same():
    assert reads_of(0) == [(0, (), 0, True)]
    assert reads_of(100, 100) == [(0, ((0, 100),), 100, False), (100, ((1000, 100),), 100, True)]
