"""What a program has set for its own tensors and terminal changes no byte of octavo's, and is no traceback."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

import octavo


@pytest.mark.parametrize("kind", ["none", "closed", "unlike a file"])
def test_without_a_terminal_to_ask_there_is_no_bar(
    kind: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", {"none": None, "closed": closed, "unlike a file": object()}[kind])
    octavo.convert(small, tmp_path / "out")


def test_the_command_converts_where_stderr_is_closed(small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "octavo", "convert", str(small), str(tmp_path / "out")]
    found = subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, text=True)
    assert found.returncode == 0
    assert f"written: {tmp_path / 'out'}" in found.stdout
