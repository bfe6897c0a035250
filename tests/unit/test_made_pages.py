"""Pages of docs/ that are made from something else are what that makes of them today."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import octavo

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import make_pages
from measured import summary

README = (Path(__file__).parents[2] / "README.md").read_text()
MADE = make_pages.make()


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.stem)
def test_a_committed_page_is_what_its_source_makes(path):
    assert path.read_text() == MADE[path], "run `make pages`, and look at what it changes"


def test_every_page_of_measurements_is_made():
    assert {path for path in MADE if path.parent.name == "measured"} == set(make_pages.DOCS.glob("measured/*.md"))


def test_the_figures_of_the_readme_are_those_of_the_committed_results():
    for made in (summary.headline(), summary.readme_table()):
        assert " ".join(made.split()) in " ".join(README.split()), f"README is to hold:\n{made}"


def test_the_readme_is_short():
    assert len(README.split()) <= 700


def test_the_reference_has_every_public_name():
    text = (make_pages.DOCS / "reference" / "api.md").read_text()
    assert set(re.findall(r"heading: octavo\.(\w+)", text)) == set(octavo.__all__) - {"OctavoError"}
