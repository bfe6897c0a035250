"""The page of the design names files and what is in them as they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "design.md").read_text()
SPANS = re.findall(r"`([^`]+)`", TEXT)
FILES = sorted({span for span in SPANS if re.fullmatch(r"[\w/]+(\.py|/)", span)})
#: "`file.py`: `name`, `name`", as the table of changes has it
NAMED = [
    (file, name)
    for file, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", TEXT)
    for name in re.findall(r"`([\w.]+)`", names)
]


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_the_design_names_is_there(file):
    assert (ROOT / "src" / "octavo" / file).exists() or (ROOT / file).exists()


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_name_is_in_the_file_that_the_design_says(file, name):
    text = (ROOT / "src" / "octavo" / file).read_text()
    for part in name.split("."):
        assert re.search(rf"^\s*(def|class) {part}\b|^{part}\b", text, re.MULTILINE), part


def test_every_folder_is_a_layer_of_the_design():
    table = TEXT.partition("## Layers")[2].partition("## Words")[0]
    folders = {path.name for path in (ROOT / "src" / "octavo").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(re.findall(r"`(\w+)/`", table))
    files = {path.name for path in (ROOT / "src" / "octavo").glob("*.py") if not path.name.startswith("_")}
    aliases = {path for path in files if "documented name of" in (ROOT / "src" / "octavo" / path).read_text()}
    assert files - aliases - {"cli_options.py", "cli_output.py", "cli_plan.py"} == set(
        re.findall(r"`(\w+\.py)`", table)
    ) - {"test_layers.py"}


def test_the_design_is_two_pages_at_most():
    assert len(re.findall(r"[\w/.`]+", TEXT)) <= 900
