"""Ctrl-C while the command line is being imported: a word, and no traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

_INTERRUPTED = """
import os, signal, sys

class Interrupter:
    def find_spec(self, name, *_):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupter())
from octavo.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["octavo.cli", "typer", "octavo.errors", "octavo.api", "torch"])
def test_interrupt_during_imports_is_one_word(module: str) -> None:
    command = [sys.executable, "-c", _INTERRUPTED.format(module=module), "plan", "/etc/hostname"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "interrupted\n")
