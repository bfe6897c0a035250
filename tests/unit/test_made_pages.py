"""Pages of docs/ that are made from something else are what that makes of them today."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import make_pages

MADE = make_pages.make()


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.stem)
def test_a_committed_page_is_what_its_source_makes(path):
    assert path.read_text() == MADE[path], "run `make pages`, and look at what it changes"


def test_every_page_of_measurements_is_made():
    assert {path for path in MADE if path.parent.name == "measured"} == set(make_pages.DOCS.glob("measured/*.md"))
