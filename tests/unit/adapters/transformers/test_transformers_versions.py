"""What is said of a transformers that is newer than any tested."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")


from octavo.adapters.transformers import versions

PYPROJECT = Path(__file__).parents[4] / "pyproject.toml"


@pytest.mark.parametrize("version", ["5.17.0", "5.24.3", "5.24.0.dev0", "5.9.1"])
def test_nothing_is_said_of_versions_that_were_tested(version):
    assert versions.remark_on(version) is None


@pytest.mark.parametrize("version", ["5.25.0", "5.25.0.dev0", "6.0.0", "10.1"])
def test_newer_ones_are_named(version):
    assert f"transformers {version} is newer than octavo was tested with (5.24)" in (versions.remark_on(version) or "")


def test_a_newer_one_warns_and_is_remarked(monkeypatch):
    monkeypatch.setattr(versions.transformers, "__version__", "7.0.0")  # others may have imported it anew
    with pytest.warns(UserWarning, match=r"transformers 7\.0\.0 is newer"):
        assert len(versions.warn_of_newer()) == 1


def test_no_newer_one_is_refused_at_installation():
    extra = next(line for line in PYPROJECT.read_text().splitlines() if line.startswith("transformers = "))
    assert '"transformers>=5.17"' in extra
