"""What a placement is asked for often: its scheme, and whether its sources pass through."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest

from helpers.coded import coding_of, encoded, write_coded
from octavo.checkpoint.codings import Decoding
from octavo.numerics import schemes
from octavo.planning import placement as placements
from octavo.planning.chunks import cut_placement
from octavo.planning.placement import Placement
from octavo.planning.plan import plan_checkpoint
from octavo.planning.recipe import Recipe


@pytest.fixture
def blocks(tmp_path: Path) -> Placement:
    """Two blocks below each other, which stay what they are."""
    coding = coding_of("a.weight", (256, 128), Decoding("float8", 128, 128))
    checkpoint, _ = write_coded(tmp_path, {"a.weight": (coding, encoded(coding, 0))})
    (placement,) = plan_checkpoint(checkpoint, Recipe("fp8_block")).placements
    return placement


def test_whether_sources_pass_through_is_decided_once(blocks: Placement, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def passes(*args: Any) -> bool:
        asked.append(args)
        return real(*args)

    real = placements.passes
    monkeypatch.setattr(placements, "passes", passes)
    made = dataclasses.replace(blocks, device="meta")
    assert len(asked) == 1
    assert len(list(cut_placement(made, 128 * 128))) > 1
    assert made.passed
    assert len(asked) == 1


def test_it_follows_what_is_replaced(blocks: Placement) -> None:
    assert blocks.passed
    assert dataclasses.replace(blocks, columns=(0, 64)).passed
    assert not dataclasses.replace(blocks, parts=(64, 192)).passed
    assert not dataclasses.replace(blocks, scheme="fp8_channel").passed
    assert not dataclasses.replace(blocks, scheme=None, parts=()).passed
    assert not dataclasses.replace(blocks, codings=()).passed
    first = blocks.pieces[0]
    moved = first._replace(size=(128, 128), src_off=64 * 128)  # from the middle of a block on
    assert not dataclasses.replace(blocks, shape=(128, 128), pieces=(moved,), parts=(128,)).passed


def test_a_copy_passes_through_as_well(blocks: Placement) -> None:
    for again in (pickle.loads(pickle.dumps(blocks)), copy.deepcopy(blocks)):
        assert again == blocks
        assert again.passed


def test_the_scheme_is_asked_without_a_grid(blocks: Placement, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placements, "ScaleGrid", None)
    assert blocks.rule is schemes.get("fp8_block")
    assert blocks.memory_shape == (256, 128)
