"""Where transformers is there and can't be imported, a conversion says why nothing was proved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = "from octavo import readers; print(readers._transformers().why)"


def test_what_can_t_be_imported_is_not_said_to_be_absent(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError('cannot import name nothing')\n")
    finished = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert finished.stdout == "it can't be imported: ImportError: cannot import name nothing\n", finished.stderr
