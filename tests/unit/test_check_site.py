"""The checker of the built documentation tells links that lead nowhere, and pages that fetch from other hosts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import check_site


def write(root: Path, **pages: str) -> Path:
    root.mkdir()
    for name, text in pages.items():
        (root / f"{name}.html").write_text(text)
    return root


def test_a_site_whose_links_lead_somewhere_passes(tmp_path):
    site = write(
        tmp_path / "site",
        index='<h2 id="here"></h2><a href="other.html#there">x</a><a href="#here">x</a><a href="https://a.b/c">x</a>',
        other='<a name="there"></a><script src="index.html"></script>',
    )
    assert check_site.problems(site) == []


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ('<a href="none.html">x</a>', "none.html does not exist"),
        ('<a href="index.html#none">x</a>', "#none has no such anchor"),
        ('<a href="../README.md">x</a>', "../README.md does not exist"),
        ('<img src="none.png">', "none.png does not exist"),
        ('<script src="https://cdn.example/x.js"></script>', "fetches https://cdn.example/x.js from another host"),
        ('<link rel="stylesheet" href="//fonts.example/x">', "fetches //fonts.example/x from another host"),
    ],
)
def test_what_is_wrong_with_a_page_is_told(tmp_path, page, told):
    (tmp_path / "README.md").write_text("there, but no part of the site")
    found = check_site.problems(write(tmp_path / "site", index=page))
    assert len(found) == 1
    assert found[0].endswith(told)


def test_an_empty_site_is_no_site(tmp_path):
    assert check_site.problems(tmp_path)
